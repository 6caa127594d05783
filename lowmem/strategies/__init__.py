"""Named methods: one file each, found automatically.

A file holds a module docstring (paper, equation, bytes), at most one new part,
and one factory marked with `@register`, whose typed keyword options are what
Python, YAML and the command line accept. From then on the method is in
`available()`, the planner, the table of the README and the contract suite.
"""

from lowmem.strategies.registry import (
    Entry,
    Option,
    available,
    create,
    optimizer,
    parse_options,
    register,
)

__all__ = ["Entry", "Option", "available", "create", "optimizer", "parse_options", "register"]
