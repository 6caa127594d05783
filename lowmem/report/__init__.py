"""From documents to pages: HTML, pictures, tables."""

from lowmem.report.pages import Report, build, html, write

__all__ = ["Report", "build", "html", "write"]
