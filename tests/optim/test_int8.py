"""Int8 weights: what a step does to codes and scales, and what layers see of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.models.int8.convert import dead_time, held_bytes, late, quantize_weights_
from lowmem.optim.int8.tensor import Int8Weight


def weight_of(x: Tensor) -> nn.Parameter:
    return nn.Parameter(Int8Weight.of(x))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved_by(steps: int, size: float, writer: str, count: int) -> Tensor:
    """By how many codes weights at their largest code move in steps of so many codes."""
    w = weight_of(torch.full((count // 256, 256), 1.27))
    before = w.decode()
    optimizer = lowmem.optimizer([w], "sgd", lr=0.01 * size, writer=writer)
    w.grad = torch.ones(w.shape)
    for _ in range(steps):
        optimizer.step()
    return (before - w.decode()) / 0.01


def test_a_step_of_a_ten_thousandth_of_a_code_is_taken_with_the_right_mean() -> None:
    moved = moved_by(128, 1e-4, "stochastic", 1 << 20)
    assert moved.mean().item() == pytest.approx(128e-4, rel=0.03)
    assert ((moved - moved.round()).abs() < 1e-3).all()  # whole codes


def test_eco_follows_the_sum_of_a_constant_gradient_and_nearest_stalls() -> None:
    assert (moved_by(300, 0.03, "eco", 256) - 9.0).abs().max().item() < 1.0
    assert moved_by(300, 0.03, "nearest", 256).abs().max().item() == 0.0


@pytest.mark.parametrize("writer", ["stochastic", "eco"])
def test_codes_that_take_no_step_stay_to_the_last_bit(writer: str) -> None:
    w = weight_of(random(6, 128))
    optimizer = lowmem.optimizer([w], "adamw", lr=1e-2, writer=writer)
    w.grad = random(6, 128, seed=1)
    optimizer.step()  # eco has errors now
    codes, scale = w.codes.clone(), w.scale.clone()
    held = {key: t.clone() for key, t in optimizer.state[w].items() if key.startswith("writer")}
    w.grad = torch.zeros(6, 128)
    w.grad[0, 0] = torch.inf
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(w.codes, codes)
    assert torch.equal(w.scale, scale)
    assert all(torch.equal(optimizer.state[w][key], t) for key, t in held.items())


def test_scales_follow_weights_that_grow_and_shrink() -> None:
    w = weight_of(random(2, 256))
    target = torch.cat([random(1, 256, seed=2) * 30, random(1, 256, seed=3) / 30])
    optimizer = lowmem.optimizer([w], "sgd", lr=0.1)
    for _ in range(200):
        w.grad = w.decode() - target
        optimizer.step()
    spacing = target.abs().amax(1, keepdim=True) / 127
    assert ((w.decode() - target).abs() / spacing).mean().item() < 4.0
    assert (w.codes.view(2, 256).abs().amax(1) >= 60).all()


def first_order() -> Iterator[str]:
    for name in lowmem.available():
        strategy = lowmem.create(name)
        probed = strategy.probes  # by a model's logits
        if strategy.source.needs_autograd and not strategy.turns and not probed:
            yield name


@pytest.mark.parametrize("name", list(first_order()))
def test_every_method_steps_codes_as_it_steps_the_weights_they_stand_for(name: str) -> None:
    w = weight_of(random(24, 80) * 0.1)
    dense = nn.Parameter(w.decode())
    stepped = lowmem.optimizer([w], name, lr=2e-4, weight_decay=0.1, writer="eco")
    master = lowmem.optimizer([dense], name, lr=2e-4, weight_decay=0.1)
    for step in range(3):
        w.grad = random(24, 80, seed=step + 1)
        dense.grad = w.grad.clone()
        for optimizer in (stepped, master):
            if optimizer.strategy.asks_loss:
                optimizer.add_loss(torch.ones(()))
            optimizer.step()
    spacing = w.scale.repeat_interleave(256)[: w.numel()].view(w.shape)
    # half a code, and what a block that was encoded anew had lost before; sketches step what they hold
    assert ((w.decode() - dense).abs() / spacing).quantile(0.99).item() < 1.01
    assert stepped.state_bytes() - master.state_bytes() == w.numel()  # the error, and no copy of the weight


class Two(nn.Module):
    """A linear layer and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 48)
        self.experts = nn.Parameter(random(3, 32, 48) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return torch.stack([hidden @ self.experts[i].t() for i in range(3)])


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_release_accumulation_and_resume_take_the_same_steps(name: str) -> None:
    options = {"rank": 8, "update_proj_gap": 2} if name == "galore" else {}
    model = quantize_weights_(Two())
    optimizer = lowmem.optimizer(model, name, lr=1e-2, **options)
    _train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = lowmem.optimizer(other, name, lr=1e-2, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    from lowmem.optim.release import release

    handle = release(resumed)
    _train(model, optimizer, range(3, 5))
    _train(other, resumed, range(3, 5))
    handle.remove()
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert isinstance(model.experts, Int8Weight)
    assert isinstance(model.layer.weight, Int8Weight)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        model(random(4, 32, seed=seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "kind", ["plain", "checkpointed", "autocast", pytest.param("compiled", marks=pytest.mark.thorough)]
)
def test_layers_see_what_codes_stand_for(kind: str) -> None:
    model = Two()
    quantize_weights_(model)
    dense = copy.deepcopy(model)
    dense.layer.weight = nn.Parameter(model.layer.weight.decode())
    dense.experts = nn.Parameter(model.experts.decode())
    x = random(4, 32)
    for one in (model, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            if kind == "compiled":
                loss = torch.compile(one, backend="aot_eager")(x).square().sum()
            elif kind == "checkpointed":
                loss = torch.utils.checkpoint.checkpoint(one, x, use_reentrant=False).square().sum()
            else:
                loss = one(x).square().sum()
        loss.backward()
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad, b.grad)


def test_a_layer_keeps_codes_between_forward_and_backward() -> None:
    model = quantize_weights_(nn.Linear(64, 64, bias=False))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(random(2, 64))
    assert [type(t) for t in saved if t.shape == (64, 64)] == [Int8Weight]


def test_tied_weights_stay_tied_and_ends_are_by_choice() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32), nn.Linear(32, 16, bias=False))
        model[2].weight = model[0].weight
        return model

    ids = torch.arange(8)
    assert not isinstance(quantize_weights_(tied())[0].weight, Int8Weight)
    model = quantize_weights_(tied(), embeddings=True)
    assert model[0].weight is model[2].weight
    assert held_bytes(model) == 512 + 8 + 1024 + 16 + 4 * 32
    dense = copy.deepcopy(model)
    dense[0].weight = dense[2].weight = nn.Parameter(model[0].weight.decode())
    model(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    assert torch.equal(model[0].weight.grad, dense[0].weight.grad)


def test_what_cannot_be_is_refused_with_the_way_out() -> None:
    model = quantize_weights_(nn.Linear(16, 16))
    with pytest.raises(UserError, match="int8 already"):
        quantize_weights_(model)
    with pytest.raises(UserError, match="unknown kind"):
        quantize_weights_(nn.Linear(4, 4), "int3")
    with pytest.raises(UserError, match="for int8 weights take"):
        lowmem.optimizer(model, "adamw", writer="kahan")
    stack = nn.ModuleList([nn.Linear(4, 4), nn.Module()])
    stack[1].experts = nn.Parameter(torch.ones(2, 3, 5))
    with pytest.raises(UserError, match=r"1\.experts is a stack .* 15 elements, which is no multiple"):
        quantize_weights_(stack)
    assert not isinstance(stack[0].weight, Int8Weight)  # refused as a whole
    assert stack[0].weight.numel() == 16
    with pytest.raises(UserError, match="change by a step"), torch.no_grad():
        model.weight.mul_(2.0)
    with pytest.raises(UserError, match="take qzo"):
        lowmem.optimizer(model, "mezo")
    assert dead_time(model, 1e-5) == pytest.approx(model.weight.scale.median().item() / 2e-5)


def test_codes_that_move_late_are_told() -> None:
    model = quantize_weights_(nn.Linear(16, 16))
    wait = dead_time(model, 1e-5)
    eco, stochastic = (lowmem.create("adamw", writer=writer) for writer in ("eco", "stochastic"))
    assert f"about {wait:.0f} steps" in late(model, eco, 1e-5, int(5 * wait))
    assert late(model, eco, 1e-5, int(20 * wait)) == ""
    assert late(model, stochastic, 1e-5, 1) == ""
