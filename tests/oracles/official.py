"""A method of ours beside an optimizer of a package that implements it."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor, nn

from tests.oracles.drive import follow, gradients, name_without_offset, start_of

SHAPE, STEPS, LR = (8, 12), 6, 1e-2
ADAM = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8}
DECAY = {"weight_decay": 0.1}
Make = Callable[[Any, list[Any]], Any]


@dataclass(frozen=True)
class Pair:
    """A method of ours and a package's optimizer that takes the same steps.

    Args:
        package: to import; make: the optimizer from the module and a list of one parameter.
        name: of ours; options: its own; hyper: lr and the like.
        scale: of the gradients, which grow;  close: the largest difference of a weight.
    """

    package: str
    make: Make
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    hyper: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    grow: float = 1.0
    close: float = 2e-7


def kozistr(kind: str, **told: Any) -> Make:
    """An optimizer of pytorch_optimizer."""
    return lambda module, params: getattr(module, kind)(params, lr=LR, **told)


def paired(kind: str, name: str, betas: tuple[float, ...] = (0.9, 0.999), **told: Any) -> Pair:
    """One of pytorch_optimizer with decoupled decay, and ours."""
    own = {key: told.pop(key) for key in ("options", "scale", "close") if key in told}
    last = -1 if name == "adan" else 1  # what is between or beyond is an option of ours
    hyper = {**ADAM, "betas": (betas[0], betas[last]), **told.pop("hyper", DECAY)}
    theirs = {key: hyper[key] for key in ("weight_decay", "eps") if key in hyper and key not in told}
    if "weight_decay" in hyper:
        theirs["weight_decouple"] = True
    return Pair("pytorch_optimizer", kozistr(kind, betas=betas, **theirs, **told), name, hyper=hyper, **own)


def apollo(kind: str, rank: int, scale: float, **told: Any) -> Make:
    """APOLLO over an SVD, the only projector of the package that draws nothing."""
    group = {"rank": rank, "scale": scale, "scale_type": kind, "update_proj_gap": 200}

    def make(module: Any, params: list[Any]) -> Any:
        groups = [{"params": params, "proj": "svd", "proj_type": "std", **group}]
        return module.APOLLOAdamW(groups, **{"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, **told})

    return make


def schedule_free(module: Any, params: list[Any], **told: Any) -> Any:
    optimizer = module.AdamWScheduleFree(params, lr=LR, betas=(0.9, 0.999), foreach=False, **told)
    optimizer.train()
    return optimizer


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What packages print and warn of is not the tests' matter."""
    import warnings

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def module_of(package: str) -> Any:
    with aside():
        pytest.importorskip(package, exc_type=ImportError)
        return importlib.import_module(package)


def stream(pair: Pair) -> list[Tensor]:
    """The gradients."""
    return [g * pair.grow**t for t, g in enumerate(gradients(SHAPE, STEPS, scale=pair.scale))]


def theirs(pair: Pair) -> list[Tensor]:
    """The weights after each step of the package's optimizer."""
    module, p = module_of(pair.package), nn.Parameter(start_of(SHAPE))
    weights = []
    with aside():
        optimizer = pair.make(module, [p])
        for g in stream(pair):
            p.grad = g.clone()
            optimizer.step()
            weights.append(p.detach().clone())
    return weights


def ours(pair: Pair) -> list[Tensor]:
    """The weights after each of our steps."""
    grads = stream(pair)
    return follow(
        pair.name, start_of(SHAPE), grads, key=name_without_offset(200), hyper=pair.hyper, **pair.options
    )


def apart(pair: Pair) -> list[float]:
    """The largest difference of a weight, after each step."""
    return [float((a - b).abs().max()) for a, b in zip(ours(pair), theirs(pair), strict=True)]
