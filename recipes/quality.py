"""What methods learn and forget: held-out loss of each at its settings, over seeds, from two beginnings.

    demo      SmolLM2-135M fine-tuned on the demo data; forgetting is the loss on general text
    scratch   a Llama of 9.7M parameters from random weights on the reference of Python (`comparing.reading`)

    methods x weights -> lr by the validation split, seed 0 -> a run for each seed, judged on held-out rows
                      -> FOLDER/runs/*.json -> FOLDER/quality.json, a page

All runs of a beginning have the same rows, the same number of steps and a process of their own, that of
`lowmem finetune`. What is done is kept: calling again goes on where it stopped. A variant in int8 weights has
the lr that bf16 weights chose.

    python -m lowmem.recipes.quality --output-dir quality --methods adamw,galore --seeds 0,1,2

Copy it (`lowmem cp quality my.py`) and change the settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig, build
from lowmem.errors import UserError
from lowmem.report.quality import REASONS, markdown
from lowmem.training.comparing.once import once
from lowmem.training.comparing.rates import least, on_grid
from lowmem.training.comparing.reading import small_model, texts

SHARED: dict[str, Any] = {
    "dtype": "bfloat16", "schedule": "linear", "threads": 1, "report": False, "save_steps": 10**6,
    "save_total_limit": 1, "logging_steps": 1,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "demo": {
        "model": "smollm2-135m", "seq_len": 256, "batch_size": 1, "steps": 16, "warmup": 2,
        "eval_rows": 40,
    },
    "scratch": {"seq_len": 256, "batch_size": 2, "steps": 60, "warmup": 5, "eval_rows": 1000},
}  # fmt: skip
"""The steps are few, so that a row takes minutes of one core; `--steps` takes more."""


@dataclass(frozen=True)
class Row:
    """A method as it is compared: as `lowmem finetune` takes it, and the first rate that is tried."""

    optim: str
    lr: float
    options: str = ""
    others: tuple[tuple[str, Any], ...] = ()


PURPOSES = {"demo": "fine-tuning", "scratch": "pre-training"}
USUAL = {"demo": 1e-4, "scratch": 1e-3}
"""The first rate of a method that recommends none."""
MOST = 6
"""Rates that are tried of a method."""
METHODS = {
    "adamw": {"demo": Row("adamw", 1e-4), "scratch": Row("adamw", 1e-3)},
    "galore": {"demo": Row("galore", 5e-4), "scratch": Row("galore", 5e-3)},
    "galore_roles": {"demo": Row("galore", 5e-4, "states=int8,embedding=adafactor")},
    "q_galore": {"demo": Row("q_galore", 5e-4), "scratch": Row("q_galore", 5e-3)},
    "q_galore_roles": {"demo": Row("q_galore", 5e-4, "embedding=adafactor")},
    **{
        name: {"demo": Row(name, demo), "scratch": Row(name, scratch)}
        for name, demo, scratch in (
            ("ada_lomo", 1e-3, 1e-2), ("auon", 1e-3, 1e-2), ("dion", 1e-3, 1e-2), ("lion", 3e-5, 3e-4),
            ("lomo", 0.1, 1.0), ("muon", 1e-3, 1e-2), ("muon_8bit", 1e-3, 1e-2), ("ada_muon", 1e-4, 1e-3),
            ("scale", 1e-3, 1e-2), ("sgd", 0.1, 1.0), ("signsgd", 3e-5, 3e-4), ("sinkgd", 1e-3, 1e-2),
            ("sumo", 1e-3, 1e-2), ("swan", 1e-3, 1e-2), ("momo_adam", 1e-3, 1e-2), ("momo", 1.0, 1.0),
            ("sgd_sai", 1e-3, 1e-2), ("apollo", 1e-3, 1e-2), ("apollo_mini", 1e-3, 1e-2), ("tam", 0.1, 1.0),
            ("gravity", 0.1, 1.0), ("subset_norm", 1e-3, 1e-2), ("subspace_momentum", 1e-3, 1e-2),
            ("novograd", 1e-3, 1e-2), ("sm3", 1e-3, 1e-2), ("lamb", 1e-3, 1e-3),
        )
    },
}  # fmt: skip
"""Settings of this recipe; any other method has those that its record recommends."""


def row(setting: str, method: str) -> Row:
    """A method as it is compared in a setting.

    Raises:
        UserError: there is no such method.
    """
    from lowmem.strategies.registry import entry

    if found := METHODS.get(method, {}).get(setting):
        return found
    advice = [advice for advice in entry(method).recommended if advice.purpose == PURPOSES[setting]]
    values = dict(advice[0].values) if advice else {}
    lr = on_grid(values.pop("lr", USUAL[setting]))
    others = tuple((name, values.pop(name)) for name in ("betas", "eps", "weight_decay") if name in values)
    options = ",".join(f"{key}={str(value).lower()}" for key, value in values.items())
    return Row(method, lr, options, others)


VARIANTS: dict[str, dict[str, str]] = {
    "bf16": {},
    "int8": {"weights": "int8"},
    "int8 eco": {"weights": "int8", "writer": "eco"},
    "int8 nearest": {"weights": "int8", "writer": "nearest"},
}
"""How the weights are held, and what rounds their steps."""


@dataclass(frozen=True)
class Case:
    """One run: of which beginning, method, variant and seed, at which rate, judged on which split."""

    setting: str
    method: str
    variant: str
    lr: float
    seed: int
    split: str = "heldout"

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join((*self.words, f"{self.lr:g}", f"seed{self.seed}"))

    @property
    def words(self) -> tuple[str, ...]:
        """What it is, without rate and seed."""
        of = () if self.split == "heldout" else (self.split,)
        return (self.setting, self.method, self.variant.replace(" ", "-"), *of)


@dataclass(frozen=True)
class Quality:
    """Where runs go and what they share.

    Args:
        folder: of the results; an earlier one is continued.
        steps: of every run, instead of the setting's; jobs: runs at a time.
        forgetting: measure the loss on general text too, where the model knows any.
    """

    folder: Path
    steps: int | None = None
    jobs: int = 1
    forgetting: bool = False

    def measure(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The results of runs, those that are there already among them."""
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        configs = [self.config(case) for case in cases]  # one after the other: they make text and model
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self._one, cases, configs))

    def _one(self, case: Case, config: RunConfig) -> dict[str, Any]:
        about = {"setting": case.setting, "method": case.method, "variant": case.variant, "split": case.split}
        made = row(case.setting, case.method)
        hyper = ", ".join(f"{key}={value}" for key, value in made.others)
        told = {"optim": made.optim, "options": made.options, "hyper": hyper}
        of = {**about, **told, "lr": case.lr, "seed": case.seed}
        found: dict[str, Any] = once(
            config, self.folder / "runs", lambda result, _: {**of, **_kept(result)}, tidy=True
        )
        return found

    def config(self, case: Case) -> RunConfig:
        """The run as `lowmem finetune` takes it."""
        held = dict(VARIANTS[case.variant])
        writer, of = held.pop("writer", ""), row(case.setting, case.method)
        options = [text for text in (of.options, f"writer={writer}" if writer else "") if text]
        values = {
            **SHARED, **SETTINGS[case.setting], **held, **_places(case, self.folder),
            **dict(of.others), "optim": of.optim, "optim_args": ",".join(options),
            "lr": case.lr, "seed": case.seed, "output_dir": str(self.folder / "runs" / case.name),
        }  # fmt: skip
        if self.forgetting and case.setting == "demo" and case.split == "heldout":
            values["forgetting"] = True
        return build({**values, "steps": self.steps} if self.steps else values)

    def rate(self, setting: str, method: str) -> float:
        """The learning rate of the least validation loss: up or down from the first, until the next is worse.

        Raises:
            UserError: no run of those tried has a finite loss.
        """
        first = row(setting, method).lr

        def loss(lr: float) -> float:
            return self._validated(Case(setting, method, "bf16", lr, 0, "validation"))

        found = least(first, loss, MOST)
        if found is None:
            raise UserError(f"{method}: no run from lr {first:g} on ended; see {self.folder / 'runs'}")
        return found

    def _validated(self, case: Case) -> float:
        """The loss of a run; infinite where it broke off, or only rose, as at too high a rate."""
        try:
            held = self.measure([case])[0]["held_out"]
        except UserError:
            return math.inf
        return float(held["after"]) if held["after"] < held["before"] else math.inf


def _places(case: Case, folder: Path) -> dict[str, Any]:
    """Where model and rows of a run are."""
    if case.setting == "demo":
        from importlib import resources

        place = resources.files("lowmem.configs") / "data" / "factbook"
        return {"data": str(place / "train.jsonl"), "eval_data": str(place / f"{case.split}.jsonl")}
    text = texts(folder / "text")
    return {
        "model": str(small_model(folder / "llama", text)),
        "data": str(text / "train.jsonl"), "eval_data": str(text / f"{case.split}.jsonl"),
    }  # fmt: skip


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run goes into its JSON."""
    held, general = result["held_out"], result["general"]
    return {
        **{key: result[key] for key in ("steps", "seconds", "state_bytes", "peak_bytes")},
        "held_out": {when: held[when]["loss"] for when in ("before", "after")},
        "general": general if general["after"] is not None else None,
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """What a figure belongs to."""
    import datetime
    import os
    import platform
    from importlib.metadata import version

    import torch

    versions = {name: version(name) for name in ("torch", "transformers")}
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    device = f"CPU, {os.cpu_count()} cores, 1 thread a run, {kind}"
    return {
        "device": device,
        "date": str(datetime.date.today()),
        "python": platform.python_version(),
        **versions,
    }


def quality(
    folder: Path,
    *,
    settings: Sequence[str] = ("demo",),
    methods: Sequence[str] = ("adamw", "galore", "q_galore"),
    variants: Sequence[str] = ("bf16",),
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    jobs: int = 1,
    forgetting: bool = False,
) -> dict[str, Any]:
    """Choose rates, run what is left to run, and put the table together.

    Args:
        folder: of the results; settings, variants: names of what stands above.
        methods: those above, or any of `lowmem strategies` with what its record recommends.
        seeds: each runs once with each; steps, jobs and forgetting: as in `Quality`.

    Returns:
        {"runs": [{"setting", "method", "variant", "split", "lr", "seed", "held_out", ...}], all of a folder,
        "reasons": of methods that learn less}.

    Raises:
        UserError: a name that there is not, or a run that fails.
    """
    for given, known in ((settings, SETTINGS), (variants, VARIANTS)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"there is no {unknown[0]!r}; choose from {', '.join(known)}")
    for setting, method in itertools.product(settings, methods):
        row(setting, method)  # an unknown name is told before the first run
    asked = Quality(folder, steps, jobs, forgetting)
    every = list(itertools.product(settings, methods))
    for setting, method in every[:: len(methods)]:
        asked.config(Case(setting, method, "bf16", 1.0, 0))  # which makes text and model once
    with ThreadPoolExecutor(jobs) as pool:
        rates = dict(zip(every, pool.map(lambda one: asked.rate(*one), every), strict=True))
    asked.measure([Case(s, m, v, rates[s, m], seed) for seed in seeds for s, m in rates for v in variants])
    found = {"runs": list(kept(folder / "runs")), "reasons": REASONS}
    (folder / "quality.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def kept(folder: Path) -> Iterator[dict[str, Any]]:
    """The runs of a folder."""
    for file in sorted(folder.glob("*.json")):
        yield json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Read the flags, run, and print the page; or make the page of a document alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, help="folder of the results")
    parser.add_argument("--settings", default="demo", help=f"of {', '.join(SETTINGS)}, with commas")
    parser.add_argument("--methods", default="adamw,galore,q_galore", help="names, with commas")
    parser.add_argument("--variants", default="bf16", help=f"of {', '.join(VARIANTS)}, with commas")
    parser.add_argument("--seeds", default="0", help="numbers, with commas")
    parser.add_argument("--steps", type=int, help="of every run, instead of the setting's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--forgetting", action="store_true", help="the loss on general text too")
    parser.add_argument("--page", type=Path, help="write the page of a document: of --of")
    parser.add_argument("--of", type=Path, help="quality.json of an earlier call")
    given = parser.parse_args()
    if given.page and given.of:
        given.page.write_text(markdown(json.loads(given.of.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    if given.output_dir is None:
        parser.error("name a folder for the results: --output-dir; or --page and --of")
    names = {key: getattr(given, key).split(",") for key in ("settings", "methods", "variants")}
    seeds = [int(seed) for seed in given.seeds.split(",")]
    rest = {"steps": given.steps, "jobs": given.jobs, "forgetting": given.forgetting}
    try:
        found = quality(given.output_dir, **names, seeds=seeds, **rest)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
