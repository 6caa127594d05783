"""A run without gradients as a list of numbers: from the base model its weights come back, bit for bit.

A step is a pure function of the weights, the slopes and the group's numbers: probes
leave every bit, directions are drawn again from their names, and what is rounded at
random has a name too. So the slopes (8 bytes each) and the learning rates are the
whole run, some hundred kB for 20 000 steps; a log that is cut short is the run's
checkpoint at that step. A column that never changes is written once.

It holds on the device type and the version of torch that trained: noise goes through
a logarithm, and sums have an order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError, first_line
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.shards import gathered
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.marks import trains
from lowmem.sources.slopes import Along, Slope

NAME = "zo_log.safetensors"
"""The file that a run leaves."""

VERSION = 2
NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps")


@dataclass
class ReplayLog:
    """What the steps of a run were made of.

    Args:
        header: strategy, groups, shapes, dtype and hash of the base, versions; plain values.
        steps: (clock, slopes by evaluation, numbers by group) for each step.
        left: why the run has left what a log can say; later steps are not in it. "" as long as they are.
    """

    header: dict[str, Any]
    steps: list[tuple[int, list[list[float]], list[list[float]]]] = field(default_factory=list)
    left: str = ""

    @classmethod
    def of(
        cls, optimizer: LowMemOptimizer, model: nn.Module, origin: Mapping[str, Any] | None = None
    ) -> ReplayLog:
        """An empty log of a run that starts from these weights.

        Args:
            optimizer: that will take the steps; model: the base; origin: what else it belongs to.

        Raises:
            UserError: a strategy with gradients, state of earlier steps, or frozen parameters.
        """
        _source(optimizer.strategy)
        if problem := unreplayable(optimizer):
            raise UserError(problem)
        header = {
            "version": VERSION,
            "torch": torch.__version__,
            "device": _device(optimizer),
            "base": fingerprint(model),
            "dtype": _dtype(model),
            "strategy": optimizer.strategy.to_config(),
            "groups": [_plain(group) for group in optimizer.param_groups],
            "parameters": {name: _kind(p) for name, p in optimizer.named_parameters()},
            "origin": dict(origin or {}),
        }
        return cls(json.loads(json.dumps(header)))  # as it will be read

    def follow(self, optimizer: LowMemOptimizer) -> Any:
        """Record every step from now on; returns a handle with `remove`.

        The steps are those of `backward` and `step`; `step(closure)` evaluates where nobody looks.
        """

        def before(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if any(x is not None for x in (*args[1:], *kwargs.values())):  # the first one is the optimizer
                raise UserError("a run with a log steps by optimizer.backward(loss) and optimizer.step()")
            self.left = self.left or self._other(optimizer)
            if self.left:
                return
            slopes = [[slope.c for slope in evidence] for evidence in optimizer._evidence]
            numbers = [_numbers(group) for group in optimizer.param_groups]
            self.steps.append((int(optimizer.param_groups[0]["step"]), slopes, numbers))

        return optimizer.register_step_pre_hook(before)

    def cut(self, count: int) -> ReplayLog:
        """The log of the first steps alone."""
        return ReplayLog(self.header, self.steps[:count], self.left if count > len(self.steps) else "")

    def _other(self, optimizer: LowMemOptimizer) -> str:
        """What is not trained as it was when the log began, and what to do; "" where all is the same."""
        now = {name: trains(p) for name, p in optimizer.named_parameters()}
        if (
            len(optimizer.param_groups) != len(self.header["groups"])
            or now.keys() != self.header["parameters"].keys()
        ):
            return "a log is of the parameter groups that it began with: add them before it begins"
        frozen = next((name for name, on in now.items() if not on), None)
        return (
            f"{frozen!r} was frozen on the way, which a log does not say: freeze it before" if frozen else ""
        )

    def elsewhere(self, optimizer: LowMemOptimizer) -> str:
        """Why steps of this optimizer have other bits than those of the log; "" where they have the same."""
        here = {"torch": torch.__version__, "device": _device(optimizer)}
        other = [
            f"{what} {self.header[what]}, here {ours}"
            for what, ours in here.items()
            if self.header[what] != ours
        ]
        return "; ".join(other)

    # ---- replaying ----

    def optimizer(self, model: nn.Module, strategy: Strategy) -> LowMemOptimizer:
        """An optimizer over the base model that takes this run's steps.

        Raises:
            UserError: another model, strategy, device or version of torch.
        """
        self._check(model, strategy)
        named = dict(_source(strategy).trained(model))
        groups = [
            {**_settings(group), "params": [(name, named[name]) for name in group["param_names"]]}
            for group in self.header["groups"]
        ]
        first = groups[0]
        made = LowMemOptimizer(
            groups, strategy, lr=first["lr"], seed=first["seed"], model=model,
            compile="on" if first["compile"] else "off",
        )  # fmt: skip
        for group, saved in zip(made.param_groups, self.header["groups"], strict=True):
            group.update(_settings(saved) | {"step": saved["step"]})
        return made

    def _check(self, model: nn.Module, strategy: Strategy) -> None:
        for what, ours in (("torch", torch.__version__), ("strategy", strategy.to_config())):
            if self.header[what] != ours:
                raise UserError(f"the log's {what} is {self.header[what]}, here it is {ours}; use the log's")
        named = dict(_source(strategy).trained(model))
        for name, kind in self.header["parameters"].items():
            if name not in named or _kind(named[name]) != kind:
                here = _kind(named[name]) if name in named else "not there"
                raise UserError(f"the log is of another model: {name!r} is {kind} in it and {here} here")
        devices = {named[name].device.type for name in self.header["parameters"]}
        if devices != {self.header["device"]}:
            raise UserError(
                f"the log is of a run on {self.header['device']}, where noise has other bits; use that"
            )
        if (found := fingerprint(model)) != self.header["base"]:
            raise UserError(
                f"the log starts from other weights (hash {self.header['base'][:12]}, not {found[:12]}); "
                "give the base model that the run began with, in the same dtype"
            )

    def apply(self, optimizer: LowMemOptimizer, tell: Callable[[int], None] | None = None) -> None:
        """Take all steps.

        Args:
            optimizer: from `optimizer`; tell: called with the number of steps done.
        """
        source = _source(optimizer.strategy)
        for done, (step, slopes, numbers) in enumerate(self.steps, 1):
            for group, values in zip(optimizer.param_groups, numbers, strict=True):
                lr, decay, beta1, beta2, eps = values
                group.update(lr=lr, weight_decay=decay, betas=(beta1, beta2), eps=eps, step=step)
            for index, some in enumerate(slopes):
                query = optimizer.query(index)
                found = (source.direction(query, k) for k in range(len(some)))
                optimizer._evidence.append(tuple(map(Slope, some, found)))
            optimizer.step()
            if tell is not None:
                tell(done)

    # ---- the file ----

    def save(self, path: Path) -> None:
        """Write the log, a safetensors file with the header as its metadata.

        Raises:
            UserError: later steps of the run are not in it.
        """
        if self.left:
            raise UserError(f"the log ends after {len(self.steps)} steps of the run: {self.left}")
        from safetensors.torch import save_file

        rows = [[one for group in numbers for one in group] for _, _, numbers in self.steps]
        table = torch.tensor(rows, dtype=torch.float64).reshape(
            len(rows), len(self.header["groups"]), len(NUMBERS)
        )
        flat = [c for _, slopes, _ in self.steps for some in slopes for c in some]
        counts = [[len(slopes), len(slopes[0]) if slopes else 0] for _, slopes, _ in self.steps]
        columns = {name: _compact(table[:, :, i]) for i, name in enumerate(NUMBERS)}
        columns["step"] = torch.tensor([step for step, _, _ in self.steps], dtype=torch.int32)
        columns["slopes"] = torch.tensor(flat, dtype=torch.float64)
        columns["counts"] = _compact(torch.tensor(counts, dtype=torch.int32).reshape(-1, 2))
        save_file(columns, str(path), metadata={"lowmem": json.dumps(self.header)})

    @classmethod
    def load(cls, path: Path) -> ReplayLog:
        """Read a log.

        Raises:
            UserError: the file is not one, or of another version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})["lowmem"])
                version = header["version"]
                held = {name: file.get_tensor(name) for name in (*NUMBERS, "step", "slopes", "counts")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is not the log of a run ({first_line(error)}); runs leave {NAME}"
            ) from error
        if version != VERSION:
            raise UserError(
                f"{path} is a log of version {version}, and this lowmem reads {VERSION}: take the lowmem "
                "that wrote it"
            )
        return cls(header, list(_rows(held, len(header["groups"]))))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every tensor that a checkpoint of the model holds, codes and scales included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole = gathered(tensor.detach()).contiguous().cpu()
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unreplayable(optimizer: LowMemOptimizer) -> str:
    """Why a log cannot begin at an optimizer's next step, and what to do; "" where it can."""
    if frozen := next((name for name, p in optimizer.named_parameters() if not trains(p)), None):
        return f"{frozen!r} is frozen, which a log does not say: make the optimizer without it"
    step = optimizer.param_groups[0]["step"]
    held = any(isinstance(x, Tensor) for state in optimizer.state.values() for x in state.values())
    if not (step and held):
        return ""
    return (
        f"the optimizer holds state of {step} steps, which is not in the weights that a log starts from: "
        "begin the log before the first step, or with a new optimizer"
    )


def _device(optimizer: LowMemOptimizer) -> str:
    return next((p.device.type for _, p in optimizer.named_parameters()), "cpu")


def _dtype(model: nn.Module) -> str:
    """The dtype that most tensors of a model have, codes apart; scales have one of their own."""
    words = [str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()]
    return max(sorted(set(words)), key=words.count, default="float32")


def _source(strategy: Strategy) -> Along:
    if strategy.source.needs_autograd:
        raise UserError(f"{strategy.name} steps by gradients, which no list of numbers holds: it has no log")
    return cast("Along", strategy.source)


def _kind(p: Tensor) -> str:
    return f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}"


def _numbers(group: Mapping[str, Any]) -> list[float]:
    return [float(x) for x in (group["lr"], group["weight_decay"], *group["betas"], group["eps"])]


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its tensors."""
    return {
        key: float(value) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group is given when it is made; lists of the file are tuples again."""
    kept = {k: v for k, v in group.items() if k not in ("param_names", "strategy", "step", "initial_lr")}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}


def _compact(x: Tensor) -> Tensor:
    """One row where all are the same, one column likewise."""
    for dim in (0, 1):
        if x.shape[dim] > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x.contiguous()


def _rows(
    held: Mapping[str, Tensor], groups: int
) -> Iterator[tuple[int, list[list[float]], list[list[float]]]]:
    steps = held["step"].tolist()
    tables = [held[name].expand(len(steps), groups).tolist() for name in NUMBERS]
    counts = held["counts"].expand(len(steps), 2).tolist()
    slopes, at = held["slopes"].tolist(), 0
    for i, step in enumerate(steps):
        evaluations, queries = counts[i]
        some = [slopes[at + j * queries : at + (j + 1) * queries] for j in range(evaluations)]
        at += evaluations * queries
        yield step, some, [[table[i][g] for table in tables] for g in range(groups)]
