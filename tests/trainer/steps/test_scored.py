"""Losses about whole answers: one of several candidates, and what an objective says of generated text."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import make_model
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.config import RunConfig
from lowmem.data.rows.fields import Fields, RowError
from lowmem.data.rows.preferences import formats_of
from lowmem.errors import UserError
from lowmem.models.choosing import candidate_scores, choice_loss, f1, padded
from lowmem.training.scored import Candidates
from lowmem.training.zeroth.objectives import objective, scored

recipe = importlib.import_module("lowmem.recipes.finetune")
MINE = """
def length(completions, prompts, answers):
    assert all(answer == "it is " + asked[8:-1] for asked, answer in zip(prompts, answers))
    assert len(completions) == len(prompts) and all(isinstance(text, str) for text in completions)
    return [len(asked) for asked in prompts]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    make_model(folder / "model")
    sides = [" low", " high", " middling"]
    rows = [
        {"prompt": f"What is {i}?", "candidates": sides[: 2 + i % 2], "label": " low" if i < 12 else 1}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bare.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "candidates"}) + "\n" for row in rows)
    )
    asked = [{"prompt": f"What is {i}?", "completion": f" it is {i}"} for i in range(24)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "mine.py").write_text(MINE)
    return folder


def settings(place: Path, out: Path, **more: Any) -> RunConfig:
    values: dict[str, Any] = {
        "task": "classify", "model": str(place / "model"), "data": str(place / "rows.jsonl"), "optim": "mezo",
        "optim_args": "eps_perturb=0.01,queries=2", "dtype": "float32", "lr": 1e-2, "seq_len": 64,
        "batch_size": 4, "steps": 4, "save_steps": 2, "logging_steps": 1, "eval_rows": 8,
        "output_dir": str(out), "report": False, "schedule": "constant",
    }  # fmt: skip
    return RunConfig(**{**values, **more})


def test_a_candidate_scores_the_mean_likelihood_of_its_own_tokens(place: Path) -> None:
    """Against the logits of each sequence alone, unpadded, position by position."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    tokenizer.pad_token = tokenizer.eos_token
    sides = [([5, 6, 7, 8, 9], 3), ([5, 6, 7, 30], 3), ([40, 41, 42, 43, 44, 45], 2)]
    expected = []
    for tokens, start in sides:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        one = [float(logits[i - 1, tokens[i]]) for i in range(start, len(tokens))]
        expected.append(sum(one) / len(one))
    labelled = [{"input_ids": t, "labels": [-100] * n + t[n:]} for t, n in sides]
    made = [
        {key: [side[key] for side in some] for key in ("input_ids", "labels")} | {"right": 0}
        for some in (labelled[:2], labelled[2:])
    ]
    with torch.no_grad():
        found = candidate_scores(model, Candidates(tokenizer)(made))
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    rows = padded(found, torch.tensor([2, 1]))
    assert rows.shape == (2, 2)
    assert rows[1, 1] == -torch.inf
    total = choice_loss(rows, torch.tensor([1, 0]))
    wanted = torch.nn.functional.cross_entropy(
        rows[:1], torch.tensor([1])
    )  # one candidate alone costs nothing
    torch.testing.assert_close(total, wanted)


def test_candidates_of_one_token_are_one_sequence_of_the_prompt_alone(place: Path) -> None:
    """Whatever their number: nothing is read twice, and no token that says nothing."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    tokenizer.pad_token = tokenizer.eos_token
    asked = [[5, 6, 7], [8]]
    rows = [
        {"input_ids": [[*ids, x] for x in (30, 31, 32)], "right": 1,
         "labels": [[-100] * len(ids) + [x] for x in (30, 31, 32)]}
        for ids in asked
    ]  # fmt: skip
    batch = Candidates(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["keep"].tolist() == [[False, False, True], [True, False, False]]
    assert batch["input_ids"][0].tolist() == asked[0]
    assert batch["counts"].tolist() == [3, 3]


def test_f1_is_the_mean_over_the_labels_that_occur() -> None:
    """Precision 1, recall 1/2 of place 0; 1/2 and 1/2 of place 1; place 2 is chosen and never right."""
    chosen, right = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1])
    assert f1(chosen, right) == pytest.approx((2 * 1 / 3 + 2 * 1 / 4) / 2)


@pytest.mark.parametrize("optim", ["mezo", "adamw"])
def test_candidates_are_learned_by_forward_passes_and_by_gradients(
    optim: str, place: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"optim": optim, "optim_args": ""} if optim == "adamw" else {"accumulation": 2}
    result = recipe.finetune(settings(place, tmp_path / "out", **more))
    before, after = (result["held_out"][when] for when in ("before", "after"))
    assert after.keys() == {"loss", "accuracy", "f1"}
    assert after["loss"] < before["loss"]
    assert 0 <= after["accuracy"] <= 1


def test_a_run_with_candidates_is_planned_as_it_is(place: Path, tmp_path: Path) -> None:
    recipe.finetune(settings(place, tmp_path / "out", steps=2, report=True))
    report = json.loads((tmp_path / "out" / "memory_report.json").read_text())
    said, held = (report[key]["peak"]["allocated"] for key in ("predicted", "measured"))
    assert said == pytest.approx(held, rel=0.05)


def test_micro_batches_of_rows_are_the_large_batch(place: Path, tmp_path: Path) -> None:
    """Candidates of different number and length: the loss of a window is the mean over its rows."""
    losses = []
    for rows, parts in ((8, 1), (2, 4)):
        values = {"batch_size": rows, "accumulation": parts, "steps": 1, "lr": 0.0}
        recipe.finetune(settings(place, tmp_path / str(parts), **values))
        log = json.loads((tmp_path / str(parts) / "memory_report.json").read_text())["log"]
        losses.append(log[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accuracy_is_raised_without_a_gradient_and_the_run_resumes(place: Path, tmp_path: Path) -> None:
    """The number of right answers has no slope; a model that is never right learns to be, half the time."""
    some = {"optim_args": "eps_perturb=0.05,queries=4", "batch_size": 16, "steps": 12, "save_steps": 6}
    config = settings(place, tmp_path / "out", objective="accuracy", eval_steps=6, keep_best=True, **some)
    result = recipe.finetune(config)
    before, after = (result["held_out"][when] for when in ("before", "after"))
    assert after["score"] == pytest.approx(after["accuracy"])
    assert (before["score"], after["score"]) == (0.0, 0.5)
    resumed = recipe.finetune(dataclasses.replace(config, resume=True, steps=14, keep_best=False))
    assert resumed["resumed_from"].startswith("checkpoint")


def test_generated_answers_are_judged_by_a_function_of_the_user(place: Path, tmp_path: Path) -> None:
    """The loss is minus the mean of what it says; held-out rows have a score, and no loss is told."""
    more = {"task": "sft", "data": str(place / "asked.jsonl"), "objective": f"{place / 'mine.py'}:length"}
    values = {**more, "max_completion": 2, "steps": 1, "batch_size": 14, "seed": 3, "optim_args": ""}
    result = recipe.finetune(settings(place, tmp_path / "out", **values))
    assert result["held_out"]["after"].keys() == {"score"}
    assert result["loss"] == {"before": None, "after": None}
    log = json.loads((tmp_path / "out" / "memory_report.json").read_text())["log"]
    assert -11 < log[0]["loss"] < -10  # between the lengths of the prompts


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "candidates": [" b"], "label": 0}, "two texts or more"),
        ({"prompt": "a", "candidates": " b", "label": 0}, "two texts or more"),
        ({"prompt": "a", "candidates": [" b", " b"], "label": 0}, "a text twice"),
        ({"prompt": "a", "candidates": [" b", " c"], "label": 2}, "neither one of"),
        ({"prompt": "a", "candidates": [" b", " c"], "label": True}, "neither one of"),
        ({"candidates": [" b", " c"], "label": 0}, "no field 'prompt'"),
    ],
)
def test_a_row_that_is_no_choice_says_what_is_wrong(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        formats_of("classify")["choice"].convert(Fields(row))


def test_what_cannot_be_scored_is_one_line_and_exit_code_two(place: Path, tmp_path: Path) -> None:
    common = ["--model", str(place / "model"), "--output-dir", str(tmp_path / "out"), "--steps", "1"]
    mezo, classify = ["--optim", "mezo"], ["--task", "classify"]
    rows = ["--data", str(place / "rows.jsonl")]
    for flags, said in (
        ([*mezo, *classify, "--data", str(place / "bare.jsonl")], "needs prompt, candidates"),
        ([*classify, *rows, "--optim", "adamw", "--objective", "f1"], "use mezo, fzoo or qzo"),
        ([*mezo, *rows, "--objective", "f2"], "accuracy, f1, nor of the form module:function"),
        ([*mezo, *rows, "--task", "dpo", "--objective", "f1"], "task dpo has its own"),
        ([*mezo, *classify, *rows, "--max-completion", "4"], "max_completion: for task grpo"),
        ([*classify, *rows, "--optim", "qzo"], "give quantize: nf4"),
        ([*classify, *rows, "--optim", "qzo", "--quantize", "hqq4"], "neither loads nor saves layers of HQQ"),
        ([*mezo, *classify, *rows, "--few-bit", "3"], "keeps no activations"),
    ):
        done = CliRunner().invoke(cli.app, ["finetune", *common, *flags])
        assert done.exit_code == 2, (flags, done.output)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert len([line for line in lines if said in line]) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_an_objective_gives_one_number_for_each_answer() -> None:
    with pytest.raises(UserError, match="one number for each of 2"):
        scored(lambda **_: [1.0], ["a", "b"], ["c", "d"], ["e", "f"])
    with pytest.raises(UserError, match="one number for each of 1"):
        scored(lambda **_: [float("nan")], ["a"], ["b"], ["c"])
    squad = objective("f1")(["the big dog barked!"], ["Big dogs, a dog"])
    assert squad == [pytest.approx(2 * 2 / (3 + 3))]  # big, dog of (big dog barked) and (big dogs dog)
