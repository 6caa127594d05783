"""The wheel holds `lowmem/` and nothing else, and works away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["lowmem", "cli", "recipes", "configs", "pyproject.toml", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy: a stale build/ folder would bring deleted modules back."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "-w", str(folder), str(source)], check=True, stdin=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scripts of an environment with the wheel, which borrows its dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    site = next(folder.glob("lib/python*/site-packages"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(scripts / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "-q", str(wheel)], check=True, stdin=subprocess.DEVNULL)
    # These site-packages come later on the path than the wheel's, and .pth files inside them are not read:
    # this environment's own editable lowmem stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return scripts


def run(scripts: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(scripts / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_wheel_holds_lowmem_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lowmem", "lowmem-0.1.0.dist-info"}


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"lowmem/py.typed"}
    for folder, prefix in (
        ("lowmem", ""),
        ("cli", "lowmem/"),
        ("recipes", "lowmem/"),
        ("configs", "lowmem/"),
    ):
        for file in (ROOT / folder).rglob("*"):
            data = folder == "configs" and file.is_file() and "__pycache__" not in file.parts
            if file.suffix == ".py" or data:
                expected.add(prefix + file.relative_to(ROOT).as_posix())
    assert expected - names == set()


def test_licence_travels_along(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert "Apache License" in archive.read(licence).decode()


def test_script_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "lowmem", "strategies", "--json")
    assert done.returncode == 0, done.stderr
    assert "galore" in {entry["name"] for entry in json.loads(done.stdout)}
    where = run(installed, tmp_path, "python", "-c", "import lowmem, lowmem.cli; print(lowmem.cli.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where


def test_configs_and_recipes_travel_along(installed: Path, tmp_path: Path) -> None:
    for name, file in (("demo", "demo.yaml"), ("finetune", "finetune.py")):
        done = run(installed, tmp_path, "lowmem", "cp", name, file)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / file).is_file()
    assert run(installed, tmp_path, "lowmem", "validate", "demo.yaml").returncode == 0


def test_help_imports_neither_torch_nor_transformers(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, lowmem, lowmem.cli as cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = run(installed, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert "finetune" in done.stdout
