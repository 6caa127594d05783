"""The model card says what the run recorded, and no path of the machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from lowmem.config import RunConfig
from lowmem.training.card import card

RESULT: dict[str, Any] = {
    "steps": 12,
    "held_out": {"before": {"loss": 3.25}, "after": {"loss": 1.5}},
    "data": {"train": "owner/rows (train): 90 rows", "held_out": "owner/rows (held out): 10 rows"},
    "state_bytes": 3 << 20,
    "peak_bytes": 5 << 30,
}
PROFILE = {
    "predicted": {"state_bytes": 3 << 20, "peak": {"allocated": 7 << 20}},
    "measured": {"peak": {"allocated": 8 << 20}},
}
RUN = RunConfig(model="gpt2", data="owner/rows:small", optim="galore", optim_args="rank=8", lr=3e-4)


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_what_was_trained_on_what_in_how_much_memory() -> None:
    text = card(RUN, RESULT, PROFILE, "openai-community/gpt2")
    assert front(text) == {
        "library_name": "transformers",
        "base_model": "openai-community/gpt2",
        "base_model_relation": "finetune",
        "datasets": ["owner/rows"],
        "pipeline_tag": "text-generation",
        "tags": ["lowmem", "galore"],
    }
    for line in (
        "| loss | 3.2500 | 1.5000 |",
        "- held out: owner/rows (held out): 10 rows",
        "| optim_args | rank=8 |",
        "| lr | 0.0003 |",
        "| optimizer state | 3.0 MiB | 3.0 MiB |",
        "| peak of tensors in a step | 7.0 MiB | 8.0 MiB |",
        "| peak of the process | - | 5.00 GiB |",
    ):
        assert line in text.splitlines()
    assert "gradient_release" not in text


def test_an_adapter_is_called_one_and_no_path_leaves_the_machine(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").touch()
    rows = str(tmp_path / "rows.jsonl")
    run = dataclasses.replace(
        RUN, model=str(tmp_path / "base"), data=rows, lora_rank=4, output_dir=str(tmp_path / "out")
    )
    text = card(run, {**RESULT, "data": {"train": f"{rows} (train): 9 rows"}}, None, str(tmp_path / "base"))
    assert front(text)["library_name"] == "peft"
    assert "base_model" not in front(text)
    assert "- train: rows.jsonl (train): 9 rows" in text.splitlines()
    assert "base, fine-tuned with lowmem: `galore` on adapters of rank 4, 12 steps." in text
    assert "peak of tensors" not in text
    assert str(tmp_path) not in text.replace(str(run.output_path), "")
