"""Where a gradient is seen: one file per family of projectors."""
