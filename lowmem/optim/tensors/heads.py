"""Into how many heads the rows of a query or key weight are cut.

Attention takes the rows of one head together: their curvature is alike, and unlike that of
the next head. What a weight does is told by its module's name, the size of a head by the
attention module or the model's configuration. Like roles, the counts are found in the model
once and kept by name in the groups and the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lowmem.optim.tensors.roles import original

PARTS = frozenset({"q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "wq", "wk", "q", "k"})
"""Last component of the name of a module that makes queries or keys alone, with one row for an output."""
SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""What attention modules and configurations call the rows of a head."""


def find(model: nn.Module) -> dict[str, str]:
    """Counts of heads, as text, by parameter, under every name it has; weights with one are left out.

    Example:
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})
        >>> model.head_dim = 4
        >>> find(model)
        {'q_proj.weight': '2'}
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    counts: dict[int, int] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if original(name).rpartition(".")[2] not in PARTS or not isinstance(weight, nn.Parameter):
            continue
        size = next(_sizes([modules[above] for above in _above(name)]), 0)
        if weight.dim() == 2 and size and weight.shape[0] % size == 0 and weight.shape[0] > size:
            counts[id(weight)] = weight.shape[0] // size
    named = model.named_parameters(remove_duplicate=False)
    return {name: str(counts[id(p)]) for name, p in named if id(p) in counts}


def _above(name: str) -> Iterator[str]:
    """The names of the modules that a module is in, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _sizes(modules: list[nn.Module]) -> Iterator[int]:
    """Rows of a head, by each that says so: modules, then their configurations."""
    for module in modules:
        config = getattr(module, "config", None)
        yield from (size for key in SIZES for at in (module, config) if (size := _number(at, key)))
        width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
        if width and heads:
            yield width // heads


def _number(at: Any, key: str) -> int:
    value = getattr(at, key, None)
    return value if isinstance(value, int) else 0
