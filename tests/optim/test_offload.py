"""State in the host's memory, moved by a transfer that is as late as it may be, or as early."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.footprint import footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.replica import Parameter
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.release import release
from lowmem.optim.tensors.offload import Away, Pairs, home_of

SHAPES = {"0.weight": (48, 64), "1.weight": (64, 32), "2.weight": (16, 300), "norm": (64,)}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {"writer": "kahan"}),
    ("adamw_8bit", {}),
    ("galore", {"rank": 8, "update_proj_gap": 2}),
    ("adafactor", {"beta1": 0.9}),
    ("muon", {}),
    ("misa", {}),
]


class Buffers:
    """Copies between buffers of one memory: asked for, and done at the last or at the first moment.

    A slot holds rubbish before it is fetched and after it is given back, so that nobody can use what is
    not there.
    """

    def __init__(self, late: bool = True) -> None:
        self.late = late
        self.events: list[str] = []
        self.rooms: dict[int, Tensor] = {}
        self._outward: list[Callable[[], None]] = []
        self._inward: dict[int, Callable[[], None]] = {}

    def pinned(self, like: Tensor) -> Tensor:
        return like.clone()

    def room(self, size: int, device: torch.device) -> Tensor:
        self.rooms[len(self.rooms)] = room = torch.full((size,), 0xFF, dtype=torch.uint8)
        return room

    def fetch(self, slot: int, pairs: Pairs) -> None:
        self.events.append(f"fetch {slot}")
        before, self._outward = self._outward, []

        def done() -> None:
            for give in before:
                give()
            for here, there in pairs:
                here.copy_(there)

        self._inward[slot] = done
        if not self.late:
            self._inward.pop(slot)()

    def arrive(self, slot: int) -> None:
        self.events.append(f"arrive {slot}")
        for each in sorted(self._inward):
            self._inward.pop(each)() if each == slot else None

    def give(self, slot: int, pairs: Pairs) -> None:
        self.events.append(f"give {slot}")

        def done() -> None:
            for here, there in pairs:
                there.copy_(here)
                flat = here.as_strided((here.numel(),), (1,), here.storage_offset())
                flat.view(torch.uint8).fill_(0xFF)

        self._outward.append(done)
        if not self.late:
            self._outward.pop()()

    def finish(self) -> None:
        for slot in sorted(self._inward):
            self._inward.pop(slot)()
        while self._outward:
            self._outward.pop(0)()


def started(name: str, options: dict[str, Any], home: Away | None = None) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in SHAPES.values()]
    named = list(zip(SHAPES, params, strict=True))
    groups = [
        {"params": named[:2], "role": "matrix", "weight_decay": 0.1},
        {"params": named[2:3], "role": "matrix", "lr": 3e-3},
        {"params": named[3:], "role": "vector"},
    ]
    strategy = lowmem.create(name, **options)
    return LowMemOptimizer(groups, strategy, lr=1e-2, compile="off", home=home), params


def advance(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
        optimizer.zero_grad()


def same(a: Any, pa: list[nn.Parameter], b: Any, pb: list[nn.Parameter]) -> None:
    x, y = a.state_dict()["state"], b.state_dict()["state"]
    assert x.keys() == y.keys()
    for i in x:
        assert list(x[i]) == list(y[i])
        assert all(torch.equal(x[i][key], y[i][key]) for key in x[i]), i
    assert all(torch.equal(p, q) for p, q in zip(pa, pb, strict=True))
    assert a.state_bytes() == b.state_bytes()


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_same_bits_and_resume_both_ways(name: str, options: dict[str, Any], late: bool) -> None:
    here, params = started(name, options)
    moved, others = started(name, options, Away(Buffers(late), least=0))
    advance(here, params, range(3))
    advance(moved, others, range(3))
    same(here, params, moved, others)
    for home, source in ((Away(Buffers(late), least=0), here), (None, moved)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        again, copies = started(name, options, home)
        for p, q in zip(copies, params, strict=True):
            p.data.copy_(q)
        again.load_state_dict(torch.load(file))
        advance(again, copies, range(3, 5))
        if home:
            whole, kept = copy.deepcopy((here, params))
            advance(whole, kept, range(3, 5))
        same(again, copies, whole, kept)


def test_each_state_travels_while_the_one_before_is_stepped() -> None:
    transfer = Buffers()
    optimizer, params = started("adamw", {}, Away(transfer, least=0))
    advance(optimizer, params, range(2))
    optimizer.home.settle()
    transfer.events.clear()
    advance(optimizer, params, range(2, 3))
    optimizer.home.settle()
    turns = [line for line in transfer.events if line != "fetch 0"]
    assert len([line for line in transfer.events if line.startswith("fetch")]) == len(params)
    for i, line in enumerate(transfer.events):
        kind, slot = line.split()
        if kind == "arrive" and i + 1 < len(transfer.events):  # the next is sent for before this one steps
            assert transfer.events[i + 1] in (f"fetch {1 - int(slot)}", f"give {slot}")
    assert len(turns) > len(params)
    largest = max(sum(x.nbytes for x in optimizer.state[p].values()) for p in params)
    assert len(optimizer.home.buffers) == 2
    assert all(len(room) <= largest + 3 * 256 for room in optimizer.home.buffers)


def test_released_and_small_tensors() -> None:
    """Backward goes the other way; what is stepped with others stays."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 4))

    transfer, ends = Buffers(), []
    for home in (None, Away(transfer, least=200)):
        net = model()
        optimizer = LowMemOptimizer(
            net.named_parameters(), lowmem.create("galore", rank=4, update_proj_gap=3), home=home
        )
        handle = release(optimizer, accumulation_steps=2)
        for step in range(8):
            handle.sync = bool(step % 2)
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
            net(x).square().sum().backward()
            if handle.sync:
                optimizer.step()
        ends.append((optimizer, list(net.parameters())))
    same(*ends[0], *ends[1])
    held = {tuple(p.shape) for p in ends[1][0].home._next}
    assert held == {(32, 16), (16, 32)}


def test_a_copy_goes_on_by_itself() -> None:
    optimizer, params = started("adamw", {}, Away(Buffers(), least=0))
    advance(optimizer, params, range(2))
    second, copies = copy.deepcopy((optimizer, params))
    advance(optimizer, params, range(2, 4))
    advance(second, copies, range(2, 4))
    same(optimizer, params, second, copies)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_is_refused() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        lowmem.optimizer([nn.Parameter(torch.ones(4, 4))], "adamw", offload_state=True)
    with pytest.raises(UserError, match="next to no state"):
        home_of(lowmem.create("mezo"))


def test_state_on_the_host_is_planned_as_it_will_be() -> None:
    """What is away, and the slots it travels to, are those of an optimizer that keeps it so."""
    shapes = {"0.weight": (600, 512), "1.weight": (512, 520), "norm": (512,)}
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    roles = ["matrix", "matrix", "vector"]
    planned = [Parameter(n, s, torch.float32, r) for (n, s), r in zip(shapes.items(), roles, strict=True)]
    for name in ("adamw_8bit", "galore"):
        groups = [
            {"params": [(n, p)], "role": role} for n, p, role in zip(shapes, params, roles, strict=True)
        ]
        optimizer = LowMemOptimizer(groups, lowmem.create(name), home=Away(Buffers()))
        optimizer.init_state()
        optimizer.home.settle()
        held = footprint(optimizer.strategy, planned, Run(offload_state=True, compile="off"), steps="none")
        plain = footprint(optimizer.strategy, planned, Run(compile="off"), steps="none")
        assert held.state_bytes == plain.state_bytes == optimizer.state_bytes()
        assert held.away == sum(x.nbytes for p in params[:2] for x in optimizer.state[p].values())
        assert plain.away == 0
        largest = max(len(room) for room in optimizer.home.buffers)
        assert held.tensors[-2:] == (-(-largest // 512) * 512,) * 2


def test_a_plan_says_what_is_moved_and_refuses_what_a_run_refuses() -> None:
    found = lowmem.plan("llama-3.2-1b", "adamw", seq_len=64, offload_state=True, advise=False).plans[0]
    usual = lowmem.plan("llama-3.2-1b", "adamw", seq_len=64, advise=False).plans[0]
    moved = found.to_dict()["offload"]
    assert moved["moved_bytes"] == 2 * moved["host_bytes"]
    assert 0.99 < moved["host_bytes"] / usual.state_bytes <= 1.0
    assert found.at_peak["optimizer_state"] < 0.5 * usual.at_peak["optimizer_state"]
    assert any("pinned host memory" in line for line in found.why)
    for options in ({"device": "cpu"}, {"ranks": 2}):
        with pytest.raises(UserError, match="offload_state"):
            lowmem.plan("gpt2", "adamw", offload_state=True, **options)
