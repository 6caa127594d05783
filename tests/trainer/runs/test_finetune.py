"""The main job on a tiny model: what it leaves, what it refuses, how it stops and goes on."""

import dataclasses
import importlib
import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_folder import make_model, make_rows

import lowmem
from lowmem.config import RunConfig, load
from lowmem.console import Console
from lowmem.errors import CheckpointError, UserError
from lowmem.memory.count import model_state_bytes
from lowmem.strategies import create
from lowmem.training.folder import checkpoint

recipe = importlib.import_module("lowmem.recipes.finetune")


class Heard(Console):
    """Remembers what it was told; may press Ctrl-C when it hears of a step, so during the next one."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.said, self.stages, self.steps, self.interrupt_at = [], [], [], interrupt_at

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, stage: str, total: int | None = None) -> None:
        self.stages.append((stage, total))

    def advance(self, done: int, values: dict[str, float]) -> None:
        if self.stages[-1][0] == "train":
            self.steps.append(done)
            if done == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def config(place, tmp_path):
    return RunConfig(
        model=str(place / "model"),
        data=str(place / "rows.jsonl"),
        optim="galore",
        optim_args="rank=4,update_proj_gap=3",
        dtype="float32",
        lr=2e-2,
        seq_len=128,
        batch_size=2,
        steps=8,
        save_steps=3,
        logging_steps=1,
        eval_rows=8,
        prompt=("What is 4 + 1?",),
        output_dir=str(tmp_path / "out"),
        report=False,
    )


def change(config, **values):
    return dataclasses.replace(config, **values)


def saved(config) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{config.output_dir}/model.safetensors")


def test_leaves_everything_and_prints_nothing(config, capfd, tmp_path):
    heard = Heard()
    result = recipe.finetune(change(config, report=True), heard)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= names
    assert {"README.md", "memory_report.json", "memory_report.html", "loss.png", "config.yaml"} <= names
    assert {"checkpoint-6", "checkpoint-8"} == {n for n in names if n.startswith("checkpoint")}
    assert not any(n.startswith(".") for n in names)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in out.iterdir() if p.is_file())
    assert result["loss"]["after"] < result["loss"]["before"]
    assert result["steps"] == 8
    assert heard.steps == list(range(1, 9))
    assert [stage for stage, _ in heard.stages] == [
        "load",
        "evaluate before",
        "train",
        "evaluate after",
        "write",
    ]
    assert any("question" in text for text in heard.said)
    assert any("[[1" in text for text in heard.said)  # the rendered example marks what is learned
    assert result["samples"][0].keys() == {"prompt", "before", "after"}
    assert result["peak_bytes"] > 50 << 20
    json.dumps(result)


def test_plain_text_is_trained_without_a_chat_template(config, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"word {i} " * 9}) + "\n" for i in range(20))
    )
    heard = Heard()
    result = recipe.finetune(change(config, data=str(tmp_path / "texts.jsonl"), steps=2, warmup=0), heard)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "chat_template" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert not any("template" in text for text in heard.said)
    assert result["samples"][0].keys() == {"prompt", "before", "after"}


def test_reported_state_bytes_are_exact(config):
    result = recipe.finetune(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.output_dir)
    galore = create("galore", rank=4, update_proj_gap=3)
    assert result["state_bytes"] == model_state_bytes(galore, model)
    for states, size in (("fp32", 8), ("bf16", 4)):
        count = sum(p.numel() for p in model.parameters())
        tensors = len(list(model.parameters()))
        assert result["adamw_state_bytes"][states] == size * count + 4 * tensors


def test_written_model_is_the_trained_one_and_the_report_holds_the_log(config):
    result = recipe.finetune(change(config, report=True))
    document = json.loads(Path(config.output_dir, "memory_report.json").read_text())
    assert document["result"] == result
    assert document["measured"]["state_bytes"] == result["state_bytes"]
    assert [entry["step"] for entry in document["log"] if "loss" in entry] == list(range(1, 9))
    last, _ = checkpoint.newest(Path(config.output_dir))
    from safetensors.torch import load_file

    at_end = load_file(last / "model.safetensors")
    written = saved(config)
    assert all(torch.equal(written[name], tensor) for name, tensor in at_end.items())


def test_a_run_that_diverges_leaves_documents_without_nan(config):
    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    recipe.finetune(change(config, report=True, lr=1e20))
    text = Path(config.output_dir, "memory_report.json").read_text()
    assert any(entry.get("grad_norm", 0) is None for entry in json.loads(text, parse_constant=refuse)["log"])


def test_a_report_that_fails_does_not_lose_the_model(config, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("layers")

    monkeypatch.setattr("lowmem.memory.plan.plan", fail)
    heard = Heard()
    assert recipe.finetune(change(config, report=True), heard)["loss"]["after"] > 0
    assert any("no memory report" in text and "KeyError" in text for text in heard.said)
    assert (Path(config.output_dir) / "model.safetensors").is_file()


def test_resolved_config_runs_again_unchanged(config, tmp_path):
    recipe.finetune(config)
    again = load(f"{config.output_dir}/config.yaml")
    assert again == change(config)
    first = saved(config)
    other = change(again, output_dir=str(tmp_path / "second"))
    recipe.finetune(other)
    assert all(torch.equal(first[name], tensor) for name, tensor in saved(other).items())


def test_ctrl_c_saves_the_step_and_resume_ends_with_the_same_weights(config, tmp_path):
    whole = change(config, output_dir=str(tmp_path / "whole"))
    recipe.finetune(whole)
    before = signal.getsignal(signal.SIGINT)
    heard = Heard(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt):
        recipe.finetune(config, heard)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"config.yaml", "checkpoint-3", "checkpoint-4"}
    again = f"lowmem finetune --resume --output-dir {config.output_dir}"
    assert heard.said[-1] == f"stopped after step 4; `{again}` goes on"
    assert signal.getsignal(signal.SIGINT) is before

    heard = Heard()
    result = recipe.finetune(change(config, resume=True), heard)
    assert heard.said[0] == "resuming from checkpoint-4"
    assert (result["resumed_from"], heard.steps) == ("checkpoint-4", [5, 6, 7, 8])
    first = saved(whole)
    assert all(torch.equal(first[name], tensor) for name, tensor in saved(config).items())


def test_second_ctrl_c_stops_at_once(config):
    class Impatient(Heard):
        def advance(self, done, values):
            if self.stages[-1][0] == "train":
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        recipe.finetune(config, Impatient())
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_a_folder_with_other_content_is_left_alone(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for flags, words in [
        ({}, "not empty (thesis.tex)"),
        ({"overwrite": True}, "no run"),
        ({"resume": True}, "no run"),
    ]:
        with pytest.raises(UserError, match="output_dir") as caught:
            recipe.finetune(change(config, **flags))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_a_run_and_nothing_else(config, tmp_path):
    recipe.finetune(config)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="--resume goes on with the run in it, --overwrite replaces it"):
        recipe.finetune(config)
    recipe.finetune(change(config, overwrite=True, steps=2, lora_rank=2))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"notes.md", "adapter_model.safetensors", "checkpoint-2"} <= names
    assert not {"model.safetensors", "checkpoint-6", "checkpoint-8"} & names


def test_overwriting_the_model_that_is_trained_is_refused(config):
    recipe.finetune(change(config, steps=1))
    with pytest.raises(UserError, match="output_dir: it holds the model"):
        recipe.finetune(change(config, model=config.output_dir, overwrite=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim_args": "rnk=4"}, "did you mean 'rank'"),
        ({"optim_args": "rank=0"}, "rank"),
        ({"data": "no-such-file.jsonl"}, "no-such-file.jsonl"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"adapter": "ia3", "adapter_args": "rnk=1", "data": "none.jsonl"}, "IA3Config has no 'rnk'"),
        ({"adapter": "vectorfit", "optim": "mezo", "optim_args": ""}, "adapter-args freeze=0"),
        ({"optim": "adamw", "optim_args": "", "gradient_release": True, "accumulation": 2}, "accumulation"),
    ],
)
def test_errors_come_before_anything_is_written(config, tmp_path, values, words):
    with pytest.raises(UserError, match=words) as caught:
        recipe.finetune(change(config, **values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_resume_says_what_it_skips_and_what_differs(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        recipe.finetune(config, Heard(interrupt_at=3))
    (tmp_path / "out" / "checkpoint-4" / "scheduler.pt").unlink()
    heard = Heard()
    recipe.finetune(change(config, resume=True, lr=1e-3), heard)
    assert heard.said[:2] == ["skipped checkpoint-4: scheduler.pt is missing", "resuming from checkpoint-3"]
    assert "resuming with another lr: 0.02 -> 0.001" in heard.said
    assert load(f"{config.output_dir}/config.yaml").lr == 1e-3
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint in .*; skipped checkpoint-8: optimizer\.pt is missing"
    ):
        recipe.finetune(change(config, resume=True))


def test_resuming_a_finished_run_writes_its_results_again(config):
    """As after a kill between the last checkpoint and the last result; no step is left to measure."""
    first = recipe.finetune(change(config, report=True))
    reported = json.loads(Path(config.output_dir, "memory_report.json").read_text())
    Path(config.output_dir, "model.safetensors").rename(Path(config.output_dir, "kept"))
    again = recipe.finetune(change(config, report=True, resume=True))
    kept = Path(config.output_dir, "kept").read_bytes()
    assert Path(config.output_dir, "model.safetensors").read_bytes() == kept
    for key in ("loss", "steps", "state_bytes", "samples"):
        assert again[key] == first[key], key
    kept = json.loads(Path(config.output_dir, "memory_report.json").read_text())
    assert kept["measured"] == reported["measured"]
    assert kept["log"][:-1] == reported["log"][:-1]  # the last entry is the time that the run took
    assert Path(config.output_dir, "memory_report.html").is_file()


def test_resuming_another_strategy_is_refused_and_changes_nothing(config):
    recipe.finetune(change(config, steps=1))
    before = Path(config.output_dir, "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="strategy is 'galore', this run's is 'adamw'"):
        recipe.finetune(change(config, resume=True, optim="adamw", optim_args=""))
    assert Path(config.output_dir, "config.yaml").read_text() == before


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(config, tmp_path):
    heard = Heard()
    recipe.finetune(change(config, resume=True, steps=1), heard)
    assert heard.said[0] == f"nothing to resume in {tmp_path / 'out'} yet: starting from the beginning"


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint(config, tmp_path):
    """The write of the second checkpoint really fails: files may not grow past the limit."""

    class Full(Heard):
        def advance(self, done, values):
            super().advance(done, values)
            if self.steps and self.steps[-1] == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            UserError, match=r"could not write .*checkpoint-6.*checkpoint-3 is whole and kept"
        ) as caught:
            recipe.finetune(config, Full())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.yaml", "checkpoint-3"}
    result = recipe.finetune(change(config, resume=True))
    assert (result["resumed_from"], result["steps"]) == ("checkpoint-3", 8)


def test_held_out_loss_does_not_depend_on_batches_or_packing(config):
    seen = set()
    for packing, batch_size in [(True, 2), (True, 1), (False, 1), (False, 3)]:
        values = change(config, packing=packing, batch_size=batch_size)
        args = recipe.arguments(values)
        with recipe.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            trainer = recipe.prepare(values, args, Console())
            measured = recipe._measure(trainer, change(values, prompt=()), Console(), "before")
            seen.add(round(measured["loss"], 5))
    assert len(seen) == 1, seen


@pytest.mark.parametrize("optim", ["adamw", "galore"])
def test_lora_trains_adapters_only(config, optim):
    values = change(config, optim=optim, optim_args="", lora_rank=4, dtype="bfloat16")
    result = recipe.finetune(values)
    assert result["loss"]["after"] < result["loss"]["before"]
    assert not os.path.exists(f"{config.output_dir}/model.safetensors")
    adapters = (
        4 * 7 * 2 * 2
    )  # rank x (linear layers of a block) x (in, out) x blocks: at least so many numbers
    assert result["state_bytes"] > adapters
    assert result["state_bytes"] < 200_000


@pytest.mark.parametrize(
    "flags", [{"gradient_release": True}, {"gradient_checkpointing": True}, {"accumulation": 2}]
)
def test_flags_of_memory_train(config, flags):
    result = recipe.finetune(change(config, **flags))
    assert result["loss"]["after"] < result["loss"]["before"]


def test_qlora_trains_adapters_over_nf4_weights(config, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = str(make_model(tmp_path / "wide", hidden=128))  # rows shorter than a block of 64 cannot be packed
    values = change(config, model=model, lora_rank=4, quantize="nf4", dtype="bfloat16", steps=4, report=True)
    result = recipe.finetune(values)
    assert result["loss"]["after"] < result["loss"]["before"]
    report = json.loads((Path(result["output_dir"]) / "memory_report.json").read_text())
    said, held = (report[key]["peak"]["allocated"] for key in ("predicted", "measured"))
    assert said == pytest.approx(held, rel=0.01)  # an evaluation lets bitsandbytes pack weights anew on a CPU
    planned = lowmem.plan(model, values.optim, options=values.optim_args, lora_rank=4, quantize="nf4")
    assert planned.plans[0].state_bytes == result["state_bytes"]


def test_nf4_without_its_package_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'lowmem\[bnb\]'"):
        recipe.finetune(change(config, lora_rank=4, quantize="nf4"))


def test_a_strategy_without_gradients_runs_the_same_job(config):
    values = change(config, optim="mezo", optim_args="", lr=1e-4, accumulation=2, report=True)
    result = recipe.finetune(values)
    assert result["state_bytes"] == 0
    assert result["loss"]["after"] != result["loss"]["before"]


def test_eval_steps_log_the_same_held_out_loss(config):
    recipe.finetune(change(config, eval_steps=4, report=True))
    document = json.loads(Path(config.output_dir, "memory_report.json").read_text())
    assert [e["step"] for e in document["log"] if "eval_loss" in e] == [4]


def test_steps_that_are_evaluated_log_their_training_loss_too(config):
    result = recipe.finetune(change(config, eval_steps=2, report=True))
    document = json.loads(Path(config.output_dir, "memory_report.json").read_text())
    losses = [e["step"] for e in document["log"] if "loss" in e]
    assert losses == list(range(1, result["steps"] + 1)), losses
