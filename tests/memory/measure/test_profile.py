"""A profile: categories sum to the peak, state is exact, the peak is torch's own, nothing is left behind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.modules import module as global_hooks

import lowmem
from lowmem.errors import UserError
from lowmem.memory.measure import watch
from lowmem.memory.measure.profile import Profiler, profile
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.tensors.groups import param_groups
from lowmem.report.profile import errors
from tests.enrolled import by_turns, on_any_model, unlike

VOCAB = 131
WITH_GRADIENTS = [name for name in unlike() if lowmem.create(name).source.needs_autograd]


def model(seed: int = 0) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).train()


class Loop:
    """A model, an optimizer and one batch."""

    def __init__(self, name: str | None = None, **options: object) -> None:
        self.model = model()
        self.batch = torch.arange(2 * 24).remainder(VOCAB).reshape(2, 24)
        if name is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            strategy = lowmem.create(name)
            groups = param_groups(self.model)
            self.optimizer = LowMemOptimizer(groups, strategy, lr=1e-3, **options)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.batch, labels=self.batch).loss

    def step(self) -> None:
        if isinstance(self.optimizer, LowMemOptimizer):
            self.optimizer.backward(self.loss, self.model)
            if self.optimizer.probe_due:
                self.optimizer.probe(self.model(input_ids=self.batch).logits)
        else:
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def mem_tracker_peak(loop: Loop) -> int:
    """The same from torch's own tracker; it rounds to 512 bytes on CUDA only."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(loop.model, loop.optimizer, loop.batch)
    with tracker:
        loop.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("name", [None, *on_any_model()])
def test_categories_sum_to_the_peak_and_state_is_exact(name: str | None) -> None:
    loop = Loop(name)
    measured = profile(loop.step, loop.model, loop.optimizer).measured
    assert (
        sum(measured["at_peak"].values()) == measured["peak"]["allocated"] == max(measured["events"].values())
    )
    assert measured["events"][measured["event"]] == measured["peak"]["allocated"]
    weights = sum(p.numel() * 4 for p in loop.model.parameters()) + sum(
        b.nbytes for b in loop.model.buffers()
    )
    assert measured["at_peak"]["weights"] == weights
    if isinstance(loop.optimizer, LowMemOptimizer):
        assert measured["state_bytes"] == loop.optimizer.state_bytes()
        assert measured["strategy"] == name
    else:  # two fp32 moments and a 4-byte step count for each tensor
        count = len(list(loop.model.parameters()))
        assert measured["state_bytes"] == 2 * sum(p.numel() * 4 for p in loop.model.parameters()) + 4 * count


@pytest.mark.parametrize("name", [None, *by_turns(WITH_GRADIENTS)])
def test_peak_equals_that_of_torch_s_tracker(name: str | None) -> None:
    ours, theirs = Loop(name), Loop(name)
    if not all(p.requires_grad for p in theirs.model.parameters()):
        pytest.skip("torch's tracker puts a hook on every parameter, also on one that rests")
    found = profile(ours.step, ours.model, ours.optimizer).measured["peak"]["allocated"]
    for _ in range(2):
        theirs.step()
    peak = mem_tracker_peak(theirs)
    if name is None:
        assert found == peak
    else:  # torch's tracker knows neither tables that parameters share nor scalars made before the step
        grids = [t for grid in theirs.optimizer.chunks.grids.values() for t in grid]
        shared = sum(t.nbytes for t in (*theirs.optimizer._constants.values(), *grids))
        assert 0 <= found - peak <= shared + 128


def test_modules_and_timeline_say_the_same_as_the_peak() -> None:
    loop = Loop()
    measured = profile(loop.step, loop.model, loop.optimizer).measured
    by_module = {row["kind"]: row["bytes"] for row in measured["modules"]}
    for category, size in measured["at_peak"].items():
        assert sum(row[category] for row in by_module.values()) == size
    assert by_module["model.embed_tokens"]["weights"] == VOCAB * 32 * 4
    assert by_module["model.layers.*.mlp.up_proj"]["optimizer_state"] == 3 * (2 * 32 * 56 * 4 + 4)
    line = measured["timeline"]
    assert max(map(sum, zip(*line["bytes"].values(), strict=True))) == measured["peak"]["allocated"]
    names = [phase["name"] for phase in line["phases"]]
    assert names[0] == "forward"
    assert names[-1] == "optimizer step"
    assert "embedding backward" in names


def test_gradients_are_all_live_at_the_end_of_backward() -> None:
    loop = Loop()
    loop.step()
    seen = watch.Watch(loop.model, loop.optimizer)
    with seen:
        loop.step()
    moments = seen.tracker.moments()
    assert moments["optimizer step"].bytes["gradients"] == sum(p.numel() * 4 for p in loop.model.parameters())
    assert moments["forward"].bytes["gradients"] == 0


def hooks_of(loop: Loop) -> tuple[int, ...]:
    found = [len(global_hooks._global_forward_hooks), len(global_hooks._global_forward_pre_hooks)]
    for module in loop.model.modules():
        found += [len(module._forward_hooks), len(module._forward_pre_hooks)]
    for p in loop.model.parameters():
        found.append(len(p._post_accumulate_grad_hooks or ()))
    found += [len(loop.optimizer._optimizer_step_pre_hooks), len(loop.optimizer._optimizer_step_post_hooks)]
    return tuple(found)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    loop = Loop("adamw")
    before, backward = hooks_of(loop), torch.autograd.backward
    profiler = Profiler(at=1)

    def broken() -> None:
        with profiler.step(loop.model, loop.optimizer):
            loop.step()
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            broken()
    else:
        broken()
    assert hooks_of(loop) == before
    assert torch.autograd.backward is backward
    assert "step_param" not in vars(loop.optimizer)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, when it compiles
@pytest.mark.parametrize(("name", "compiled"), [("adamw", "off"), ("adamw", "on"), ("galore", "off")])
def test_a_profiled_run_takes_the_same_steps(name: str, compiled: str) -> None:
    plain, profiled = Loop(name, compile=compiled), Loop(name, compile=compiled)
    for _ in range(4):
        plain.step()
    profiler = Profiler(at=3)
    for _ in range(4):
        with profiler.step(profiled.model, profiled.optimizer):
            profiled.step()
    assert torch.equal(plain.weights(), profiled.weights())
    assert [row.get("tracked", False) for row in profiler.result().steps] == [False, False, True, False]


def test_only_the_profiled_step_runs_under_a_mode() -> None:
    loop, modes = Loop(), []
    profiler = Profiler(at=2)
    for _ in range(3):
        with profiler.step(loop.model, loop.optimizer):
            modes.append(len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()))
            loop.step()
    assert modes == [0, 1, 0]


def test_a_long_run_keeps_a_bounded_number_of_readings() -> None:
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    profiler = Profiler(at=1)
    for _ in range(2000):
        with profiler.step(linear, optimizer):
            pass
    steps = [row["step"] for row in profiler.result().steps]
    assert len(steps) <= 512
    assert steps[-1] >= 1996
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1


def trainer(tmp_path: Path, steps: int = 5, **more: object) -> transformers.Trainer:
    rows = [{"input_ids": [i % VOCAB, 5, 7, 9], "labels": [i % VOCAB, 5, 7, 9]} for i in range(40)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    return transformers.Trainer(
        model(), args, train_dataset=rows, data_collator=transformers.default_data_collator
    )


@pytest.mark.parametrize(("steps", "tracked"), [(5, 3), (2, 2)])
def test_a_stock_trainer_is_profiled(tmp_path: Path, steps: int, tracked: int) -> None:
    run = trainer(tmp_path, steps, gradient_accumulation_steps=2)
    count = len(run.callback_handler.callbacks)
    profiler = Profiler(name="tiny", run={"batch_size": 2})
    with profiler.on(run):
        run.train()
    assert len(run.callback_handler.callbacks) == count
    found = profiler.result()
    assert [row["step"] for row in found.steps if row.get("tracked")] == [tracked]
    assert len(found.steps) == steps
    assert found.model["parameters"] == sum(p.numel() for p in run.model.parameters())
    assert sum(found.measured["at_peak"].values()) == found.measured["peak"]["allocated"]
    names = [phase["name"] for phase in found.measured["timeline"]["phases"]]
    assert names.count("forward") == 2  # both micro-batches
    assert names[-1] == "optimizer step"
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_run_without_the_step_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 steps and step 3 was to be tracked"):
        Profiler().result()
    with pytest.raises(UserError, match=r"counted from 1, got 0"):
        Profiler(at=0)


def test_a_snapshot_needs_cuda(tmp_path: Path) -> None:
    loop = Loop()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"this run is on cpu"):
        profile(loop.step, loop.model, loop.optimizer, snapshot=tmp_path / "snapshot.pickle")
    assert not (tmp_path / "snapshot.pickle").exists()


def test_errors_are_signed_and_relative_to_what_was_measured() -> None:
    plan = {
        "state_bytes": 110,
        "at_peak": {"weights": 50, "logits": 1},
        "peak": {"allocated": 99, "device": None},
    }
    real = {
        "state_bytes": 100,
        "at_peak": {"weights": 50, "logits": 0},
        "peak": {"allocated": 100, "device": 3},
    }
    assert errors(plan, real) == {"state_bytes": 10.0, "weights": 0.0, "logits": None, "peak_allocated": -1.0}


def plan_of(measured: dict[str, object]) -> dict[str, object]:
    return {
        **measured,
        "levers": [{"lever": "gradient release", "saves": 4096}, {"lever": "nothing", "saves": 0}],
    }


@pytest.mark.parametrize("at", [1, 2])
def test_out_of_memory_leaves_the_table_and_the_advice(tmp_path: Path, at: int) -> None:
    """Both inside the tracked step (1) and outside it (2: the run fails in step 1, which is not tracked)."""
    loop = Loop("adamw")
    predicted = plan_of(profile(loop.step, loop.model, loop.optimizer).to_dict()["measured"])
    profiler = Profiler(predicted, "tiny", at=at, folder=tmp_path / "run")
    step = profiler.step(loop.model, loop.optimizer)

    def fail() -> None:
        with step:
            loop.loss().backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    with pytest.raises(
        UserError, match=r"step 1: CUDA out of memory\. .*weights .*gradient release would lower"
    ):
        fail()
    saved = json.loads((tmp_path / "run" / "out_of_memory.json").read_text(encoding="utf-8"))
    assert saved["out_of_memory"]
    assert saved["measured"]["at_peak"]["gradients"] in (
        0,
        sum(p.numel() * 4 for p in loop.model.parameters()),
    )
    assert saved["measured"]["state_bytes"] == loop.optimizer.state_bytes()
    page = (tmp_path / "run" / "out_of_memory.html").read_text(encoding="utf-8")
    assert "Out of memory." in page
    assert "gradient release would lower the planned peak by 4.0 KiB." in page
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    loop = Loop()
    profiler = Profiler(at=1, folder=tmp_path)
    with pytest.raises(ZeroDivisionError), profiler.step(loop.model, loop.optimizer):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_cuda_names_what_the_tracker_does_not_see(tmp_path: Path) -> None:
    loop = Loop()
    loop.model.cuda()
    loop.batch = loop.batch.cuda()
    loop.optimizer = torch.optim.AdamW(loop.model.parameters(), lr=1e-3)
    found = profile(loop.step, loop.model, loop.optimizer, snapshot=tmp_path / "snapshot.pickle").measured
    beside = found["beside"]
    assert (
        found["peak"]["allocated"]
        == beside["allocator_peak"]
        == beside["tracked_peak"] + beside["unattributed"]
    )
    assert sum(found["at_peak"].values()) == found["peak"]["allocated"]
    assert found["peak"]["device"] >= found["peak"]["reserved"] >= found["peak"]["allocated"]
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0
