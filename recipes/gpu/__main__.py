"""The command: each part in a process of its own, one document."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .part import Part

ROOT = Path(__file__).resolve().parents[2]
TESTS = 160
"""Seconds for the tests, inside the share of their part."""


def find_packages() -> None:
    """Let a plain checkout be imported as it would be installed."""
    sys.path[0] = str(ROOT)
    import lowmem

    if not (Path(lowmem.__file__).parent / "recipes").exists():
        lowmem.__path__.append(str(ROOT))


def tests(part: Part) -> None:
    """pytest -m cuda, and what it counted."""
    # no others: what they import may be missing on a bare machine
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in file.read_text("utf-8")]
    where = ["tests/cuda"] if part.args.small else [str(file) for file in files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-rfE", "-p", "no:cacheprovider", *where]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(4, (os.cpu_count() or 1) // 4)))]
    out = part.args.output.with_suffix(".tests.txt")
    with out.open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, timeout=TESTS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    lines = out.read_text(encoding="utf-8").splitlines()
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    part.row(exit_code=code, closing=lines[-1] if lines else "", failed=failed)


def child(name: str, args: argparse.Namespace) -> None:
    """Run one part in this process."""
    room = {
        file: importlib.import_module(f"lowmem.recipes.gpu.{file}")
        for file in ("part", "memory", "methods", "steps", "train")
    }
    parts: dict[str, Callable[[Part], None]] = {
        "tests": tests,
        "methods": room["methods"].methods,
        "calibrate": room["memory"].calibrate,
        "steps": room["steps"].steps,
        "plan": room["memory"].plan,
        "train": room["train"].train,
        "fit": room["memory"].fit,
    }
    part: Part = room["part"].Part(name, args)
    part.write()
    parts[name](part)
    part.write()


def parent(args: argparse.Namespace) -> int:
    """Start the parts in turn; what one of them breaks is written down, and the next one starts."""
    room = importlib.import_module("lowmem.recipes.gpu.part")
    beside = tuple(name for name in args.parts if name in room.BESIDE)
    turns = ([beside] if beside else []) + [(name,) for name in args.parts if name not in beside]
    for names in turns:
        print(f"{' and '.join(names)} ...", file=sys.stderr, flush=True)
        running = {name: start(name) for name in names}
        for name, process in running.items():
            if problem := ended(process, room.SHARES[name] + 30):
                found = room.read(args.output)["parts"].get(name) or {"rows": [], "left_out": []}
                failed = room.Part(name, args, found=found)
                failed.found["error"] = problem
                failed.write()
                print("\n".join(problem), file=sys.stderr, flush=True)
    args.output.with_suffix(".lock").unlink(missing_ok=True)
    return 0


def start(name: str) -> subprocess.Popen[str]:
    """A part in a process of its own, and all that it starts in a group of their own."""
    command = [sys.executable, str(Path(__file__).parent), *sys.argv[1:], "--child", name]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str], seconds: int) -> list[str]:
    """Wait for a part; its last lines where it failed, or what there is to say where it took too long."""
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [f"stopped after {seconds} seconds"]
    return said.splitlines()[-12:] if process.returncode else []


def page() -> str:
    """The page of every document that is kept."""
    from lowmem.report import gpu

    kept = sorted((ROOT / "configs" / "measured").glob("gpu-*.json"))
    return gpu.markdown([json.loads(file.read_text(encoding="utf-8")) for file in kept])


def main() -> int:
    """Parse, run."""
    find_packages()
    shares = importlib.import_module("lowmem.recipes.gpu.part").SHARES
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="the JSON document")
    parser.add_argument("--page", type=Path, help="only write the page of all that configs/measured holds")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(shares), help=",".join(shares)
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", type=Path, help="folder or GGUF file of the demo's weights")
    parser.add_argument("--small", action="store_true", help="small shapes, for a machine without a GPU")
    parser.add_argument(
        "--methods", default="", help="whose steps are timed: NAME,NAME or all; by default one of each family"
    )
    for hidden in ("--child", "--worker"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [name for name in args.parts if name not in shares]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(shares)}")
    try:
        importlib.import_module("lowmem.recipes.gpu.steps").by_gradient(args.methods)
    except importlib.import_module("lowmem.errors").UserError as error:
        parser.error(str(error))
    if args.page:
        args.page.write_text(page(), encoding="utf-8")
        return 0
    if args.output is None:
        parser.error("--output FILE is needed: where to write the JSON document")
    args.output = args.output.resolve()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.worker:
        worker = importlib.import_module("lowmem.recipes.gpu.methods").work
        worker(args.worker, args.output, args.device, args.small)
        return 0
    if args.child:
        child(args.child, args)
        return 0
    return parent(args)


if __name__ == "__main__":
    sys.exit(main())
