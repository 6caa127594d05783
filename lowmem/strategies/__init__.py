"""Named strategies: records of parts, both found automatically.

A part (`parts.py`) is a factory under its kind; a method (`method.py`) is a record that names
a part for each axis, and its defaults. Their typed keyword options are what Python, YAML and
the command line accept. From then on a method is in `available()`, the planner, the table of
the README and the contract suite, and a part is open to every method.
"""

from lowmem.strategies.method import Method, register
from lowmem.strategies.options import Gap, Limits, Option, Size
from lowmem.strategies.parts import part, parts
from lowmem.strategies.registry import Entry, available, create, optimizer, parse_options

__all__ = [
    "Entry",
    "Gap",
    "Limits",
    "Method",
    "Option",
    "Size",
    "available",
    "create",
    "optimizer",
    "parse_options",
    "part",
    "parts",
    "register",
]
