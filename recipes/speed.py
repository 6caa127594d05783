"""The step of every method beside that of each package that has the method, in turn, in one process.

    method -> rounds of {torch's fused AdamW, ours, its peers}, each once a round -> medians -> a row
           -> speed.json after each row, a page

Run it alone on the machine; ratios travel, times do not. A refresh of a basis is taken in at the method's own
gap: step without + (step with - step without) / gap. A peer that is not installed, or that does not run, is
left out and named; so is a method that does not step by itself. All step the same fp32 weights, a Llama's.

    python -m lowmem.recipes.speed --output-dir speed
    python -m lowmem.recipes.speed --output-dir speed --methods adan,galore

Calling again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowmem
from lowmem.errors import UserError, nearest
from lowmem.report.speed import FUSED, markdown

bench = importlib.import_module("lowmem.recipes.benchmark")
others = importlib.import_module("lowmem.recipes.peers")
GAP, NEVER = others.GAP, others.NEVER

_SUMS = "goes by sums over the tensor: passes over the gradient, or the momentum, before the step"
_ROOM = "two products for each matrix and a step inside"
_HOST = "Python takes a tenth of a millisecond for each tensor; fused kernels take a list of them"
_GRAM = "iterates on the Gram matrix in fp32; the packages multiply in bf16, as products=bf16 does here"
_TURNS = "its basis moves in every step: QR and products of its own"
_REASONS = {
    _HOST: ("adamw", "amsgrad", "sgd"),
    _SUMS: (
        "adam_cm", "adam_mini", "adamp", "auon", "came", "dog", "fadam", "ldog", "mars", "novograd",
        "sgd_sai", "sm3", "smmf", "stable_spam", "subset_norm", "tam",
    ),
    _ROOM: ("dct", "galore", "golore", "grass_walk", "grass_jump", "lotus", "subspace_momentum", "subtrack"),
    _GRAM: ("ada_muon", "muon", "muon_8bit", "swan"),
    _TURNS: ("dion", "ldadam", "mlorc", "online_subspace"),
    "a product for each matrix, with a basis that is drawn anew in every step; the package holds it": (
        "apollo", "apollo_mini",
    ),
    f"{_ROOM}, and the rest is measured before it is written: the second product is made twice": ("fira",),
    f"{_ROOM}; the basis of 4 bits is decoded in every step": ("q_galore",),
    f"{_ROOM}, of which one is made orthogonal": ("sumo",),
    "moments of 4 bits are looked up, and the nearest codes found among sixteen": ("adamw_4bit",),
    "four-bit codes beside maxima of rows and columns are found in several eager passes": (
        "adamw_4bit_rank1",
    ),
    "the largest elements of every block are looked for, in a sum with the decoded error": ("microadam",),
    "the elements of its mask are looked up in each block, of the gradient and of the weight": ("fish_mask",),
}  # fmt: skip
WHY = {method: reason for reason, methods in _REASONS.items() for method in methods}
"""Why a method is slower than six times torch's fused AdamW, or than a peer."""


def measured(method: str, params: list[nn.Parameter], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """The row of a method: a contest, and where it has a gap another of steps that refresh each time.

    Returns:
        {"method", "milliseconds": by name, "refresh": {"gap", "milliseconds"} or None, "missing": by name}.

    Raises:
        UserError: it does not step by itself.
    """
    gap, grads = dict(lowmem.create(method).options).get(GAP, 1), [p.grad for p in params]
    steps: dict[str, Any] = {FUSED: torch.optim.AdamW(params, lr=1e-4, fused=True).step}
    missing: dict[str, str] = {}
    try:
        with _aside():
            steps["lowmem"] = _ours(method, params, **({GAP: NEVER} if gap > 1 else {}))
            for peer in others.peers(bench.RANK).get(method, ()):
                _join(steps, missing, peer, params)
            steps = {name: _given(step, params, grads) for name, step in steps.items()}
            times = bench.measure(steps, rounds, device)
            often = {"often": _ours(method, params, **{GAP: 1})} if gap > 1 else {}
            refresh = bench.measure(often, max(2, rounds // 3), device)
    except (UserError, RuntimeError) as error:
        raise UserError(str(error)) from error
    finally:
        _give(params, grads)
    return {
        "method": method,
        "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
        "refresh": {"gap": gap, "milliseconds": 1e3 * refresh["often"]} if often else None,
        "missing": missing,
    }


def _ours(method: str, params: list[nn.Parameter], **options: Any) -> Callable[[], object]:
    step: Callable[[], object] = bench.ours(method, params[:-1], params[-1], **options)
    return step


def _given(
    step: Callable[[], object], params: Sequence[nn.Parameter], grads: Sequence[Any]
) -> Callable[[], object]:
    """A step that finds all gradients: some methods free those that they do not need."""

    def run() -> None:
        _give(params, grads)
        step()

    return run


def _give(params: Sequence[nn.Parameter], grads: Sequence[Any]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def _join(steps: dict[str, Any], missing: dict[str, str], peer: Any, params: Sequence[nn.Parameter]) -> None:
    """Let a peer take part, if it runs; it may fail in any way."""
    try:
        steps[peer.full] = peer.step(params)
    except Exception as error:
        missing[peer.full] = f"{type(error).__name__}: {error}".partition("\n")[0]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """What packages print and warn of is not told."""
    nothing = io.StringIO()
    with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def speed(
    folder: Path,
    *,
    methods: Sequence[str] = (),
    rounds: int = 5,
    device: str = "cpu",
    layers: int = bench.LAYERS,
) -> dict[str, Any]:
    """Measure what is not there yet, and put the document together.

    Args:
        folder: of the results; methods: all that train by gradients, if empty; rounds: of each contest.
        device: cpu or cuda; layers: of the Llama whose weights are stepped.

    Raises:
        UserError: there is no such method.
    """
    every = [name for name in lowmem.available() if lowmem.create(name).source.needs_autograd]
    for name in methods:
        if name not in every:
            raise UserError(f"methods: no {name!r} that trains by gradients; {nearest(name, every)}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "speed.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    shapes = [*bench.MATRICES * layers, (bench.VOCABULARY, bench.WIDTH)]
    params = bench.weights(shapes, device)
    found |= {"machine": _machine(device), "parameters": sum(m * n for m, n in shapes), "why": WHY}
    done = {row["method"] for row in found["rows"]} | set(found.get("left_out", {}))
    for name in methods or [name for name in every if name not in done]:
        print(name, file=sys.stderr, flush=True)
        try:
            row = measured(name, params, rounds, device)
        except UserError as error:
            found.setdefault("left_out", {})[name] = str(error)
        else:
            row["load"] = os.getloadavg()[0]
            found["rows"] = [*(one for one in found["rows"] if one["method"] != name), row]
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _machine(device: str) -> dict[str, str]:
    about: dict[str, str] = importlib.import_module("lowmem.recipes.quality").machine()
    if device == "cuda":
        return about | {"device": torch.cuda.get_device_name()}
    return about | {"device": f"CPU, {torch.get_num_threads()} threads"}


def main() -> None:
    """Read the flags, run, and print the page; or make the page of a document alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, help="folder of the results")
    parser.add_argument("--methods", default="", help="names, with commas; all when not given")
    parser.add_argument("--rounds", type=int, default=5, help="of each contest")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--page", type=Path, help="write the page of a document: of --of")
    parser.add_argument("--of", type=Path, help="speed.json of an earlier call")
    given = parser.parse_args()
    if given.page and given.of:
        given.page.write_text(markdown(json.loads(given.of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if given.output_dir is None:
        parser.error("name a folder for the results: --output-dir; or --page and --of")
    methods = [name for name in given.methods.split(",") if name]
    try:
        found = speed(given.output_dir, methods=methods, rounds=given.rounds, device=given.device)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
