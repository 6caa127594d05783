"""Hand-made plan, profile and comparison documents, ordinary and extreme."""

from __future__ import annotations

import random
from typing import Any

CATEGORIES = ("weights", "gradients", "optimizer_state", "activations", "logits", "workspace")
LONG = "a_strategy_whose_name_is_much_longer_than_any_sensible_person_would_choose"


def plan_entry(
    name: str, scale: float = 1.0, budget: int | None = None, seed: int = 0, **options: Any
) -> dict[str, Any]:
    draw = random.Random(f"{name}{seed}")
    weights = int(12.6 * 2**30 * scale)
    parts = (
        weights,
        int(weights * draw.random()),
        int(2 * weights * draw.random()),
        int(0.3 * weights * draw.random()),
    )
    at_peak = dict(zip(CATEGORIES, (*parts, int(0.05 * weights), int(0.01 * weights)), strict=True))
    allocated = sum(at_peak.values())
    device = int(allocated * 1.04) + int(400 * 2**20 * scale)
    entry = {
        "strategy": name,
        "options": options,
        "state_bytes": at_peak["optimizer_state"],
        "at_peak": at_peak,
        "peak": {"allocated": allocated, "reserved": int(allocated * 1.03), "device": device},
        "event": "loss_backward",
        "events": {
            "loss": allocated // 2,
            "loss_backward": allocated,
            "embedding_backward": int(allocated * 0.9),
        },
        "certainty": {
            "weights": "exact",
            "optimizer_state": "exact",
            "workspace": "bound",
            "activations": "estimate",
        },
        "fits": None if budget is None else device <= budget,
        "headroom_bytes": None if budget is None else budget - device,
        "why": [
            "The loss backward binds: logits are held three times.",
            "Gradient checkpointing gains nothing here.",
        ],
        "levers": [
            {"lever": "chunked loss", "saves": allocated // 20},
            {"lever": "gradient checkpointing", "saves": 0},
        ],
        "max_seq_len": 4096 if name != "mezo" else None,
        "max_batch_size": 4,
        "command": f"lowmem finetune --model llama-7b --optim {name} --output-dir run",
    }
    return entry | {"timeline": timeline(entry)}


def timeline(entry: dict[str, Any], count: int = 240, wobble: float = 0.0) -> dict[str, Any]:
    names = ("forward", "loss", "loss_backward", "backward", "optimizer_step")
    bounds = [0, int(0.35 * count), int(0.4 * count), int(0.45 * count), int(0.9 * count), count - 1]
    rows: dict[str, list[int]] = {key: [] for key in CATEGORIES}
    for i in range(count):
        t = i / count
        rise = min(1.0, t / 0.42) if t < 0.42 else max(0.0, (0.9 - t) / 0.48)
        shape = {
            "activations": rise,
            "gradients": max(0.0, min(1.0, (t - 0.42) / 0.4)),
            "logits": float(0.36 < t < 0.45),
        }
        shape["workspace"] = float(t > 0.9)
        for key in CATEGORIES:
            rows[key].append(int(entry["at_peak"][key] * shape.get(key, 1.0) * (1 + wobble * (i % 3 - 1))))
    phases = [
        {"name": n, "start": a, "stop": b} for n, a, b in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]
    return {"bytes": rows, "phases": phases, "events": [{"name": "loss_backward", "at": bounds[2]}]}


def plan_document(
    names: list[str], scale: float = 1.0, budget: int | None = int(23.5 * 2**30), model: str = "llama-7b"
) -> dict[str, Any]:
    plans = [plan_entry(name, scale, budget, i) for i, name in enumerate(names)]
    plans.sort(key=lambda p: p["peak"]["allocated"])
    peak = int(50.22 * 2**30 * scale)
    levers = [
        "plain AdamW",
        "fused step",
        "gradient checkpointing",
        "gradient release",
        "8-bit states",
        "chunked loss",
    ]
    waterfall = [
        {"lever": n, "peak": int(peak * f), "event": "embedding_backward"}
        for n, f in zip(levers, (1.25, 1, 1, 0.78, 0.5, 0.45), strict=True)
    ]
    lengths, batches = [256, 512, 1024, 2048, 4096, 8192], [1, 2, 4, 8, 16]
    grids = []
    for p in plans[:3]:
        base = p["peak"]["allocated"]
        peaks = [[int(base * (0.4 + 0.6 * b * n / 4096)) for b in batches] for n in lengths]
        grids.append({"strategy": p["strategy"], "seq_lens": lengths, "batch_sizes": batches, "peak": peaks})
    return {
        "model": {"name": model, "parameters": 6738415616, "trainable": 6738415616},
        "run": {
            "batch_size": 1,
            "seq_len": 2048,
            "dtype": "bfloat16",
            "checkpointing": False,
            "release": False,
            "attention": "flash",
        },
        "budget_bytes": budget,
        "plans": plans,
        "waterfall": waterfall,
        "grid": grids,
        "assumptions": [
            "torch 2.13.0, transformers 5.23.0, flash attention, unpadded batches.",
            "24 GB is read as 24e9 bytes.",
        ],
        "warnings": [],
        "gpu": {"name": "rtx4090"},
        "command": f"lowmem plan --model {model} --optim all --seq-len 2048 --gpu rtx4090",
    }


def profile_document(name: str = "galore", scale: float = 0.02, error: float = 0.004) -> dict[str, Any]:
    predicted = plan_entry(name, scale)
    measured = plan_entry(name, scale)
    measured["at_peak"]["activations"] = int(measured["at_peak"]["activations"] * (1 - error))
    measured["peak"] = {"allocated": sum(measured["at_peak"].values()), "reserved": None, "device": None}
    measured["timeline"] = timeline(measured, 300, 0.01)
    kinds = [
        "model.embed_tokens",
        "model.layers.*.mlp.gate_proj",
        "model.layers.*.self_attn.q_proj",
        "lm_head",
    ]
    measured["modules"] = [
        {"kind": k, "bytes": {c: v // 4 for c, v in measured["at_peak"].items()}} for k in kinds
    ]
    measured["beside"] = {"resident_peak": int(measured["peak"]["allocated"] * 1.1), "unattributed": None}
    from lowmem.report.profile import errors

    return {
        "kind": "profile",
        "model": {"name": "smollm2-135m", "parameters": 134515008, "trainable": 134515008},
        "run": {"batch_size": 2, "seq_len": 256, "dtype": "bfloat16"},
        "budget_bytes": None,
        "predicted": predicted,
        "measured": measured,
        "error_percent": errors(predicted, measured),
        "steps": [
            {
                "step": i,
                "allocated": None,
                "peak": None,
                "reserved": None,
                "resident": 2**30 + (i % 7) * 2**22,
            }
            for i in range(1, 61)
        ],
        "command": "lowmem profile --model smollm2-135m --optim galore --steps 3",
    }


def run_document(name: str = "galore", measured: bool = True) -> dict[str, Any]:
    """A finished fine-tuning run, as `memory_report.json` holds it."""
    text = "<|user|>\nHow much is <b>3 + 3</b>?<|end|>\n<|assistant|>\nSix.<|end|>\n"
    start = text.index("Six.")
    losses = [{"step": i, "loss": 3.0 - i / 30 + (i % 5) / 9} for i in range(1, 31)]
    result = {
        "model": "smollm2-135m",
        "strategy": name,
        "steps": 30,
        "data": {"train": "rows.jsonl (train): 40 rows", "held_out": "rows.jsonl (train): 8 rows"},
        "loss": {"before": 2.9, "after": 1.9},
        "held_out": {"before": {"loss": 2.9}, "after": {"loss": 1.9}},
        "general": {"before": 3.1, "after": 3.25},
        "benchmarks": {"before": {"sums acc": 0.25}, "after": {"sums acc": 0.5}},
        "state_bytes": 467 << 20,
        "adamw_state_bytes": {"fp32": 1026 << 20, "bf16": 513 << 20},
        "peak_bytes": None,
        "nonfinite_weights": [],
        "samples": [{"prompt": "How much is 3 + 3?", "before": "A number.", "after": "Six."}],
    }
    return {
        **(profile_document(name) if measured else {}),
        "result": result,
        "log": [*losses, {"step": 15, "eval_loss": 2.2}],
        "example": {"text": text, "spans": [[start, start + 4]], "tokens": 22, "trained": 1},
        "settings": {"model": "smollm2-135m", "optim": name, "lr": 1e-4, "prompt": []},
        "command": f"lowmem finetune --model smollm2-135m --optim {name} --steps 30",
    }


def compare_document(names: list[str], scale: float = 0.02, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    runs = []
    for i, name in enumerate(names):
        entry = plan_entry(name, scale, seed=i)
        draw = random.Random(i)
        final = 0.75 + 0.5 * draw.random()
        curve = [
            {"step": s, "tokens": 512 * s, "loss": final + (1.94 - final) * (1 - s / 60) ** 2}
            for s in range(0, 61, 10)
        ]
        done = {"status": "done", "reason": None, "loss_before": 1.94, "loss_after": final, "curve": curve,
                "seconds_per_step": 0.05 + draw.random(), "predicted": entry, "measured": entry,
                "error_percent": {"peak_allocated": 0.1 * draw.random()}}  # fmt: skip
        lost = {
            "status": "failed",
            "reason": "needs a 2-D weight, got (768,) for 'norm.weight'; give it role 'other'",
        }
        runs.append({"strategy": name, "options": {}, **(lost if name in failed else done)})
    return {
        "kind": "compare",
        "model": {"name": "smollm2-135m", "parameters": 134515008, "trainable": 134515008},
        "run": {"steps": 60, "batch_size": 2, "seq_len": 256, "seeds": [0]},
        "runs": runs,
        "assumptions": [
            "Same model, data, seeds and number of steps for every strategy; each at the same learning rate."
        ],
        "command": "lowmem compare --model smollm2-135m --optim adamw,galore --steps 60",
    }
