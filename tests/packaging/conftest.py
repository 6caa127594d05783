"""The command line's tiny model serves the examples too."""

from tests.cli.conftest import tiny_model

__all__ = ["tiny_model"]
