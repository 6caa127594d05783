"""The forms in which a checkpoint holds weights and optimizer, and how a run reads another's.

    plain     model.safetensors, optimizer.pt              one process, or copies of the model
    full      pytorch_model_fsdp.bin, optimizer.bin        sharded over ranks, gathered on the first
    sharded   pytorch_model_fsdp_0/, optimizer_0/          sharded over ranks, each wrote its rows

A run that is sharded writes one of the last two, and the stock Trainer reads only the form that it
would write. Tensors of all three have the same names and bits, so any run reads any of them:
those of a folder are put into tensors placed as the run's are, by torch.distributed.checkpoint.

torch reads into what an optimizer holds already. What a schedule of active blocks holds goes by the
step, so a fresh optimizer is first put where the checkpoint stands: at its `Turn`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowmem.errors import CheckpointError, first_line
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.shards import Shard

OPTIMIZERS = {"plain": "optimizer.pt", "full": "optimizer.bin", "sharded": "optimizer_0/.metadata"}
"""The file of the optimizer by which a form is known."""
WEIGHTS = {"full": "pytorch_model_fsdp.bin", "sharded": "pytorch_model_fsdp_0"}
Named = Sequence[tuple[str, nn.Parameter]]


class Turn(NamedTuple):
    """Where a schedule stands: completed steps, and what it has decided."""

    step: int = 0
    decided: str = ""


def turn_of(optimizer: LowMemOptimizer) -> Turn:
    """Where an optimizer stands, whose groups step together."""
    group = optimizer.param_groups[0]
    return Turn(group["step"], group["decided"])


def form_of(listing: Collection[str]) -> str | None:
    """The form of a checkpoint with such files; None where it has no optimizer.

    >>> form_of(["model.safetensors", "optimizer.pt"]), form_of(["optimizer_0/.metadata"]), form_of([])
    ('plain', 'sharded', None)
    """
    return next((form for form, name in OPTIMIZERS.items() if name in listing), None)


def form_in(folder: Path) -> str | None:
    """The form of the checkpoint in a folder."""
    return form_of([name for name in OPTIMIZERS.values() if (folder / name).is_file()])


def load_weights_(folder: Path, form: str, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model, whole or sharded; on all ranks together.

    Raises:
        CheckpointError: tensors of the model are missing in it.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    if form == "sharded":
        state = {"model": get_model_state_dict(model)}
        _read(state, folder / WEIGHTS[form])
        set_model_state_dict(model, state["model"])
        return
    held = (_safetensors(folder) if form == "plain" else _pickled(folder / WEIGHTS[form])) if _first() else {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = set(set_model_state_dict(model, held, options=_whole()).missing_keys) - tied
    if missing and _first():
        raise CheckpointError(f"{folder} lacks weights of this model, such as {min(missing)}")


def load_optimizer_(
    folder: Path, form: str, model: nn.Module, optimizer: LowMemOptimizer, turn: Turn
) -> None:
    """Put a checkpoint's optimizer state into an optimizer over a model, whole or sharded.

    Args:
        folder: the checkpoint; form: its own; model: whose parameters the optimizer has.
        turn: where the optimizer stood that was saved.

    Raises:
        CheckpointError: a sharded one that torch cannot read.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    _stand_(optimizer, turn, _saved_keys(folder, form, _named(optimizer)))
    if form == "sharded":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _read(state, folder / Path(OPTIMIZERS[form]).parent)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_lenient())
        return
    has_rows = any(x.dim() for held in optimizer.state.values() for x in held.values())
    held = _pickled(folder / OPTIMIZERS[form]) if _first() or not has_rows else {}
    if form == "plain" and held:
        held = by_name(held)
    if has_rows:
        set_optimizer_state_dict(model, optimizer, held, options=_whole())
    else:  # torch takes the device from a tensor of the state, and there is none
        optimizer.load_state_dict(held)


def _stand_(optimizer: LowMemOptimizer, turn: Turn, saved: Mapping[str, Collection[str]]) -> None:
    """Hold what the optimizer held that was saved: state of the same tensors, of any values."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.update(step=max(0, turn.step - 1), decided=turn.decided)
    optimizer.init_state()  # what is saved is of the step before the clock
    for group in optimizer.param_groups:
        group["step"] = turn.step
    for name, p in _named(optimizer):
        if optimizer.state.get(p) and not saved[name]:  # no gradient has come to it yet
            del optimizer.state[p]


def refuse_misfit(folder: Path, form: str, optimizer: LowMemOptimizer) -> None:
    """Refuse optimizer state that this number of ranks holds otherwise, before torch reads it key by key.

    Raises:
        CheckpointError: names a tensor, what was saved and is held of it, and numbers of ranks that fit.
    """
    if optimizer.strategy.turns:  # what is held goes by the step
        return
    names, ranks = _named(optimizer), _ranks()
    saved = _saved_keys(folder, form, names)
    found = _misfit(optimizer, names, saved, ranks)
    if found is None:
        return
    name, p = found
    fit = [str(n) for n in range(1, 17) if _misfit(optimizer, names, saved, n) is None]
    kept, held = (", ".join(sorted(keys)) for keys in (saved[name], _keys(optimizer, p, ranks)))
    raise CheckpointError(
        f"cannot resume from {folder} on {ranks} ranks: it holds {kept} of {name} {tuple(p.shape)}, here it "
        f"is {held}, for a tensor is held in blocks only where the rows of every rank start on one; resume "
        + (f"on {' or '.join(fit)} ranks" if fit else "on as many ranks as wrote it")
    )


def _misfit(
    optimizer: LowMemOptimizer,
    names: Named,
    saved: Mapping[str, set[str]],
    ranks: int,
) -> tuple[str, nn.Parameter] | None:
    """The first tensor of which so many ranks hold other keys than were saved."""
    held = ((name, p) for name, p in names if saved[name])
    return next(((name, p) for name, p in held if saved[name] != _keys(optimizer, p, ranks)), None)


def _named(optimizer: LowMemOptimizer) -> Named:
    """Parameters by the names that a checkpoint has for them."""
    named = optimizer.named_parameters()
    return [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in named]


def _keys(optimizer: LowMemOptimizer, p: nn.Parameter, ranks: int) -> set[str]:
    """What the first of so many ranks holds of a tensor."""
    place, strategy = optimizer.place(p), optimizer.strategy
    shard = Shard.of(p.shape, ranks, 0) if ranks > 1 and p.dim() else None
    rule = strategy.rule_name(place.role, p.shape, shard)
    return set(replace(place, shard=shard).fresh(strategy, rule, p, "meta"))


def _saved_keys(folder: Path, form: str, named: Named) -> dict[str, set[str]]:
    """What a checkpoint holds of each tensor; of the values nothing is read."""
    path, names = folder / OPTIMIZERS[form], [name for name, _ in named]
    if form != "sharded":
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = (by_name(held, copied=False) if form == "plain" else held)["state"]
        return {name: set(state.get(name, ())) for name in names}
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    listed = FileSystemReader(path.parent).read_metadata().state_dict_metadata
    starts = {name: f"optimizer.state.{name}." for name in names}
    return {name: {key.removeprefix(s) for key in listed if key.startswith(s)} for name, s in starts.items()}


def by_name(state: Mapping[str, Any], *, copied: bool = True) -> dict[str, Any]:
    """An optimizer's state dict with the names of tensors for their numbers, as ranks exchange it.

    Args:
        state: as `state_dict` gives it; copied: into tensors that lie row by row, where they do not.

    >>> group = {"params": [0], "param_names": ["weight"], "lr": 0.1}
    >>> by_name({"state": {0: {"age": 1}}, "param_groups": [group]})["state"]
    {'weight': {'age': 1}}
    """
    groups = state["param_groups"]
    names = {i: name for g in groups for i, name in zip(g["params"], g["param_names"], strict=True)}
    return {
        "state": {names[i]: _rows(held) if copied else held for i, held in state["state"].items()},
        "param_groups": [{**group, "params": [names[i] for i in group["params"]]} for group in groups],
    }


def _rows(held: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors row by row in memory: a broadcast sends it as it lies, and others read rows."""
    return {key: x.contiguous() if isinstance(x, torch.Tensor) else x for key, x in held.items()}


def _whole() -> Any:
    """Tensors are whole on the first rank, which sends the others theirs."""
    several = _ranks() > 1
    return replace(_lenient(), full_state_dict=True, cpu_offload=several, broadcast_from_rank0=several)


def _lenient() -> Any:
    """What is missing is for the optimizer to judge: it knows of whom nothing is held."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(strict=False)


def failure(error: BaseException) -> BaseException:
    """What the first rank that failed met, where torch says it by an error that is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    return error.failures[min(error.failures)][0] if isinstance(error, CheckpointException) else error


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise what torch says of a sharded checkpoint that it cannot read as an error of ours."""
    try:
        yield
    except BaseException as error:
        if (why := failure(error)) is error:
            raise
        raise CheckpointError(
            f"cannot resume from {folder}: {first_line(why)}; resume with the settings that it was written "
            "with, or from an earlier checkpoint"
        ) from error


def _read(state: dict[str, Any], folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(), reading(folder):  # torch says of one process what was asked for
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, checkpoint_id=folder, no_dist=_ranks() == 1)


def _safetensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def _pickled(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return read


def _ranks() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _first() -> bool:
    import torch.distributed as dist

    return _ranks() == 1 or dist.get_rank() == 0
