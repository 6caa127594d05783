"""Parameter groups: how a model's are made, and what one needs to join a run.

A group is the caller's: tensors and numbers of their own. Beside these it holds what a
checkpoint must know: the run's clock and seed, the strategy, and what its tensors are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lowmem.errors import UserError, nearest
from lowmem.optim.int8.tensor import is_coded
from lowmem.optim.source import Named, trainable
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors import heads
from lowmem.optim.tensors.checks import check_hyper
from lowmem.optim.tensors.roles import ROLES, find, to_text
from lowmem.optim.writers import select

log = logging.getLogger(__name__)

RUN = ("step", "seed", "compile", "strategy", "previous_norm", "decided")
"""What a group holds of the run: the same in all of them."""


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
    trained: Named | None = None,
) -> list[dict[str, Any]]:
    """A model's trainable parameters as groups: one that decays, one that does not.

    Args:
        model: its parameters are taken in order, tied ones once.
        weight_decay: of the group that decays.
        decay_names: names that decay; all, if None.
        trained: names and tensors to take instead, where a source trains others.

    Returns:
        Groups with "params" as (name, parameter) pairs, "weight_decay", "roles" and "heads".

    Raises:
        UserError: nothing of the model is trainable.

    Example:
        >>> [len(group["params"]) for group in param_groups(nn.Linear(4, 4), decay_names=["weight"])]
        [1, 1]
    """
    found, cut = find(model), heads.find(model)
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {}
    for name, p in trainable(model) if trained is None else trained:
        groups.setdefault(decay_names is None or name in decay_names, []).append((name, p))
    if not groups:
        raise UserError("no parameter of the model is trainable: set requires_grad on those to train")
    return [
        {
            "params": members,
            "weight_decay": weight_decay if decays else 0.0,
            "roles": to_text({name: found[name] for name, _ in members if name in found}),
            "heads": to_text({name: cut[name] for name, _ in members if name in cut}),
        }
        for decays, members in groups.items()
    ]


def completed(
    group: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    strategy: Strategy,
    model: nn.Module | None,
) -> dict[str, Any]:
    """What a group needs beside what it has, to join a run.

    Args:
        group: as the caller gave it; parameters that can be read once only are made a list.
        groups: those that are in the run already; defaults: of a run that begins.
        strategy: of the run.
        model: where names and roles are found that the group does not say.

    Raises:
        UserError: a number, a role or a dtype that is not allowed.
    """
    check_hyper({key: value for key, value in group.items() if key != "compile"})
    role, known = group.get("role", "matrix"), {*ROLES, *strategy.rules}
    if role not in known:
        raise UserError(f"unknown role {role!r} of a group; {nearest(str(role), known)}")
    if taken := [key for key in strategy.options if key in group and group[key] != strategy.options[key]]:
        raise UserError(
            f"a parameter group sets {', '.join(taken)}, which the method has for all tensors: give it "
            f"beside its name; other rules for some tensors are embedding=, head= and vector="
        )
    run = groups[0] if groups else defaults
    found = {key: run[key] for key in RUN} | {"since": run["step"]}
    if groups and "lr" not in group and isinstance(defaults["lr"], Tensor):
        found["lr"] = defaults["lr"].clone()  # schedulers write into a tensor: each group has its own
    if isinstance(group["params"], set):
        return found  # has no order, and is refused by torch
    if not isinstance(group["params"], Tensor | list | tuple):
        group["params"] = list(group["params"])
    params = group["params"]
    members = with_names([params] if isinstance(params, Tensor) else params, model)
    for p in (member[1] if isinstance(member, tuple) else member for member in members):
        if isinstance(p, Tensor):
            select(strategy.writer, p.dtype, is_coded(p))  # refuses what it cannot take
            if is_coded(p) and not strategy.source.needs_autograd:
                raise UserError(
                    f"{strategy.name or 'the strategy'} displaces weights, which int8 codes cannot follow; "
                    f"take qzo, which trains the scales of 4-bit weights"
                )
    if strategy.schedule.by_layer and not all(isinstance(member, tuple) for member in members):
        log.warning(
            "%s goes by the numbers of layers in the names of parameters, and a group has no names: each of "
            "its tensors counts as a layer; give the model, or model.named_parameters()",
            strategy.name or "the strategy",
        )
    if model is not None:
        names = [member[0] for member in members if isinstance(member, tuple)]
        looks = {"roles": find} if "role" not in group and "roles" not in group else {}
        looks |= {"heads": heads.find} if "heads" not in group else {}
        for key, look in looks.items():
            said = look(model)
            found[key] = to_text({name: said[name] for name in names if name in said})
    return {"params": members, **found}


def with_names(members: Sequence[Any], model: nn.Module | None) -> list[Any]:
    """The members of a group with their names, where the model knows all of them."""
    if model is None or not all(isinstance(member, Tensor) for member in members):
        return list(members)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names.get(id(p), ""), p) for p in members]
    return found if all(name for name, _ in found) else list(members)
