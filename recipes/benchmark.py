"""Measure optimizer steps side by side, in one process, and print ratios.

Run it alone on the machine:

    python -m lowmem.recipes.benchmark                 # this machine's CPU
    python -m lowmem.recipes.benchmark --device cuda   # a GPU

Times of one machine mean little on another; ratios travel. Every round runs
every contestant once, in turn, so a machine that slows down slows all of them;
the median over the rounds is kept. All step the same weights with the same
gradients, for on a CPU it matters where in memory these lie. Peers that are not
installed are left out.
The set of weights is a Llama's: 8 layers of width 512 and an embedding, 42M.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowmem
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.dense import power_iteration
from lowmem.optim.terms.hyper import Hyper

WIDTH, FFN, LAYERS, VOCABULARY, RANK = 512, 1376, 8, 32000, 128
MATRICES = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH)] * 2 + [(WIDTH, FFN)]

Step = Callable[[], object]


@dataclass(frozen=True)
class Claim:
    """A ratio of two contestants, and what it should be."""

    name: str
    over: str
    limit: float
    at_least: bool = False

    def text(self, times: Mapping[str, float]) -> str | None:
        """One line, or None where a contestant is missing."""
        if self.name not in times or self.over not in times:
            return None
        ratio = times[self.name] / times[self.over]
        if self.at_least:
            ratio = 1.0 / ratio
        good = ratio >= self.limit if self.at_least else ratio <= self.limit
        word = "faster than" if self.at_least else "times"
        bound = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        return f"{'ok  ' if good else 'MISS'}  {self.name}: {ratio:.2f} {word} {self.over} (wanted {bound})"


CLAIMS = [
    Claim("lowmem adamw_8bit companded8", "torch AdamW fused", 3.0),
    Claim("lowmem adamw_8bit int8", "bitsandbytes AdamW8bit", 6.0, at_least=True),
    Claim("lowmem adamw_8bit int8", "torchao AdamW8bit", 6.0, at_least=True),
    Claim("lowmem galore, matrices", "two products", 1.25),
    Claim("lowmem galore, matrices", "galore-torch, matrices", 1.0, at_least=True),
    Claim("power iteration refresh", "SVD refresh", 0.1),
    Claim("lowmem adafactor", "transformers Adafactor", 2.0, at_least=True),
    Claim("forward and backward, int8 weights", "forward and backward, bf16 weights", 1.25),
    Claim("mezo", "two values of the loss", 1.2),
    Claim("mezo", "mezo in place", 1.0, at_least=True),
]


def weights(shapes: list[tuple[int, int]], device: str) -> list[nn.Parameter]:
    """Parameters with gradients whose spectrum falls off like that of real ones."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for m, n in shapes:
        p = nn.Parameter(torch.randn(m, n, generator=generator).mul_(0.02).to(device))
        rank = min(m, n)
        decay = torch.arange(1, rank + 1).pow(-1.0)
        left = torch.randn(m, rank, generator=generator)
        p.grad = ((left * decay) @ torch.randn(rank, n, generator=generator)).mul_(1e-3).to(device)
        made.append(p)
    return made


def ours(
    name: str, matrices: list[nn.Parameter], embedding: nn.Parameter | None = None, **options: Any
) -> Step:
    """The step of one of our strategies; the embedding is "other"."""
    groups: list[dict[str, Any]] = [{"params": [(f"{i}", p) for i, p in enumerate(matrices)]}]
    if embedding is not None:
        groups.append({"params": [("embedding", embedding)], "role": "other"})
    strategy = lowmem.create(name, **options)
    step: Step = lowmem.LowMemOptimizer(groups, strategy, lr=1e-4, compile="on").step
    return step


def peers(params: list[nn.Parameter], matrices: list[nn.Parameter]) -> dict[str, Step]:
    """Steps of other libraries, as far as they are installed."""
    found: dict[str, Step] = {"torch AdamW fused": torch.optim.AdamW(params, lr=1e-4, fused=True).step}
    makers: dict[str, Callable[[], Step]] = {
        "bitsandbytes AdamW8bit": lambda: _bitsandbytes(params),
        "torchao AdamW8bit": lambda: _torchao(params),
        "transformers Adafactor": lambda: _transformers(params),
        "galore-torch, matrices": lambda: _galore_torch(matrices),
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return found


def _bitsandbytes(params: list[nn.Parameter]) -> Step:
    from bitsandbytes.optim import AdamW8bit

    step: Step = AdamW8bit(params, lr=1e-4).step
    return step


def _torchao(params: list[nn.Parameter]) -> Step:
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found,import-untyped,unused-ignore]

    step: Step = AdamW8bit(params, lr=1e-4).step
    return step


def _transformers(params: list[nn.Parameter]) -> Step:
    from transformers.optimization import Adafactor

    options = {"scale_parameter": False, "relative_step": False}
    step: Step = Adafactor(params, lr=1e-4, **options).step  # type: ignore[no-untyped-call]
    return step


def _galore_torch(params: list[nn.Parameter]) -> Step:
    from galore_torch import GaLoreAdamW  # type: ignore[import-not-found,import-untyped,unused-ignore]

    group = {"params": params, "rank": RANK, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
    step: Step = GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True).step
    return step


def products(params: list[nn.Parameter]) -> Step:
    """The two products that a subspace step cannot avoid, the second fused into the weight."""
    frame = Frame(RANK)
    sizes = [frame.size((p.shape[0], p.shape[1])) for p in params]
    bases = [
        torch.linalg.qr(torch.randn(*size, device=p.device))[0] for size, p in zip(sizes, params, strict=True)
    ]

    def run() -> None:
        for p, basis in zip(params, bases, strict=True):
            g, w = p.grad, p.detach()
            assert g is not None
            if frame.left((p.shape[0], p.shape[1])):
                w.addmm_(basis, basis.t() @ g, alpha=-1e-6)
            else:
                w.addmm_(g @ basis, basis.t(), alpha=-1e-6)

    return run


def refreshes(params: list[nn.Parameter]) -> tuple[dict[str, Step], Callable[[], float]]:
    """A warm refresh by power iteration, an SVD, and the share of the SVD's energy that is captured."""
    from lowmem.optim.blocks import Dense

    grads = [p.grad for p in params if p.grad is not None]
    frame = Frame(RANK)
    bases = [torch.eye(*frame.size((g.shape[0], g.shape[1])), device=g.device) for g in grads]

    def hyper(i: int, step: int) -> Hyper:
        nothing: Any = None
        return Hyper(step, str(i), 0, 0.0, (0.9, 0.999), 1e-8, 0.0, Dense(grads[i]), nothing)

    def find(step: int) -> None:
        for i, g in enumerate(grads):
            bases[i] = power_iteration(frame, bases[i], Dense(g), hyper(i, step))[0]

    def energy() -> float:
        find(0)  # cold: what the very first refresh captures
        shares = [_captured(g, basis, frame) for g, basis in zip(grads, bases, strict=True)]
        return min(shares)

    steps: dict[str, Step] = {
        "power iteration refresh": lambda: find(1),
        "SVD refresh": lambda: [torch.linalg.svd(g, full_matrices=False) for g in grads],
    }
    return steps, energy


def _captured(g: Tensor, basis: Tensor, frame: Frame) -> float:
    low = basis.t() @ g if frame.left((g.shape[0], g.shape[1])) else g @ basis
    best = torch.linalg.svdvals(g)[: basis.shape[1]].square().sum()
    return float(low.square().sum() / best)


def measure(contestants: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each contestant over rounds in which each runs once, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name, step in contestants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(time.perf_counter() - begin)
            elif i == 0:
                print(f"first step of {name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def benchmark(device: str = "cpu", rounds: int = 15, quick: bool = False) -> dict[str, Any]:
    """Run every contestant and check the claims.

    Args:
        device: cpu or cuda; rounds: of the fast contestants (the slow ones take a third).
        quick: two layers instead of eight.
    """
    shapes = [*MATRICES * (2 if quick else LAYERS), (VOCABULARY // (8 if quick else 1), WIDTH)]
    params = weights(shapes, device)
    matrices, embedding = params[:-1], params[-1]
    fast: dict[str, Step] = {
        "lowmem adamw": ours("adamw", matrices, embedding),
        "lowmem adamw_8bit companded8": ours("adamw_8bit", matrices, embedding, states="companded8"),
        "lowmem adamw_8bit int8": ours("adamw_8bit", matrices, embedding, states="int8"),
        "lowmem galore": ours("galore", matrices, embedding, rank=RANK, update_proj_gap=10**6),
        "lowmem galore, matrices": ours("galore", matrices, rank=RANK, update_proj_gap=10**6),
        "two products": products(matrices),
    }
    for name in ("adafactor", "frugal", "microadam"):
        if name in lowmem.available():
            fast[f"lowmem {name}"] = ours(name, matrices, embedding)
    fast |= peers(params, matrices)
    slow, energy = refreshes(matrices)
    times = measure(fast, rounds, device) | measure(slow, max(1, rounds // 5), device)
    whole = importlib.import_module("lowmem.recipes.passes")
    for some in (whole.both_ways, whole.by_values):
        times |= measure(some(device, 2 if quick else LAYERS), max(3, rounds // 2), device)
    load = os.getloadavg()[0]
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": load,
        "alone": load < torch.get_num_threads() + 0.5,
        "torch": torch.__version__,
        "parameters": sum(m * n for m, n in shapes),
        "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
        "captured_energy": energy(),
        "claims": [text for claim in CLAIMS if (text := claim.text(times))],
    }


def report(found: Mapping[str, Any]) -> str:
    """The result as text."""
    base = found["milliseconds"]["torch AdamW fused"]
    lines = [
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}, "
        f"{found['parameters'] / 1e6:.1f}M parameters"
    ]
    if not found["alone"]:
        lines.append(f"NOT ALONE on the machine (load {found['load']:.1f}): do not quote these figures")
    lines += [f"{name:35s} {ms:9.1f} ms  {ms / base:7.2f} x" for name, ms in found["milliseconds"].items()]
    lines += ["(x: over torch's fused AdamW)", *found["claims"]]
    lines.append(
        f"first refresh captures {100 * found['captured_energy']:.2f} % of the SVD's energy, at worst"
    )
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a fifth of the weights")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    found = benchmark(args.device, args.rounds, args.quick)
    print(json.dumps(found, indent=2) if args.json else report(found))


if __name__ == "__main__":
    main()
