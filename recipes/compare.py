"""Compare strategies on the user's own model and data: loss x memory x time.

    base settings + strategies -> one child process after another -> comparison.json and .html

Every strategy gets the same model, data, seeds and number of steps. A run is a `finetune` of its own in
its own folder below the output folder. What has finished is kept: calling again goes on where it stopped,
repeats what failed and what was asked differently, and loses nothing that is done. A failure is a row with
its reason.

Copy it (`lowmem cp compare my.py`) and change what you like. It prints nothing and returns plain values.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig, build, dump, load, read
from lowmem.console import Console
from lowmem.errors import ConfigError, UserError
from lowmem.training.comparing.comparison import document, outcome_of
from lowmem.training.comparing.contenders import Contender, contenders

POINTS = 10  # evaluations during a run, beside those before and after
Check = Callable[[Mapping[str, Any]], Iterable[str]]


def compare(
    settings: Mapping[str, Any],
    optim: str,
    *,
    output_dir: str | Path,
    tokens: int | None = None,
    seeds: Sequence[int] = (0,),
    keep_models: bool = False,
    command: str = "",
    check: Check | None = None,
    progress: Console | None = None,
) -> dict[str, Any]:
    """Run every strategy and compare them.

    Args:
        settings: fields of `RunConfig` that all runs share; "steps" unless `tokens` is given.
        optim: strategies, as in "adamw,galore(rank=64,lr=5e-4)".
        output_dir: folder of the comparison; an earlier one in it is continued.
        tokens: budget of training tokens instead of steps; rounded up to whole steps.
        seeds: each strategy runs once with each; losses are averaged.
        keep_models: keep the fine-tuned weights of every run; otherwise only what was measured.
        command: how the comparison was started, for the report.
        check: further problems of the settings, such as unknown options of a strategy.
        progress: told what happens; silent when None.

    Returns:
        The document of `lowmem compare --json`: "model", "run", "runs", "front", "assumptions", "command".

    Raises:
        UserError: whatever the user can mend, for all strategies at once, before the first run.
    """
    console, folder = progress or Console(), Path(output_dir)
    asked = contenders(optim)
    budgeted = _with_budget(dict(settings), tokens)
    jobs = _jobs(budgeted, asked, seeds, folder, check)
    _claim(folder)
    for count, (contender, config) in enumerate(jobs, start=1):
        console.start(f"{contender}, seed {config.seed} ({count} of {len(jobs)})")
        outcome = _run(config, Path(str(config.output_dir)), keep_models)
        console.finish()
        console.say(f"{contender}, seed {config.seed}: {_said(outcome)}")
        found = document([(c, run, _outcome(run)) for c, run in jobs], tokens, command)
        _publish(found, folder)
    return found


def _with_budget(settings: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """Settings with the number of steps and of evaluations filled in."""
    if tokens is not None and settings.get("steps") is not None:
        raise UserError("steps and tokens: both given; give one of them")
    if tokens is not None:
        shape = build({"model": "x", "optim": "x", **{k: v for k, v in settings.items() if k in _SHAPE}})
        settings["steps"] = math.ceil(tokens / (shape.batch_size * shape.accumulation * shape.seq_len))
    if settings.get("steps") is None:
        raise UserError("a comparison needs a budget: give steps or tokens")
    if settings.get("report", True) in (False, "no", "false"):
        raise UserError("report: a comparison measures memory; leave the setting out")
    steps = build({"model": "x", "optim": "x", "steps": settings["steps"]}).steps or 1
    settings.setdefault("eval_steps", max(1, steps // POINTS))
    return settings


_SHAPE = ("batch_size", "accumulation", "seq_len")


def _jobs(
    settings: Mapping[str, Any],
    asked: Sequence[Contender],
    seeds: Sequence[int],
    folder: Path,
    check: Check | None,
) -> list[tuple[Contender, RunConfig]]:
    """All runs, checked before the first one starts."""
    jobs, problems = [], []
    for contender in asked:
        for seed in seeds:
            values = {
                **settings,
                **dict(contender.hyper),
                "optim": contender.name,
                "optim_args": ",".join(f"{k}={v}" for k, v in contender.options),
                "seed": seed,
                "output_dir": str(folder / "runs" / f"{contender.folder}-seed{seed}"),
            }
            try:
                jobs.append((contender, _rated(build(values, check))))
            except ConfigError as error:
                problems += [p if p.startswith("optim") else f"{contender.name}: {p}" for p in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return jobs


def _rated(config: RunConfig) -> RunConfig:
    """The run with its learning rate; as it is where its model is not there, which the run will tell."""
    from lowmem.training.zeroth.usual import settled

    try:
        return settled(config)
    except UserError:
        return config


def _claim(folder: Path) -> None:
    """Refuse a folder that holds something else."""
    if folder.is_file():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    held = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if held and not held <= {"runs", "comparison.json", "comparison.html"}:
        raise UserError(f"output_dir: {folder} is not empty and holds no comparison; name another folder")
    (folder / "runs").mkdir(parents=True, exist_ok=True)


def _run(config: RunConfig, folder: Path, keep_models: bool) -> dict[str, Any]:
    """The outcome of one run: the one that is there already, or that of a child process."""
    wanted = _fingerprint(config)
    earlier = _read(folder / "outcome.json")
    if earlier is not None and earlier["status"] == "done" and earlier["fingerprint"] == wanted:
        return {**earlier, "kept": True}
    same = (_read(folder / "started.json") or {}).get("fingerprint") == wanted
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "started.json", {"fingerprint": wanted})
    work = folder / "work"
    resume = work.is_dir()  # a run that was interrupted goes on from its newest checkpoint
    child = dataclasses.replace(config, output_dir=str(work), resume=resume, overwrite=False)
    (folder / "run.yaml").write_text(dump(child), encoding="utf-8")
    outcome = {**_child(folder), "fingerprint": wanted}
    _save(folder / "outcome.json", outcome)
    if outcome["status"] == "done" and not keep_models:
        for kept in (*work.glob("memory_report.*"), *work.glob("loss*.png")):
            os.replace(kept, folder / kept.name)
        shutil.rmtree(work)
    return outcome


def _fingerprint(config: RunConfig) -> str:
    plain = dataclasses.replace(config, output_dir=None, resume=False, overwrite=False, threads=None)
    return hashlib.sha256(dump(plain).encode()).hexdigest()


def _child(folder: Path) -> dict[str, Any]:
    """Run `run.yaml` of a folder in a process of its own; a crash there is an outcome here."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--one", folder / "run.yaml", answer],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, from here: a second one would stop it at once
        )
        try:
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)  # it saves a checkpoint, from which the next call goes on
            process.wait()
            raise
    found = _read(answer)
    answer.unlink(missing_ok=True)
    if found is not None:
        return found
    last = next((line for line in reversed(_lines(folder / "log.txt")) if line.strip()), "")
    said = f" ({last.strip()[:200]})" if code > 0 and last else ""
    return {"status": "failed", "reason": f"{_ended(code)}{said}; see {folder / 'log.txt'}"}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system, most likely for lack of memory"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} and no result"


def _said(outcome: Mapping[str, Any]) -> str:
    if outcome["status"] == "failed":
        return f"failed: {outcome['reason']}"
    loss = outcome["loss_after"]
    text = "held-out loss is not finite" if loss is None else f"held-out loss {loss:.4f}"
    return text + (" (kept from an earlier call)" if outcome.get("kept") else "")


def _outcome(config: RunConfig) -> dict[str, Any] | None:
    found = _read(Path(str(config.output_dir)) / "outcome.json")
    return found if found is not None and found["fingerprint"] == _fingerprint(config) else None


def _publish(found: Mapping[str, Any], folder: Path) -> None:
    from lowmem import report

    _save(folder / "comparison.json", found)
    report.write(found, folder / "comparison.html")


def _save(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Any] | None:
    """A document of ours; None where it is missing or cut off."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def run_one(config: RunConfig) -> dict[str, Any]:
    """One `finetune` as an outcome of the comparison; what went wrong is an outcome too."""
    import importlib

    recipe = importlib.import_module("lowmem.recipes.finetune")
    try:
        result = recipe.finetune(config)
    except UserError as error:
        return {"status": "failed", "reason": str(error)}
    report = json.loads((config.output_path / "memory_report.json").read_text(encoding="utf-8"))
    return outcome_of(result, report, config)


def _main(arguments: list[str]) -> None:
    """`compare.py CONFIG.yaml STRATEGIES FOLDER`; a child of it is `compare.py --one RUN ANSWER`."""
    if arguments[:1] == ["--one"]:
        _save(Path(arguments[2]), run_one(load(arguments[1])))
        return
    parser = argparse.ArgumentParser(description=(compare.__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="YAML file with the settings that all share")
    parser.add_argument("strategies", help="names, or all, as for `lowmem compare --optim`")
    parser.add_argument("folder", help="where the results go")
    args = parser.parse_args(arguments)
    try:
        shared = {k: v for k, v in read(args.config).items() if k not in _OWN}
        found = compare(shared, args.strategies, output_dir=args.folder, command=" ".join(arguments))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


_OWN = ("optim", "optim_args", "seed", "output_dir", "resume", "overwrite", "prompt")

if __name__ == "__main__":
    _main(sys.argv[1:])
