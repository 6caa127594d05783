"""Forgetting and benchmarks of a run: against sums done another way, and refused where they cannot be had."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lowmem.config import RunConfig, build
from lowmem.errors import ConfigError, UserError
from lowmem.training.general import general_loss, passages, scores
from tests.trainer.tiny_folder import make_model, make_rows


def run(tmp_path: Path, **options: object) -> RunConfig:
    values = {
        "model": str(make_model(tmp_path / "model")),
        "data": str(make_rows(tmp_path / "rows.jsonl")),
        "optim": "adamw",
        "lr": 1e-2,
        "steps": 3,
        "seq_len": 64,
        "dtype": "float32",
        "report": False,
        "threads": 1,
        "output_dir": str(tmp_path / "out"),
    }
    return build({**values, **options})


def slow_loss(folder: Path) -> float:
    """Token by token, over the same text, by a model loaded on its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    longest, losses = min(512, model.config.max_position_embeddings), []
    for text in passages():
        ids = torch.tensor([tokenizer(text)["input_ids"][:longest]])
        with torch.no_grad():
            probabilities = functional.log_softmax(model(ids).logits[0].double(), dim=-1)
        losses += [-probabilities[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
    return sum(losses) / len(losses)


def test_forgetting_is_the_loss_of_the_model_that_is_left(tmp_path: Path) -> None:
    finetune = importlib.import_module("lowmem.recipes.finetune").finetune
    config = run(tmp_path, forgetting=True)
    result = finetune(config)
    assert result["general"]["before"] == pytest.approx(slow_loss(tmp_path / "model"), rel=1e-4)
    assert result["general"]["after"] == pytest.approx(slow_loss(tmp_path / "out"), rel=1e-4)
    assert result["general"]["after"] != result["general"]["before"]
    assert json.loads((tmp_path / "out" / "memory_report.json").read_text())["result"]["general"]
    assert "loss on general text" in (tmp_path / "out" / "memory_report.html").read_text()


def test_a_loss_is_measured_without_dropout_and_leaves_the_mode() -> None:
    """Every token is as likely as any other, unless half of the scores are dropped."""
    from contextlib import nullcontext

    class Dropping(torch.nn.Module):
        config, device = SimpleNamespace(max_position_embeddings=8), torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            logits = functional.dropout(torch.ones(*input_ids.shape, 256), 0.5, self.training)
            return SimpleNamespace(logits=logits)

    model = Dropping().train()
    tokenizer = lambda text, **_: {"input_ids": torch.tensor([list(text.encode())])}  # noqa: E731
    trainer = SimpleNamespace(
        model=model,
        processing_class=tokenizer,
        compute_loss_context_manager=nullcontext,
        evaluated=nullcontext,
    )
    assert general_loss(trainer) == pytest.approx(torch.tensor(256.0).log().item())
    assert model.training


def test_benchmarks_are_refused_by_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.combinations import missing_harness
    from lowmem.training.tasks import refuse

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_harness("lm_eval:arc_easy") == (
        "eval: lm-evaluation-harness is not installed; pip install 'lm_eval[hf]'"
    )
    for wrong in ("arc_easy", "lm_eval:", "lm_eval: ,"):
        with pytest.raises(ConfigError, match="is not of the form lm_eval:TASK,TASK"):
            run(tmp_path, eval=wrong)
    assert missing_harness("") is None
    with pytest.raises(ConfigError, match="eval: lm-evaluation-harness is not installed"):
        refuse(run(tmp_path, eval="lm_eval:arc_easy"), cuda=False)
    with pytest.raises(ConfigError, match="forgetting, eval: a reward model predicts no text"):
        run(tmp_path, task="reward", forgetting=True)
    assert scores(SimpleNamespace(), "") == {}


def test_benchmarks_are_those_of_the_harness(tmp_path: Path) -> None:
    """A task of the user's own: two questions, the answers known by the likelihoods of an untrained model."""
    pytest.importorskip("lm_eval")
    finetune = importlib.import_module("lowmem.recipes.finetune").finetune
    (tmp_path / "sums.jsonl").write_text(
        "\n".join(json.dumps({"q": f"{i} + {i} =", "a": str(2 * i)}) for i in range(4)) + "\n"
    )
    task = tmp_path / "sums.yaml"
    task.write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'sums.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: ' {{a}}'\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    result = finetune(run(tmp_path, eval=f"lm_eval:{task}"))
    assert set(result["benchmarks"]["before"]) == set(result["benchmarks"]["after"]) == {"sums perplexity"}
    assert result["benchmarks"]["before"] != result["benchmarks"]["after"]
    task.write_text(task.read_text().replace("sums.jsonl", "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"eval: lm_eval fails on .*sums\.yaml"):
        finetune(run(tmp_path, eval=f"lm_eval:{task}", output_dir=str(tmp_path / "other")))
