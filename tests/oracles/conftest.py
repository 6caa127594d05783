"""Fixtures for the oracle tests: official packages, each loaded without its side effects."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_known_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def torchao_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What torchao's eager 8-bit AdamW did, computed in its own process (see torchao_runner)."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    out = tmp_path_factory.mktemp("torchao") / "record.pt"
    runner = Path(__file__).parent / "dense" / "torchao_runner.py"
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(runner), str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="session")
def galore_torch() -> types.ModuleType:
    """galore-torch's AdamW module, without the package's __init__, which needs bitsandbytes."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch_alone")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.adamw")
