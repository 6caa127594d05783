"""The pages build, what they say to type is understood, and what they say to run runs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import lowmem.cli as cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_reads_without_a_network(tmp_path: Path) -> None:
    run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"), cwd=ROOT)
    site = tmp_path / "site"
    import lowmem

    assert {p.parent.name for p in (site / "methods").glob("*/index.html")} >= set(lowmem.available())
    for page in site.rglob("*.html"):
        asked = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8")
        )
        assert not [url for url in asked if "canonical" not in url], page
    assert "galore: Adam in the leading subspace" in (site / "llms.txt").read_text("utf-8")


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).splitlines():
            for part in line.split("#")[0].split("&&"):
                if part.strip().startswith("lowmem "):
                    yield f"{page.name}: {part.strip()}", shlex.split(part)[1:]


def test_every_command_is_understood() -> None:
    """Parsed as it would be, with every value; nothing is run."""
    group, found = typer.main.get_command(cli.app), list(commands())
    assert len(found) > 15
    for told, (name, *arguments) in found:
        command = group.get_command(None, name)  # type: ignore[attr-defined, arg-type]
        assert command, told
        command.make_context(name, arguments)


def test_every_block_of_python_runs(tmp_path: Path) -> None:
    """Those of a page one after another, each page by itself; the README's names a model of the reader's."""
    pages = {page: "\n".join(blocks(page, "python")) for page in PAGES if page.name != "README.md"}
    script = "import sys, torch\ntorch.manual_seed(0)\n"
    for page, code in pages.items():
        if code:
            script += f"exec(compile({code!r}, {page.name!r}, 'exec'), {{'__name__': 'page'}})\n"
    (tmp_path / "pages.py").write_text(script, encoding="utf-8")
    run("pages.py", cwd=tmp_path)


def script(name: str) -> Any:
    """A module beside the pages, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_what_levers_gain_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "guides" / "reduce.md").read_text(encoding="utf-8")
    shown = page.partition("memory_matrix.md -->\n")[2].partition("<!-- end")[0]
    assert shown.strip() == script("levers").table(), "run python docs/levers.py"


def test_the_table_of_cards_is_what_the_planner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape, and one cell asked again."""
    made = script("choose")
    cells = made.written()
    assert (len(cells), {len(row) for row in cells}) == (len(made.MODELS), {len(made.CARDS)})
    assert all(cell for row in cells for cell in row), "run python docs/choose.py --write"
    monkeypatch.setattr(made, "AMONG", (cells[0][0].partition(" ")[0],))
    assert made.cell(made.MODELS[0], next(iter(made.CARDS.values()))) == cells[0][0]


def notebook(path: Path, model: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("MODEL = ")
    return "\n".join([f"MODEL = {str(model)!r}", *code[1:]])


def test_examples_run_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    """One process for all of them: importing torch takes longer than what they do."""
    lines = ["import runpy, sys"]
    scripts = sorted((ROOT / "examples").glob("*.py"))
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    assert (len(scripts), len(notebooks)) == (6, 2)
    for script in scripts:
        lines.append(f"sys.argv = [{str(script)!r}, {str(tiny_model)!r}]")
        lines.append(f"runpy.run_path({str(script)!r}, run_name='__main__')")
    for path in notebooks:
        lines.append(f"exec(compile({notebook(path, tiny_model)!r}, {path.name!r}, 'exec'), {{}})")
    (tmp_path / "all.py").write_text("\n".join(lines), encoding="utf-8")
    printed = run("all.py", cwd=tmp_path)
    assert "bytes of state" in printed
    assert "step 7: loss" in printed
    assert "0 gradients kept" in printed
