"""The log of a run gives its weights back, bit for bit, from the base model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem
from lowmem.errors import UserError
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.training.zeroth.log import NAME, ReplayLog, fingerprint

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mezo", {}),
    ("mezo", {"noise": "rademacher", "queries": 3}),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(13, 8), nn.Dropout(0.5)
        self.up, self.norm = nn.Linear(8, 24), nn.LayerNorm(24)
        self.down, self.head = nn.Linear(24, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.down(F.gelu(self.norm(self.up(self.embed(ids)))))))


def net(dtype: torch.dtype) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype).train()


def loss_of(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten().roll(1)) / 2


def make(model: nn.Module, name: str, **options: Any) -> LowMemOptimizer:
    return lowmem.optimizer(model, name, lr=1e-2, weight_decay=0.1, seed=3, **options)


def run(model: nn.Module, optimizer: LowMemOptimizer, first: int, last: int) -> list[dict[str, Tensor]]:
    """Steps of two micro-batches under a schedule; the weights after each."""
    found = []
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        for part in (0, 1):
            optimizer.backward(lambda i=2 * step + part: loss_of(model, i), model)
        optimizer.step()
        found.append(bits(model))
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def replayed(log: ReplayLog, dtype: torch.dtype, name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = net(dtype)
    optimizer = log.optimizer(model, lowmem.create(name, **options))
    log.apply(optimizer)
    return bits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_base_and_log_give_the_weights_bit_for_bit(
    tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Invariants 15 and 17: dropout, accumulation and a schedule; a cut log is that step's checkpoint."""
    model = net(dtype)
    optimizer = make(model, name, **options)
    log = ReplayLog.of(optimizer, model)
    handle = log.follow(optimizer)
    after = run(model, optimizer, 0, 6)
    handle.remove()
    log.save(tmp_path / NAME)
    read = ReplayLog.load(tmp_path / NAME)
    assert read == log
    assert equal(replayed(read, dtype, name, options), after[-1])
    assert equal(replayed(read.cut(4), dtype, name, options), after[3])
    assert not equal(after[-1], after[3])


def test_resume_continues_the_log_and_the_run() -> None:
    """Invariant 16: stopped at step 3 and gone on, the weights and the log are those of the whole run."""
    whole = net(torch.bfloat16)
    optimizer = make(whole, "mezo")
    log = ReplayLog.of(optimizer, whole)
    log.follow(optimizer)
    after = run(whole, optimizer, 0, 6)
    model = net(torch.bfloat16)
    first = make(model, "mezo")
    part = ReplayLog.of(first, model)
    part.follow(first)
    run(model, first, 0, 3)
    again = make(model, "mezo")
    again.load_state_dict(first.state_dict())
    part.follow(again)
    assert equal(run(model, again, 3, 6)[-1], after[-1])
    assert part.steps == log.steps


def test_a_log_takes_a_few_bytes_for_each_step(tmp_path: Path) -> None:
    model = net(torch.float32)
    log = ReplayLog.of(make(model, "mezo"), model)
    groups = len(log.header["groups"])
    log.steps = [(i, [[0.1 * i]], [[1e-6 * i, 0.0, 0.9, 0.999, 1e-8]] * groups) for i in range(2000)]
    log.save(tmp_path / NAME)
    assert (tmp_path / NAME).stat().st_size < 2000 * 20 + 4096
    assert ReplayLog.load(tmp_path / NAME).steps == log.steps


def test_another_base_is_refused_in_one_line(tmp_path: Path) -> None:
    model = net(torch.float32)
    optimizer = make(model, "mezo")
    log = ReplayLog.of(optimizer, model)
    strategy = lowmem.create("mezo")
    other = net(torch.float32)
    with torch.no_grad():
        other.norm.bias[3] += 1e-7
    with pytest.raises(UserError, match="other weights"):
        log.optimizer(other, strategy)
    with pytest.raises(UserError, match="another model"):
        log.optimizer(net(torch.bfloat16), strategy)
    with pytest.raises(UserError, match="strategy"):
        log.optimizer(net(torch.float32), lowmem.create("mezo", queries=2))
    with pytest.raises(UserError, match="has no log"):
        ReplayLog.of(make(net(torch.float32), "adamw"), model)
    log.follow(optimizer)
    with pytest.raises(UserError, match="backward"):
        optimizer.step(lambda: loss_of(model, 0))
    (tmp_path / "no").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not the log"):
        ReplayLog.load(tmp_path / "no")
    assert fingerprint(net(torch.float32)) == log.header["base"] != fingerprint(other)


@pytest.mark.parametrize(("name", "options"), [("zo_adamu", {"total_steps": 20}), ("mezo", {"rule": "adam"})])
def test_a_log_does_not_begin_over_state_that_is_not_in_it(name: str, options: dict[str, Any]) -> None:
    """From the weights alone other ones came back; without state it may begin anywhere."""
    model = net(torch.float32)
    optimizer = make(model, name, **options)
    optimizer.init_state()
    ReplayLog.of(optimizer, model)
    run(model, optimizer, 0, 2)
    with pytest.raises(UserError, match="state of 2 steps"):
        ReplayLog.of(optimizer, model)
    stateless, base = make(model, "mezo"), net(torch.float32)
    run(model, stateless, 0, 2)
    base.load_state_dict(model.state_dict())
    log = ReplayLog.of(stateless, model)
    log.follow(stateless)
    after = run(model, stateless, 2, 4)
    log.apply(log.optimizer(base, lowmem.create("mezo")))
    assert equal(bits(base), after[-1])


def test_steps_that_were_skipped_are_skipped_again(tmp_path: Path) -> None:
    """A NaN among the slopes is part of the run, decay included; a log without a step is one too."""
    model = net(torch.bfloat16)
    optimizer = make(model, "mezo")
    log = ReplayLog.of(optimizer, model)
    log.save(tmp_path / NAME)
    assert ReplayLog.load(tmp_path / NAME) == log
    log.follow(optimizer)
    run(model, optimizer, 0, 2)
    before = bits(model)
    optimizer.backward(lambda: loss_of(model, 9) * torch.nan, model)
    optimizer.step()
    assert equal(bits(model), before)
    after = run(model, optimizer, 3, 5)
    log.save(tmp_path / NAME)
    assert equal(replayed(ReplayLog.load(tmp_path / NAME), torch.bfloat16, "mezo", {}), after[-1])


def test_a_log_of_another_version_is_refused(tmp_path: Path) -> None:
    model = net(torch.float32)
    optimizer = make(model, "mezo")
    log = ReplayLog.of(optimizer, model)
    log.header["version"] = 1
    log.save(tmp_path / NAME)
    with pytest.raises(UserError, match="version 1, and this lowmem reads"):
        ReplayLog.load(tmp_path / NAME)
    del log.header["version"]
    log.save(tmp_path / NAME)
    with pytest.raises(UserError, match="not the log"):
        ReplayLog.load(tmp_path / NAME)


@pytest.mark.parametrize("how", ["frozen", "added"])
def test_a_log_ends_where_other_tensors_are_trained(how: str, tmp_path: Path) -> None:
    """It does not say so, and gave other weights without a word; the run goes on."""
    model = net(torch.float32)
    optimizer = make(model, "mezo")
    log = ReplayLog.of(optimizer, model)
    log.follow(optimizer)
    after = run(model, optimizer, 0, 2)
    if how == "frozen":
        model.up.weight.requires_grad_(False)
    else:
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))], "role": "vector"})
    assert not equal(run(model, optimizer, 2, 4)[-1], after[-1])
    with pytest.raises(UserError, match="ends after 2 steps"):
        log.save(tmp_path / NAME)
    assert equal(replayed(log.cut(2), torch.float32, "mezo", {}), after[-1])
    if how == "frozen":
        with pytest.raises(UserError, match=r"up\.weight.*is frozen"):
            ReplayLog.of(optimizer, model)


def test_a_schedule_that_puts_tensors_aside_is_in_the_log() -> None:
    """They follow from the clock, and are trained all the same."""
    model, options = net(torch.float32), {"schedule": "blocks", "switch_gap": 1}
    optimizer = make(model, "mezo", **options)
    log = ReplayLog.of(optimizer, model)
    log.follow(optimizer)
    after = run(model, optimizer, 0, 3)
    assert not log.left
    assert equal(replayed(log, torch.float32, "mezo", options), after[-1])


@pytest.mark.parametrize("what", ["torch", "device"])
def test_a_run_that_goes_on_elsewhere_is_not_the_logs(what: str) -> None:
    model = net(torch.float32)
    optimizer = make(model, "mezo")
    log = ReplayLog.of(optimizer, model)
    assert not log.elsewhere(optimizer)
    log.header[what] = "of another machine"
    assert f"{what} of another machine" in log.elsewhere(optimizer)
