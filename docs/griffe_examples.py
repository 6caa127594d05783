"""Docstrings say `Example:`; the pages show it as code, which they do under `Examples:`."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section while a docstring is read."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Each object, after its members are known."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
