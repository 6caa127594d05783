"""Processes that each hold the whole model: what they exchange, and that they stay equal."""

from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from tiny_runs import trainer, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowmem
from lowmem.training.ranks.low_rank_sync import low_rank_sync
from tests.distributed.zoo import Net, loss_of

GALORE = {"optim": "galore", "optim_args": "rank=4,update_proj_gap=3", "max_steps": 6}
PROBED = {"optim": "mezo", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 4}
RANK, GAP, STEPS = 4, 3, 5


def train_copies(given: Path, mesh: Any) -> list[str]:
    """Runs of the Trainer, whose weights are left in files."""
    found, rank = [], dist.get_rank()
    kept = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    _left(_trained(given / "run", **GALORE, **kept), given / f"run-{rank}.pt")
    if rank == 0:
        shutil.copytree(given / "run" / "checkpoint-3", given / "half" / "checkpoint-3")
    dist.barrier()
    _left(_trained(given / "half", resume=True, **GALORE, **kept), given / f"half-{rank}.pt")
    seen = _trained(given / "seen", **GALORE, gradient_sync="low_rank", clip="none")
    _left(seen, given / f"seen-{rank}.pt")
    found += _few(seen)
    probed = _trained(given / "probed", spoilt=True, **PROBED)
    _left(probed, given / f"probed-{rank}.pt")
    if probed.model_wrapped is not probed.model or not probed.lowmem_optimizer.nonfinite():
        found.append("a run without gradients is wrapped, or stepped by a loss that is not finite")
    return found + exchanged() + compressed() + parted()


def _trained(folder: Path, *, resume: bool = False, spoilt: bool = False, **values: Any) -> Any:
    AcceleratorState._reset_state()
    run = trainer(folder, **values)
    if spoilt:
        _spoil(run)
    for _ in range(run.args.process_index):  # nothing may be drawn from a process's own generators
        random.random(), numpy.random.rand(), torch.rand(1)
    run.train(resume_from_checkpoint=resume)
    return run


def _left(run: Any, path: Path) -> None:
    log = {} if run.replay_log is None else {"log": torch.tensor(run.replay_log.steps[0][1])}
    torch.save(weights(run) | log, path)


def _spoil(run: Any) -> None:
    """The last step of one process meets a loss that is not finite."""
    compute = run.compute_loss

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss * float("nan") if run.args.process_index == 1 and run.state.global_step == 3 else loss

    run.compute_loss = spoilt


def _few(run: Any) -> list[str]:
    """Whether a run sent whole gradients at first, and less where none is refreshed."""
    sent = [entry["gradient_bytes_sent"] for entry in run.state.log_history if "gradient_bytes_sent" in entry]
    whole = sum(p.numel() * 4 for p in run.model.parameters())
    return [] if sent[0] == whole and min(sent) < 0.6 * whole else [f"sent {sent} of {whole} bytes"]


def exchanged() -> list[str]:
    """Copies that exchange projections take the steps of copies that exchange gradients, for fewer bytes."""
    ends, sent = [], []
    for low in (False, True):
        model = DistributedDataParallel(Net())
        optimizer = lowmem.optimizer(model.module, "galore", lr=0.01, rank=RANK, update_proj_gap=GAP)
        sync = low_rank_sync(model, optimizer) if low else None
        for step in range(STEPS):
            for half in (0, 1):  # two micro-batches, of which the last is exchanged
                with model.no_sync() if half == 0 else nullcontext():
                    loss_of(model, 7 * step + 3 * half + dist.get_rank()).backward()
            sent += [(sync.sent, _expected(model.module, optimizer))] if sync is not None else []
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters()])
    start = [p.detach() for p in Net().parameters()]
    found = []
    for first, one, other in zip(start, *ends, strict=True):
        if not (apart := float((one - other).norm() / (one - first).norm())) <= 1e-4:
            found.append(f"{tuple(one.shape)}: {apart:.1e} of the way apart")
    wrong = [pair for pair in sent if pair[0] != pair[1]]
    return found + ([f"sent, and expected: {wrong}"] if wrong else [])


def _expected(model: nn.Module, optimizer: Any) -> int:
    """Bytes of a step, by what is projected and refreshed: (m, n) numbers, or rank max(m, n)."""
    total = 0
    for p in model.parameters():
        group = optimizer.place(p).group
        seen = optimizer.rule_name(p) == "matrix"
        refreshed = group["step"] == 0 or optimizer.hyper(p).due(GAP)
        total += 4 * (RANK * max(p.shape) if seen and not refreshed else p.numel())
    return total


def compressed() -> list[str]:
    """PowerSGD, torch's own hook: of full rank it sums whole gradients, of a lower one it learns."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    ends, losses = [], list[float]()
    for rank in (0, 40, 2):
        model = DistributedDataParallel(
            Net()
        )  # in one bucket: several wait for each other in gloo's two threads
        if rank:
            state = PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=0)
            model.register_comm_hook(state, powerSGD_hook)
        optimizer = lowmem.optimizer(model.module, "sgd", lr=0.1)
        for step in range(STEPS):
            loss = loss_of(model, 7 * step + dist.get_rank())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss_of(model.module, 0).detach()))
        ends.append([p.detach() for p in model.parameters()])
    start = [p.detach() for p in Net().parameters()]
    apart = [float((b - a).norm() / (a - s).norm()) for s, a, b in zip(start, *ends[:2], strict=True)]
    first = float(loss_of(Net(), 0).detach())
    fine = max(apart) < 1e-3 and losses[2] < first
    return [] if fine else [f"PowerSGD: {max(apart):.1e} of the way apart, losses {losses} from {first}"]


def parted() -> list[str]:
    """ZeRO-1: each rank holds the state of its tensors, and the steps have the bits of one optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns where it is imported

    ends = []
    for zero in (False, True):
        model = Net()
        if zero:
            strategy = lowmem.create("adamw")
            optimizer: Any = ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=lowmem.LowMemOptimizer, strategy=strategy, lr=0.01
            )
        else:
            optimizer = lowmem.optimizer(model, "adamw", lr=0.01)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        held = (optimizer.optim if zero else optimizer).state_bytes()
        ends.append((held, [p.detach() for p in model.parameters()]))
    (whole, one), (part, other) = ends
    same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return [] if same and part < 0.8 * whole else [f"ZeRO: {part} bytes of {whole}, the same bits: {same}"]
