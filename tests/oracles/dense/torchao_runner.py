"""Run torchao's 8-bit and 4-bit AdamW eagerly and store what it did: `python torchao_runner.py OUT`.

A process of its own, because its eager path needs TORCHDYNAMO_DISABLE=1 before torch is imported.
The inputs are drawn here and stored with the results, so that nobody has to draw them again.
"""

from __future__ import annotations

import sys

import torch

SHAPES = ((64, 64), (128, 96), (8192,))
STEPS = 12
HYPER = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def record(
    bits: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    from torchao import optim

    g = torch.Generator().manual_seed(7)
    w = torch.nn.Parameter((0.02 * torch.randn(shape, generator=g)).to(dtype))
    start, optimizer = w.detach().clone(), getattr(optim, f"AdamW{bits}bit")([w], **HYPER)
    gradients = [torch.randn(shape, generator=g).to(dtype) * 10 ** float(-i % 4) for i in range(STEPS)]
    weights = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        weights.append(w.detach().clone())
    state = optimizer.state[w]
    parts = {
        f"{key}.{part}": getattr(state[name], part).clone()
        for key, name in (("m", "exp_avg"), ("v", "exp_avg_sq"))
        for part in ("codes", "scale")
    }
    return {"start": start, "gradients": gradients, "weights": weights, **parts}


def main(out: str) -> None:
    from torchao.optim.quant_utils import create_dynamic_map

    torch.set_num_threads(1)
    runs, runs_4bit = (
        {
            f"{str(dtype).removeprefix('torch.')} {shape}": record(bits, dtype, shape)
            for dtype in (torch.float32, torch.bfloat16)
            for shape in SHAPES
        }
        for bits in (8, 4)
    )
    maps = {str(signed): torch.tensor(create_dynamic_map(signed, 7, 8)) for signed in (True, False)}
    torch.save({"runs": runs, "runs_4bit": runs_4bit, "maps": maps, "hyper": HYPER}, out)


if __name__ == "__main__":
    main(sys.argv[1])
