"""Comparing strategies: what is asked is read, one child runs after another, nothing that is done is lost."""

from __future__ import annotations

import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from lowmem.config import RunConfig, load
from lowmem.console import Console
from lowmem.errors import ConfigError, UserError
from lowmem.training.comparing.comparison import document, outcome_of
from lowmem.training.comparing.contenders import Contender, contenders

recipe = importlib.import_module("lowmem.recipes.compare")
SETTINGS = {"model": "smollm2-135m", "steps": 20, "batch_size": 2, "seq_len": 64, "data": "rows.jsonl"}


def test_strategies_are_read_with_their_options() -> None:
    found = contenders("adamw, galore(rank=64, lr=5e-4),adamw_8bit(betas=0.9;0.95)")
    assert found == [
        Contender("adamw"),
        Contender("galore", (("rank", "64"),), (("lr", "5e-4"),)),
        Contender("adamw_8bit", (), (("betas", "0.9,0.95"),)),
    ]
    assert [str(c) for c in found[:2]] == ["adamw", "galore(rank=64,lr=5e-4)"]
    assert len({c.folder for c in contenders("galore(rank=4),galore(rank=8),galore")}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("galore(rank=4", "brackets do not match"),
        ("galore)rank=4(", "brackets do not match"),
        ("galore(rank)", "option 'rank' has no value; write option=value"),
        ("a b", "cannot read strategy 'a b'"),
        ("", "no strategy to compare"),
        ("adamw,adamw", "adamw: given more than once"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        contenders(text)


def entry(peak: int) -> dict[str, Any]:
    return {
        "strategy": "s",
        "options": {},
        "state_bytes": peak // 4,
        "at_peak": {"weights": peak},
        "peak": {"allocated": peak, "reserved": None, "device": None},
        "event": "loss backward",
        "events": {},
    }


def outcome(loss: float | None, peak: int = 1 << 20, seconds: float = 0.5) -> dict[str, Any]:
    return {
        "status": "done",
        "reason": None,
        "loss_before": 5.0,
        "loss_after": loss,
        "curve": [{"step": s, "tokens": 128 * s, "loss": value} for s, value in ((0, 5.0), (20, loss))],
        "measured": entry(peak),
        "predicted": None,
        "error_percent": {},
        "seconds_per_step": seconds,
        "model": {"name": "smollm2-135m", "parameters": 3, "trainable": 3},
    }


class Children:
    """Stands for the child processes: answers by strategy, remembers who was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.configs: list[RunConfig] = []

    def __call__(self, folder: Path) -> dict[str, Any]:
        config = load(folder / "run.yaml")
        self.asked.append(config.optim)
        self.configs.append(config)
        work = Path(str(config.output_dir))
        work.mkdir(exist_ok=True)
        (work / "model.safetensors").write_bytes(b"x")
        (work / "memory_report.html").write_text("page", encoding="utf-8")
        answer = self.answers[config.optim]
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    found = Children(
        {"adamw": outcome(1.0, 4 << 20), "galore": outcome(2.0, 2 << 20), "mezo": outcome(3.0, 3 << 20)}
    )
    monkeypatch.setattr(recipe, "_child", found)
    return found


def run(folder: Path, optim: str = "adamw,galore,mezo", **more: Any) -> dict[str, Any]:
    return recipe.compare({**SETTINGS, **more.pop("settings", {})}, optim, output_dir=folder, **more)


def test_every_strategy_gets_the_same_run(children: Children, tmp_path: Path) -> None:
    found = run(tmp_path, "adamw(lr=1e-3),galore(rank=4)", seeds=[0, 7])
    assert children.asked == ["adamw", "adamw", "galore", "galore"]
    assert [c.seed for c in children.configs] == [0, 7, 0, 7]
    assert [c.lr for c in children.configs] == [1e-3, 1e-3, 1e-4, 1e-4]
    assert [c.optim_args for c in children.configs] == ["", "", "rank=4", "rank=4"]
    same = {(c.model, c.data, c.steps, c.batch_size, c.seq_len, c.eval_steps) for c in children.configs}
    assert same == {("smollm2-135m", "rows.jsonl", 20, 2, 64, 2)}
    assert len({c.output_dir for c in children.configs}) == 4
    assert found["run"]["seeds"] == [0, 7]
    assert found["run"]["tokens"] == 20 * 2 * 64


def test_a_budget_of_tokens_is_rounded_up_to_steps(children: Children, tmp_path: Path) -> None:
    settings = {k: v for k, v in SETTINGS.items() if k != "steps"} | {"accumulation": 2}
    found = recipe.compare(settings, "adamw", output_dir=tmp_path, tokens=1000)
    assert children.configs[0].steps == 4  # 256 tokens a step
    assert found["run"]["steps"] == 4
    assert found["run"]["tokens"] == 1000


def test_front_and_files(children: Children, tmp_path: Path) -> None:
    found = run(tmp_path / "out")
    assert found["front"] == ["galore", "adamw"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8")) == found
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "Lowest held-out loss: adamw, 1.0000 at 4.0 MiB. Least memory: galore, 2.0 MiB at 2.0000." in page
    place = tmp_path / "out" / "runs" / "adamw-seed0"
    assert (place / "memory_report.html").is_file()
    assert not (place / "work").exists()


def test_models_are_kept_on_request(children: Children, tmp_path: Path) -> None:
    run(tmp_path, "adamw", keep_models=True)
    assert (tmp_path / "runs" / "adamw-seed0" / "work" / "model.safetensors").is_file()


def test_a_failure_does_not_lose_the_others(children: Children, tmp_path: Path) -> None:
    children.answers["galore"] = {"status": "failed", "reason": "rank 999 is too large"}
    found = run(tmp_path)
    assert children.asked == ["adamw", "galore", "mezo"]
    assert [r["status"] for r in found["runs"]] == ["done", "failed", "done"]
    assert found["runs"][1]["reason"] == "seed 0: rank 999 is too large"
    assert found["front"] == ["mezo", "adamw"]
    assert "rank 999 is too large" in (tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_what_is_done_is_kept_and_what_failed_is_repeated(children: Children, tmp_path: Path) -> None:
    children.answers["galore"] = {"status": "failed", "reason": "x"}
    run(tmp_path)
    children.answers["galore"], children.asked = outcome(0.5), []
    found = run(tmp_path)
    assert children.asked == ["galore"]
    assert [r["loss_after"] for r in found["runs"]] == [1.0, 0.5, 3.0]
    children.asked = []
    run(tmp_path, settings={"steps": 40})  # another budget is another comparison
    assert children.asked == ["adamw", "galore", "mezo"]


def test_an_interruption_keeps_what_is_done(children: Children, tmp_path: Path) -> None:
    children.answers["galore"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [r["strategy"] for r in saved["runs"]] == ["adamw"]
    children.answers["galore"], children.asked, children.configs = outcome(2.0), [], []
    run(tmp_path)
    assert children.asked == ["galore", "mezo"]
    assert [c.resume for c in children.configs] == [True, False]  # galore goes on from its checkpoint


def test_losses_are_averaged_over_seeds_and_one_lost_seed_is_said(children: Children, tmp_path: Path) -> None:
    base = RunConfig(model="smollm2-135m", optim="adamw", steps=20)
    jobs = [(Contender("adamw"), base, outcome(1.0)), (Contender("adamw"), base, outcome(3.0))]
    row = document(jobs)["runs"][0]
    assert row["loss_after"] == 2.0
    assert row["curve"][-1]["loss"] == 2.0
    assert [item["loss_after"] for item in row["losses"]] == [1.0, 3.0]
    lost = document([jobs[0], (Contender("adamw"), base, {"status": "failed", "reason": "y"})])["runs"][0]
    assert lost["status"] == "failed"
    assert document([(Contender("adamw"), base, outcome(None))])["front"] == []


def test_all_problems_are_said_before_the_first_run(children: Children, tmp_path: Path) -> None:
    def check(values: Any) -> list[str]:
        return [f"optim: unknown strategy {values['optim']!r}"] if values["optim"] == "galor" else []

    with pytest.raises(ConfigError) as error:
        run(tmp_path / "out", "galor,adamw(lr=-1),mezo", check=check)
    assert [p.split(";")[0] for p in error.value.problems] == [
        "optim: unknown strategy 'galor'",
        "adamw: lr: -1 is out of range",
    ]
    assert children.asked == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"steps": None}}, "needs a budget: give steps or tokens"),
        ({"tokens": 5}, "steps and tokens: both given"),
        ({"settings": {"report": False}}, "a comparison measures memory"),
    ],
)
def test_budgets_that_do_not_hold(children: Children, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, "adamw", **changes)


def test_a_foreign_folder_is_left_alone(children: Children, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="holds no comparison; name another folder"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_crash_of_a_child_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("not: [a, run", encoding="utf-8")
    found = recipe._child(tmp_path)
    assert found["status"] == "failed"
    assert found["reason"].startswith("ended with exit code 1 and no result (lowmem.errors.UserError: ")
    assert "is not valid YAML" in found["reason"]
    assert found["reason"].endswith(f"; see {tmp_path / 'log.txt'}")
    assert recipe._ended(-signal.SIGKILL) == "killed by the system, most likely for lack of memory"


def test_an_outcome_keeps_losses_memory_and_time() -> None:
    result = {"loss": {"before": 5.0, "after": float("nan")}, "steps": 6}
    steps = [{"step": i, "seconds": s} for i, s in enumerate((9.0, 1.0, 50.0, 2.0, 3.0), start=1)]
    steps[2]["tracked"] = True
    report = {
        "log": [{"step": 2, "eval_loss": 4.0}, {"step": 2, "loss": 1.0}],
        "steps": steps,
        "measured": entry(8) | {"timeline": {}},
        "predicted": None,
        "error_percent": {},
        "model": {"name": "smollm2-135m"},
    }
    found = outcome_of(
        result, report, RunConfig(model="smollm2-135m", optim="adamw", steps=6, seq_len=10, batch_size=2)
    )
    assert [(p["step"], p["tokens"], p["loss"]) for p in found["curve"]] == [
        (0, 0, 5.0),
        (2, 40, 4.0),
        (6, 120, None),
    ]
    assert found["loss_after"] is None
    assert found["seconds_per_step"] == 2.0  # without the first step and the tracked one
    assert "timeline" not in found["measured"]
    bare = outcome_of(result, {"log": []}, RunConfig(model="smollm2-135m", optim="adamw"))
    assert (bare["measured"], bare["seconds_per_step"]) == (None, None)


class Heard(Console):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.slow
def test_two_strategies_on_a_tiny_model(tmp_path: Path) -> None:
    from tests.trainer import tiny_folder

    tiny_folder.make_model(tmp_path / "model")
    rows = tiny_folder.make_rows(tmp_path / "rows.jsonl")
    settings = {
        "model": str(tmp_path / "model"),
        "data": str(rows),
        "dtype": "float32",
        "steps": 5,
        "eval_steps": 1,
        "batch_size": 2,
        "seq_len": 128,
        "eval_rows": 4,
    }
    heard = Heard()
    found = recipe.compare(
        settings, "adamw(lr=1e-2),galore(rank=4,lr=2e-2)", output_dir=tmp_path / "out", progress=heard
    )
    assert [r["status"] for r in found["runs"]] == ["done", "done"], heard.said
    for row in found["runs"]:
        assert row["loss_after"] < row["loss_before"]
        assert [p["step"] for p in row["curve"]] == [0, 1, 2, 3, 4, 5]
        measured = row["measured"]
        assert sum(measured["at_peak"].values()) == measured["peak"]["allocated"]
        assert measured["event"] in measured["events"]
    assert found["runs"][0]["loss_before"] == found["runs"][1]["loss_before"]
    assert found["runs"][1]["measured"]["state_bytes"] < found["runs"][0]["measured"]["state_bytes"]
    assert found["front"]
