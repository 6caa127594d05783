"""The charts, as SVG text."""
