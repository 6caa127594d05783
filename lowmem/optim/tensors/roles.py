"""Which tensor is what: a matrix, an embedding, the head, a vector.

A role is a property of the tensor, not of a parameter group: groups are the caller's,
for learning rates and decay. Shape tells vectors from the rest; what shape does not
tell is found in the model, once, and kept by name in the groups and the checkpoint, so
that a resume without a model knows it too.

Wrappers change where a weight lies, not what it is. A module keeps the name it had
before it was wrapped (`original`), and so an adapter's copy of the head, a compiled
model's embedding and a sharded one's are still that. Tied weights are embeddings.

A matrix of three dimensions is a stack of matrices, the experts of a mixture. The
kernel of a one-dimensional convolution has as many and is none: it is told by its module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

ROLES = ("matrix", "embedding", "head", "vector", "convolution")
"""What a tensor may be; a convolution follows the rule of matrices, as one (out, rest) matrix."""

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
"""Last component of a module's name that marks an output head in models that do not say so."""

WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_layer",
        "original_module",
    }
)
"""Components of a module's name that wrappers put in."""

LABELLED = frozenset({"modules_to_save", "parametrizations"})
"""Wrappers whose next component is a label: an adapter's name, a tensor's."""


def original(name: str) -> str:
    """The name of a module before it was wrapped.

    >>> original("base_model.model.lm_head.modules_to_save.default"), original("module._orig_mod.lm_head")
    ('base_model.model.lm_head', 'lm_head')
    """
    parts = iter(name.split("."))
    kept = []
    for part in parts:
        if part in LABELLED:
            next(parts, None)
        elif part not in WRAPPERS:
            kept.append(part)
    return ".".join(kept)


def find(model: nn.Module) -> dict[str, str]:
    """Roles that shape does not tell, by parameter, under every name it has.

    Example:
        >>> find(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
        {'0.weight': 'embedding'}
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    said = {id(head) for module in modules.values() for head in _heads(module)}
    heads = {original(name) for name, m in modules.items() if id(m) in said} | set(HEADS)
    embeddings = {original(n) for n, m in modules.items() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found: dict[int, str] = {}
    for name, module in modules.items():
        role, where = "", original(name)
        if where in embeddings:
            role = "embedding"
        elif where in heads or where.rpartition(".")[2] in HEADS:
            role = "head"
        elif isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            role = "convolution"
        for p in module.parameters(recurse=False):
            if role and p.dim() > 1 and found.get(id(p)) != "embedding":
                found[id(p)] = role
    named = model.named_parameters(remove_duplicate=False)
    return {name: found[id(p)] for name, p in named if id(p) in found}


def _heads(module: nn.Module) -> Iterator[nn.Module]:
    """What a model says its head is."""
    get = getattr(module, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # a model of several parts may have none of its own
        return
    if isinstance(head, nn.Module):
        yield head


def refined(role: str, shape: Sequence[int]) -> str:
    """The role, where shape may tell better: what has one dimension is a vector.

    >>> refined("head", (5,)), refined("head", (5, 3))
    ('vector', 'head')
    """
    return "vector" if role in ROLES and len(shape) < 2 else role


def is_stack(role: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a stack of matrices (E, m, n)."""
    return role == "matrix" and len(shape) == 3


def to_text(roles: Mapping[str, str]) -> str:
    """Roles by name as a group and a checkpoint hold them."""
    return json.dumps(dict(sorted(roles.items())))


@functools.lru_cache(maxsize=64)
def from_text(text: str) -> Mapping[str, str]:
    """The inverse of `to_text`; not to be written to."""
    found: dict[str, str] = json.loads(text)
    return found
