"""Tensors that a schedule puts aside: no gradient, no state, no step; and they are taken up again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory import count
from lowmem.optim.schedules.turns import Layers
from lowmem.optim.tensors.groups import param_groups
from lowmem.optim.tensors.resting import wake_all_

GAP = 2


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.lm_head = nn.Linear(8, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.lm_head(h)


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def optimizer_of(model: nn.Module, name: str = "badam", **options: Any) -> lowmem.LowMemOptimizer:
    return lowmem.optimizer(model, name, lr=0.01, weight_decay=0.1, switch_gap=GAP, **options)


def backward(model: nn.Module, step: int) -> set[str]:
    """The names that got a gradient."""
    model(torch.arange(9).roll(step)).square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_the_backward_pass_makes_gradients_for_one_layer_alone() -> None:
    model = net()
    optimizer = optimizer_of(model, order="ascending")
    for step in range(3 * GAP):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        active = {f"layers.{step // GAP}.weight", f"layers.{step // GAP}.bias"}
        assert backward(model, step) == active
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert bool(optimizer.state.get(p)) == (name in active)
            assert torch.equal(p.detach(), before[name]) != (name in active), name
        assert optimizer.state_bytes() == count.model_state_bytes(optimizer.strategy, model, step=step)


def test_what_is_of_no_layer_keeps_its_state_while_layers_take_turns() -> None:
    model = net()
    optimizer = optimizer_of(model, "lisa", count=1)
    for step in range(4 * GAP):
        made = backward(model, step)
        assert {"embed.weight", "lm_head.weight"} < made
        assert len(made) == 4
        optimizer.step()
        optimizer.zero_grad()
    assert int(optimizer.state[model.embed.weight]["age"]) == 4 * GAP


def test_a_sweep_takes_every_layer_once_and_resumes_in_its_order() -> None:
    model = net()
    optimizer = optimizer_of(model)
    seen = []
    for step in range(3 * GAP):
        if step == GAP + 1:  # as a new process would
            saved = copy.deepcopy(optimizer.state_dict())
            other = net()
            other.load_state_dict(model.state_dict())
            optimizer = optimizer_of(other)
            optimizer.load_state_dict(saved)
            model = other
        seen += sorted(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
    assert sorted(set(seen)) == sorted(n for n, _ in model.named_parameters() if n.startswith("layers"))
    assert all(seen.count(name) == GAP for name in seen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_knows_who_rests(copied: Any) -> None:
    model = net()
    optimizer, model = copied((optimizer_of(model, order="ascending"), model))
    for step in range(GAP + 1):
        made = backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert made == {"layers.1.weight", "layers.1.bias"}


def test_who_rests_is_trained_all_the_same() -> None:
    """A second optimizer, the plan and whoever counts see all of the model; a frozen tensor stays frozen."""
    model = net()
    model.embed.weight.requires_grad_(False)
    optimizer = optimizer_of(model)
    assert sum(p.requires_grad for p in model.parameters()) == 2
    assert sum(len(group["params"]) for group in param_groups(model)) == 7
    lowmem.optimizer(model, "adamw")
    assert sum(p.requires_grad for p in model.parameters()) == 7
    optimizer.step()
    wake_all_(optimizer.roster)
    assert sum(p.requires_grad for p in model.parameters()) == 7


def test_a_tensor_that_joins_waits_for_the_next_turn() -> None:
    model = net()
    layers = [(f"layers.{i}.{n}", p) for i in (0, 1) for n, p in model.layers[i].named_parameters()]
    optimizer = lowmem.LowMemOptimizer(layers, lowmem.create("badam", switch_gap=GAP, order="ascending"))
    backward(model, 0)
    optimizer.step()
    optimizer.add_param_group(
        {"params": [(f"layers.2.{n}", p) for n, p in model.layers[2].named_parameters()]}
    )
    assert not model.layers[2].weight.requires_grad


def test_layers_of_a_window() -> None:
    layers = tuple(range(5))
    windows = [Layers(1, "random", 2).active(layers, step, 0) for step in range(3)]
    assert frozenset().union(*windows) == set(layers)
    assert [len(window) for window in windows] == [2, 2, 2]  # the last is filled up
    drawn = [Layers(1, "drawn", 2).active(layers, step, 0) for step in range(50)]
    assert len(set(drawn)) > 5
    assert [Layers(1, "drawn", 2).active(layers, step, 0) for step in range(50)] == drawn
    assert [min(Layers(1, "descending").active(layers, step, 0)) for step in range(6)] == [4, 3, 2, 1, 0, 4]


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"'weight' is in no numbered layer; take a schedule"):
        optimizer_of(nn.Linear(8, 8, bias=False))
    with pytest.raises(UserError, match="switch_gap and layers must be at least 1"):
        Layers(0)


def test_a_layer_has_its_turn_as_a_whole() -> None:
    """Also where layers differ in which of their tensors follow which rule."""
    model = nn.ModuleList(nn.Linear(8, 8, bias=i > 0) for i in range(4))
    optimizer = lowmem.optimizer(model, "badam", switch_gap=1)
    turns = []
    for step in range(4):
        active = {name for name, p in model.named_parameters() if p.requires_grad}
        (layer,) = {name[0] for name in active}
        assert active == {name for name, _ in model.named_parameters() if name[0] == layer}
        turns.append(layer)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        assert optimizer.state_bytes() == count.model_state_bytes(optimizer.strategy, model, step=step)
    assert set(turns) == set("0123")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("badam", {"switch_gap": 1}),
        ("lisa", {"switch_gap": 1}),
        ("misa", {"switch_gap": 1}),
        ("frugal", {"projector": "none", "schedule": "blocks", "switch_gap": 1}),
    ],
)
def test_what_is_frozen_or_empty_has_no_turn(name: str, options: dict[str, Any]) -> None:
    model = net()
    model.layers[:2].requires_grad_(False)
    model.layers[2].empty = nn.Parameter(torch.empty(0, 4))
    optimizer = lowmem.optimizer(list(model.named_parameters()), name, lr=0.01, **options)
    for step in range(4):
        assert {n for n in backward(model, step) if n.startswith("layers")} <= {
            "layers.2.weight",
            "layers.2.bias",
        }
        optimizer.step()
        optimizer.zero_grad()
        if name in ("badam", "lisa"):  # of which roles, that a list of tensors does not tell, change nothing
            assert optimizer.state_bytes() == count.model_state_bytes(optimizer.strategy, model, step=step)


def test_layers_want_names(caplog: pytest.LogCaptureFixture) -> None:
    """Without them each tensor counts as a layer, which is said."""
    optimizer = lowmem.optimizer(net().parameters(), "badam")
    assert "badam goes by the numbers of layers in the names of parameters" in caplog.text
    assert sum(p.requires_grad for p in optimizer.roster.places) == 1
    caplog.clear()
    lowmem.optimizer(net().named_parameters(), "badam")
    assert not caplog.text


def test_a_tensor_that_got_no_gradient_in_its_turn_is_no_lost_one() -> None:
    def made() -> tuple[Net, lowmem.LowMemOptimizer]:
        model = net()
        for layer in model.layers:
            layer.unused = nn.Linear(8, 8)
        return model, optimizer_of(model, order="ascending")

    model, optimizer = made()
    for step in range(GAP + 1):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    again, loaded = made()
    again.load_state_dict(model.state_dict())
    loaded.load_state_dict(saved)
    for one, steps in ((model, optimizer), (again, loaded)):
        backward(one, 9)
        steps.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    saved["state"].pop(max(saved["state"]))  # one that has been stepped
    with pytest.raises(lowmem.errors.CheckpointError, match=r"no optimizer state of 'layers\.1"):
        made()[1].load_state_dict(saved)


class Owner(nn.Module):
    """A model inside another one, as wrappers have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("name", ["badam", "lisa", "misa"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_of_the_model_alone_is_trained_as_a_whole(name: str, wrapped: bool) -> None:
    model = net()
    model.embed.weight.requires_grad_(False)
    optimizer = optimizer_of(model, name)
    optimizer_of(model, name).zero_grad()  # another one of the same model changes nothing
    copied = copy.deepcopy(Owner(model)).inner if wrapped else copy.deepcopy(model)
    wanted = {n for n, _ in model.named_parameters()} - {"embed.weight"}
    assert {n for n, p in copied.named_parameters() if not p.requires_grad} > {"embed.weight"}
    for one in (copied, copy.deepcopy(copied)):
        lowmem.optimizer(one, "adamw", lr=0.01)
        assert {n for n, p in one.named_parameters() if p.requires_grad} == wanted
    assert any(
        not p.requires_grad for n, p in model.named_parameters() if n in wanted
    )  # which still take turns
    wake_all_(optimizer.roster, model)
    assert vars(model).keys() == vars(net()).keys()


def test_a_pickled_model_needs_nothing_of_ours() -> None:
    model = net()
    optimizer_of(model)
    assert b"lowmem" not in pickle.dumps(model).replace(b"_lowmem_rests", b"")
