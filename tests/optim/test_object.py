"""The optimizer as an object: what people do to a torch optimizer, they may do to this one."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import lowmem
from lowmem.errors import LowMemError, UserError
from lowmem.optim.engine.settings import NEUTRAL, Settings
from lowmem.optim.release import release
from lowmem.optim.schedules.schedule import Always
from tests.contract.runs import same
from tests.enrolled import unlike

GAP = 3


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        told = "-".join(str(value) for value in self.options.values() if isinstance(value, str))
        return "-".join(part for part in (self.name, told, "bf16" * (self.dtype == torch.bfloat16)) if part)

    @property
    def by_backward(self) -> bool:
        return bool(self.strategy.source.needs_autograd)

    @property
    def strategy(self) -> lowmem.Strategy:
        return lowmem.create(self.name, **self.options)

    def over(self, params: Any, **hyper: Any) -> lowmem.LowMemOptimizer:
        return lowmem.LowMemOptimizer(params, self.strategy, **{"lr": 1e-2, **hyper})


LOW = {"rank": 4, "update_proj_gap": GAP}
CASES = [
    *(Case(name) for name in unlike() if name not in ("galore", "frugal")),
    *(Case("galore", {**LOW, "states": s}) for s in ("fp32", "bf16", "int8", "int4", "companded8")),
    Case("frugal", {"projector": "columns", "update_proj_gap": GAP}),
    Case("frugal", {"projector": "none", "schedule": "blocks", "switch_gap": GAP}),
    *(Case("frugal", {"projector": s, "update_proj_gap": GAP}) for s in ("randk", "svd")),
    *(Case("adamw", {"writer": w}, torch.bfloat16) for w in ("nearest", "stochastic", "kahan", "split")),
    Case("galore", {**LOW, "states": "int8", "writer": "kahan"}, torch.bfloat16),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
some_cases = pytest.mark.parametrize(
    "case", [c for c in CASES if c.options.get("states") != "int4"][::3], ids=str
)


class Net(nn.Module):
    """Matrices of both sides, an embedding, a head, norms; one matrix above the size of a codec's worth."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 400, bias=False), nn.Linear(400, 12)])
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.lm_head(self.norm(x + self.layers[1](torch.tanh(self.layers[0](x))))).float()


def net(case: Case, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(case.dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = (torch.arange(8) * (step + 2)) % 11
    return nn.functional.cross_entropy(model(ids), (3 * ids + 1) % 11)


def advance(optimizer: Any, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.backward(lambda step=step: loss_of(model, step), model)
        optimizer.step()
        optimizer.zero_grad()


def started(case: Case, steps: int = GAP + 1, **hyper: Any) -> tuple[lowmem.LowMemOptimizer, Net]:
    model = net(case)
    optimizer = lowmem.optimizer(model, case.name, lr=1e-2, **hyper, **case.options)
    advance(optimizer, model, range(steps))
    return optimizer, model


def weights(params: Any) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [dict(optimizer.state[p]) for p in params_of(optimizer)]


def step_both(case: Case, first: Any, second: Any, steps: int = GAP + 1) -> None:
    """The same gradients to the parameters of two optimizers."""
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p, q in zip(params_of(first), params_of(second), strict=True):
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
            q.grad = p.grad.clone()
        for optimizer in (first, second):
            if case.by_backward:
                optimizer.step()
            else:
                optimizer.step(lambda o=optimizer: sum(p.float().sum() for p in params_of(o)))


# Copies


def reloaded(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), reloaded]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@every_case
def test_a_copy_lives(case: Case, copied: Callable[[Any], Any]) -> None:
    """It goes on by itself, as the original does, and neither touches the other."""
    optimizer, _ = started(case)
    before = weights(params_of(optimizer))
    other = copied(optimizer)
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    assert same(state_of(other), state_of(optimizer))
    assert not {id(p) for p in params_of(other)} & {id(p) for p in params_of(optimizer)}
    third = copied(optimizer)
    step_both(case, other, third)
    assert same(weights(params_of(optimizer)), before)
    step_both(case, optimizer, copied(third))
    assert same(weights(params_of(optimizer)), weights(params_of(other)))
    assert same(state_of(optimizer), state_of(other))
    assert not same(weights(params_of(other)), before)


def test_a_copy_made_with_its_model_steps_that_model() -> None:
    optimizer, model = started(CASES[0])
    other, twin = copy.deepcopy((optimizer, model))
    advance(other, twin, range(9, 10))
    assert not same(weights(twin.parameters()), weights(model.parameters()))
    advance(optimizer, model, range(9, 10))
    assert same(weights(twin.parameters()), weights(model.parameters()))


def test_a_copy_of_a_released_optimizer_is_an_ordinary_one() -> None:
    optimizer, _ = started(CASES[0])
    release(optimizer)
    assert optimizer.released
    assert not copy.deepcopy(optimizer).released


# State


@every_case
def test_clearing_the_state_resets(case: Case) -> None:
    """The step after it is that of an optimizer that has no past but its clock."""
    optimizer, _ = started(case)
    other = copy.deepcopy(optimizer)
    optimizer.state.clear()
    fresh = case.over(
        [{**g, "params": list(zip(g["param_names"], g["params"], strict=True))} for g in other.param_groups]
    )
    for group in fresh.param_groups:
        group["step"] = optimizer.param_groups[0]["step"]
    step_both(case, optimizer, fresh)
    assert same(weights(params_of(optimizer)), weights(params_of(fresh)))
    assert same(state_of(optimizer), state_of(fresh))


@every_case
def test_state_may_be_moved_away_and_back(case: Case) -> None:
    """Offloading replaces every state tensor by a copy, in the dict where it lies."""
    optimizer, _ = started(case)
    other = copy.deepcopy(optimizer)
    for held in optimizer.state.values():
        for key, value in held.items():
            held[key] = value.clone()
    step_both(case, optimizer, other)
    assert same(weights(params_of(optimizer)), weights(params_of(other)))
    assert same(state_of(optimizer), state_of(other))


def test_a_tensor_that_holds_nothing_is_not_asked_for_its_state_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = lowmem.optimizer(params := [nn.Parameter(torch.ones(4, 4)) for _ in range(3)], "signsgd")
    asked, init = [], lowmem.Strategy.init
    monkeypatch.setattr(lowmem.Strategy, "init", lambda *given: (asked.append(given), init(*given))[1])
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(asked) == len(params)
    assert not optimizer.state_bytes()


@some_cases
def test_entries_of_no_parameter_are_kept(case: Case) -> None:
    optimizer, model = started(case)
    optimizer.state["note"] = 1
    advance(optimizer, model, range(2))
    assert optimizer.state_bytes() >= 0
    fresh = lowmem.optimizer(net(case), case.name, lr=1e-2, **case.options)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state["note"] == optimizer.state["note"] == 1
    assert copy.deepcopy(fresh).state["note"] == 1


# Hooks


@every_case
def test_hooks_see_and_change_what_is_loaded(case: Case) -> None:
    optimizer, _ = started(case)
    saved = optimizer.state_dict()
    fresh = lowmem.optimizer(net(case, 1), case.name, lr=0.5, **case.options)
    seen: list[Any] = []

    def change(o: Any, state_dict: dict[str, Any]) -> None:
        seen.append({i: set(held) for i, held in state_dict["state"].items()})
        state_dict["param_groups"][0]["weight_decay"] = 0.25

    def replace(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        mine = copy.deepcopy(state_dict)
        mine["param_groups"][0]["lr"] = 0.003
        return mine

    def after(o: Any) -> None:
        seen.append(same(state_of(o), state_of(optimizer)))
        o.state["loaded"] = True

    for hook in (change, replace):
        fresh.register_load_state_dict_pre_hook(hook)
    fresh.register_load_state_dict_post_hook(after)
    fresh.load_state_dict(copy.deepcopy(saved))
    assert seen == [{i: set(held) for i, held in saved["state"].items()}, True]
    assert fresh.param_groups[0]["lr"] == 0.003
    assert fresh.param_groups[0]["weight_decay"] == 0.25
    assert fresh.state["loaded"]
    fresh.load_state_dict(copy.deepcopy(saved))  # nothing of the first call is left
    assert len(seen) == 4


def test_hooks_of_saving_and_stepping() -> None:
    optimizer, model = started(CASES[0], 0)
    said: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: said.append("before"))
    optimizer.register_step_post_hook(lambda *_: said.append("after"))
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(note=2))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "more": 3})
    advance(optimizer, model, range(1))
    saved = optimizer.state_dict()
    assert said == ["before", "after"]
    assert saved["state"]["note"] == 2
    assert saved["more"] == 3


# Groups


def pairs(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


@every_case
def test_the_number_of_groups_is_the_callers(case: Case) -> None:
    model = net(case)
    assert len(lowmem.optimizer(model, case.name, **case.options).param_groups) == 1
    assert len(case.over(model.parameters(), model=model).param_groups) == 1
    decays = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert len(lowmem.optimizer(model, case.name, decay_names=decays, **case.options).param_groups) == 2
    each = [{"params": [p], "lr": 1e-3 * i} for i, p in enumerate(model.parameters())]
    optimizer = lowmem.optimizer(each, case.name, model=model, **case.options)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3 * i for i in range(len(each))]


@every_case
def test_roles_do_not_depend_on_groups_or_names(case: Case) -> None:
    """Whatever the groups are like, with the model at hand each tensor follows the same rule."""
    model = net(case)
    decays = {name for name, p in model.named_parameters() if p.dim() > 1}
    made = [
        lowmem.optimizer(model, case.name, **case.options),
        lowmem.optimizer(model, case.name, decay_names=decays, **case.options),
        case.over(model.parameters(), model=model),
        case.over(pairs(model), model=model),
        case.over([{"params": p} for p in reversed(list(model.parameters()))], model=model),
    ]
    rules = [{place.name: (place.role, place.rule) for place in o.roster.places.values()} for o in made]
    assert all(found == rules[0] for found in rules)
    assert rules[0]["embed_tokens.weight"][0] == "embedding"
    assert rules[0]["lm_head.weight"][0] == "head"


@pytest.mark.parametrize(
    "numbers", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"role": "emb"}], ids=str
)
def test_a_refused_group_leaves_nothing_behind(numbers: dict[str, Any]) -> None:
    model = net(CASES[0])
    optimizer = CASES[0].over(pairs(model)[:2])
    bad = {"params": pairs(model)[2:], **numbers}
    before = copy.copy(bad), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError):
        optimizer.add_param_group(bad)
    assert (bad, optimizer.state_dict()) == before
    optimizer.add_param_group({"params": pairs(model)[2:]})
    advance(optimizer, model, range(1))


@pytest.mark.parametrize("bad", ["twice", "dtype", "unnamed", "not a tensor"])
def test_a_group_refused_for_its_tensors_leaves_nothing_behind(bad: str) -> None:
    model = net(CASES[0])
    optimizer = lowmem.LowMemOptimizer(pairs(model)[:2], lowmem.create("galore", writer="split"))
    tail: list[Any] = pairs(model)[2:]
    ruined = {
        "twice": [*tail, pairs(model)[0]],
        "dtype": [*tail, ("half", nn.Parameter(torch.ones(3, 3, dtype=torch.float16)))],
        "unnamed": [p for _, p in tail],
        "not a tensor": [*tail, ("list", [1.0])],
    }[bad]
    with pytest.raises((TypeError, ValueError)) as refusal:
        optimizer.add_param_group({"params": ruined})
    assert isinstance(refusal.value, LowMemError)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.named_parameters()) == 2
    optimizer.add_param_group({"params": tail})
    assert optimizer.named_parameters() == pairs(model)


@every_case
def test_a_group_joins_a_run(case: Case) -> None:
    """Unnamed tensors find their names and roles in the model; the clock is the run's."""
    model = net(case)
    late = [model.layers[1].weight, model.lm_head.weight]
    first = [p for p in model.parameters() if all(p is not q for q in late)]
    optimizer = case.over(first, model=model)
    for p in late:
        p.requires_grad_(False)
    advance(optimizer, model, range(GAP + 1))
    held = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in first}
    for p in late:
        p.requires_grad_(True)
    optimizer.add_param_group({"params": late, "lr": 1e-3})
    places = [optimizer.place(p) for p in late]
    assert [place.name for place in places] == ["layers.1.weight", "lm_head.weight"]
    assert [place.role for place in places] == ["matrix", "head"]
    assert {group["step"] for group in optimizer.param_groups} == {GAP + 1}
    for p in late:
        optimizer.step_param(p, torch.ones_like(p))
    assert all(same(dict(optimizer.state[p]), held[p]) for p in first)  # none lost, none stepped
    optimizer.load_state_dict(optimizer.state_dict())


def test_unnamed_groups_of_unknown_tensors_are_refused_beside_named_ones() -> None:
    optimizer = CASES[0].over(pairs(net(CASES[0])))
    with pytest.raises(UserError, match="names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))]})


def test_blocks_keep_their_moments_when_a_group_joins() -> None:
    case = Case("frugal", {"projector": "none", "schedule": "blocks", "density": 1.0, "switch_gap": 50})
    model = net(case)
    optimizer = case.over([model.layers[0].weight], model=model)
    for _ in range(2):
        model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
        optimizer.step()
    optimizer.add_param_group({"params": [model.layers[1].weight]})
    for _ in range(2):
        model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
        model.layers[1].weight.grad = torch.ones_like(model.layers[1].weight)
        optimizer.step()
    assert int(optimizer.state[model.layers[0].weight]["age"]) == 4
    assert not optimizer.state[model.layers[1].weight]  # it takes part when the blocks next change
    optimizer.load_state_dict(optimizer.state_dict())  # which the checkpoint knows


# Schedulers and wrappers that count groups


def decaying(case: Case, lr: Any) -> tuple[lowmem.LowMemOptimizer, Net]:
    model = net(case)
    decays = {name for name, p in model.named_parameters() if p.dim() > 1}
    return lowmem.optimizer(
        model, case.name, lr=lr, decay_names=decays, weight_decay=0.1, **case.options
    ), model


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.5**step, lambda step: 0.25**step]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, min_lr=[0.0, 1e-4]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@some_cases
def test_schedulers(case: Case, name: str, tensor: bool) -> None:
    """They count the groups, and write into lr and betas; an lr may be a tensor."""
    results = []
    for lr in (1e-2, torch.tensor(1e-2) if tensor else 1e-2):
        optimizer, model = decaying(case, lr)
        assert len(optimizer.param_groups) == 2
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(4):
            advance(optimizer, model, range(step, step + 1))
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        assert len({str(rate) for rate in rates}) > 1
        results.append(weights(model.parameters()))
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        fresh, _ = decaying(case, lr)
        fresh.load_state_dict(torch.load(saved, weights_only=True))
        assert [float(group["lr"]) for group in fresh.param_groups] == rates[-1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # an fp32 lr is not the float's


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
@some_cases
def test_zero_redundancy_optimizer(case: Case, alone: None) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if not case.by_backward:
        pytest.skip("it does not step by p.grad")
    model, twin = net(case), net(case)
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (1, 0)]
    sharded = ZeroRedundancyOptimizer(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}],
        optimizer_class=lowmem.LowMemOptimizer, strategy=case.strategy, lr=1e-2,
    )  # fmt: skip
    # it sorts the tensors, which are named by their place: what goes by names is the same for the same ones
    names, twins = ({id(p): name for name, p in sharded.optim.named_parameters()}, twin.parameters())
    named = {id(p): (names[id(p)], q) for p, q in zip(model.parameters(), twins, strict=True)}
    decaying, others = ([named[id(p)] for p in group] for group in groups)
    plain = case.over([{"params": decaying}, {"params": others, "weight_decay": 0.0}])
    for step in range(2):
        for optimizer, owner in ((sharded, model), (plain, twin)):
            loss_of(owner, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(sharded.param_groups) == 2
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
    assert not same(weights(model.parameters()), weights(net(case).parameters()))


# What torch refuses


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (torch.ones(3), TypeError),
        ([], ValueError),
        ([{"params": {nn.Parameter(torch.ones(3))}}], TypeError),
        ([[1.0]], TypeError),
        ([torch.ones(3, requires_grad=True) * 2], ValueError),
        ([("a", nn.Parameter(torch.ones(3))), nn.Parameter(torch.ones(3))], ValueError),
    ],
    ids=["tensor", "nothing", "set", "list", "not a leaf", "half named"],
)
def test_parameters_that_torch_refuses(params: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as ours:
        lowmem.optimizer(params, "adamw")
    assert isinstance(ours.value, UserError)


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError),
        ({"lr": "fast"}, TypeError),
        ({"betas": (1.0, 0.0)}, ValueError),
        ({"betas": 0.9}, TypeError),
        ({"eps": -1e-8}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
    ],
    ids=str,
)
def test_numbers_that_torch_refuses(numbers: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as ours:
        lowmem.optimizer([nn.Parameter(torch.ones(3))], "adamw", **numbers)
    assert isinstance(ours.value, UserError)


def test_a_parameter_twice_in_a_group_warns_as_torch_does() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"):
        CASES[0].over([p, p])


def test_sparse_gradients_are_refused_by_name_before_any_step() -> None:
    model = net(CASES[0])
    optimizer = CASES[0].over(pairs(model))
    before = weights(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.lm_head.weight.grad = torch.ones(11, 12).to_sparse()
    with pytest.raises(UserError, match=r"gradient of 'lm_head\.weight': it is sparse"):
        optimizer.step()
    assert same(weights(model.parameters()), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that csr is in beta
        rows = torch.ones(11, 12).to_sparse_csr()
    with pytest.raises(UserError, match=r"gradient of 'lm_head\.weight': it is sparse"):
        optimizer.step_param(model.lm_head.weight, rows)


def test_a_gradient_of_another_shape_is_refused() -> None:
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = CASES[0].over([("w", p)])
    with pytest.raises(UserError, match=r"'w': it has the shape \(6, 4\), the parameter \(4, 6\)"):
        optimizer.step_param(p, torch.ones(6, 4))
    with pytest.raises(UserError, match="in no group"):
        optimizer.step_param(nn.Parameter(torch.ones(2)), torch.ones(2))


# Settings of the caller


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "default dtype": default_dtype,
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def driven(case: Case, setting: Callable[[], Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    model = net(case)
    with setting():
        optimizer = lowmem.optimizer(model, case.name, lr=1e-2, **case.options)
        saved = None
        for step in range(2 * GAP):
            if case.by_backward:
                for i, p in enumerate(model.parameters()):
                    g = torch.Generator().manual_seed(100 * step + i)
                    p.grad = torch.randn(p.shape, generator=g, dtype=torch.float32, device="cpu").to(p.dtype)
                optimizer.step()
            else:
                optimizer.backward(lambda: sum(p.float().mean() for p in model.parameters()), model)
                optimizer.step()
            saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        optimizer.init_state()
        assert setting is nullcontext or Settings.now() != NEUTRAL
    return weights(model.parameters()), state_of(optimizer)


@pytest.mark.parametrize("setting", SETTINGS)
@every_case
def test_settings_of_the_caller_change_nothing(case: Case, setting: str) -> None:
    assert same(driven(case, SETTINGS[setting]), driven(case, nullcontext))


# Layouts


@every_case
def test_a_strided_vector_is_stepped_as_any_other(case: Case) -> None:
    """A column of a matrix, and a bias that is one: leaves whose elements do not lie side by side."""
    results = []
    for strided in (True, False):
        g = torch.Generator().manual_seed(0)
        wide = [
            torch.randn(*shape, 2, generator=g).to(case.dtype)[..., 0] for shape in ((10, 5), (10,), (5000,))
        ]
        assert not any(w.is_contiguous() for w in wide)
        params = [nn.Parameter(w if strided else w.contiguous()) for w in wide]
        optimizer = case.over(params)
        for _ in range(3):
            optimizer.step(lambda ps=params: differentiated(ps))
        results.append([p.detach().contiguous() for p in params])
        assert all(p.is_contiguous() != strided for p in params)
    assert same(results[0][1:], results[1][1:])
    # BLAS may add up a matrix in another order
    assert torch.allclose(results[0][0], results[1][0], atol=1e-3)


def differentiated(params: list[nn.Parameter]) -> Tensor:
    loss = sum((p.float() * torch.arange(1, p.numel() + 1).view(p.shape)).sin().sum() for p in params)
    assert isinstance(loss, Tensor)
    if torch.is_grad_enabled() and loss.requires_grad:
        for p in params:
            p.grad = None
        loss.backward()
        return loss.detach()
    return loss  # with the tangent that it may have


# Checkpoints


@pytest.mark.parametrize("named", [(True, False), (False, True)], ids=["loses names", "finds names"])
@some_cases
def test_a_checkpoint_with_names_where_there_are_none(
    case: Case, named: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    if case.strategy.schedule != Always():
        pytest.skip("which tensors hold state goes by their names")
    model, twin = net(case), net(case)
    first, second = (
        case.over(pairs(m) if has else m.parameters()) for m, has in zip((model, twin), named, strict=True)
    )
    advance(first, model, range(2))
    advance(second, twin, range(2))
    with caplog.at_level(logging.WARNING, "lowmem"):
        second.load_state_dict(first.state_dict())
    assert "names" in caplog.text
    # as torch has it: names that were saved are taken, names that were there are kept
    assert second.param_groups[0]["param_names"] == [name for name, _ in pairs(model)]
    assert len(second.roster.places) == len(pairs(model))
    advance(second, twin, range(2, 4))


def test_a_checkpoint_knows_the_roles(caplog: pytest.LogCaptureFixture) -> None:
    """Resumed without the model, with names and without: what was an embedding is one."""
    case = Case("galore", LOW)
    optimizer, model = started(case)
    for params in (pairs(net(case, 3)), list(net(case, 3).parameters())):
        fresh = case.over(params)
        fresh.load_state_dict(optimizer.state_dict())
        roles = [place.role for place in fresh.roster.places.values()]
        assert roles == [place.role for place in optimizer.roster.places.values()]
        assert same(state_of(fresh), state_of(optimizer))
    bare = case.over([{"params": list(model.parameters()), "roles": "{}"}], model=None)
    assert {place.role for place in bare.roster.places.values()} == {"matrix", "vector"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@every_case
def test_a_converted_distributed_checkpoint_resumes_exactly(case: Case, tmp_path: Path) -> None:
    """`dcp_to_torch_save` gives every tensor back row by row; a basis is held by columns."""
    optimizer, model = started(case)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "one.pt")
    saved = torch.load(tmp_path / "one.pt", weights_only=True)["optimizer"]
    saved.setdefault("state", {})
    fresh = net(case)
    fresh.load_state_dict(model.state_dict())
    second = lowmem.optimizer(fresh, case.name, lr=1e-2, **case.options)
    # of tensors that hold no state nothing is stored, which strict refuses
    set_optimizer_state_dict(fresh, second, saved, options=StateDictOptions(strict=False))
    strides = [{k: v.stride() for k, v in held.items()} for held in state_of(optimizer)]
    assert [{k: v.stride() for k, v in held.items()} for held in state_of(second)] == strides
    advance(optimizer, model, range(9, 9 + GAP))
    advance(second, fresh, range(9, 9 + GAP))
    assert same(weights(fresh.parameters()), weights(model.parameters()))
    assert same(state_of(second), state_of(optimizer))


def test_threads_of_two_devices_each_put_the_callers_settings_aside() -> None:
    """Autograd has a thread for each device; one that steps does not speak for the other."""
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = lowmem.LowMemOptimizer(weights, lowmem.create("adamw"), lr=0.1)
    seen: list[bool] = []

    def step() -> None:
        with torch.enable_grad():
            optimizer.step_param(weights[1], torch.ones(4))
            with optimizer._at_work():
                seen.append(torch.is_grad_enabled())

    with optimizer._at_work():
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert seen == [False]
    assert bool((weights[1] < 1.0).all())


def test_a_scaled_loss_is_the_plain_step_and_an_overflow_is_none() -> None:
    """torch's loss scaler over fp32 weights under autocast in float16: what a card without bf16 trains by."""
    weights = [nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8)) for _ in range(2)]
    plain, scaled = (
        lowmem.LowMemOptimizer([("w", w)], lowmem.create("adamw_8bit"), lr=0.01, seed=3) for w in weights
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    x = torch.linspace(0, 1, 32).view(4, 8)
    for step in range(4):
        for w in weights:
            with torch.autocast("cpu", torch.float16):
                loss = (x @ w).float().square().mean() * (torch.inf if step == 2 else 1.0)
            (scaler.scale(loss) if w is weights[1] else loss).backward()
        if step != 2:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        for optimizer in (plain, scaled):
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**11
    assert plain.param_groups[0]["step"] == scaled.param_groups[0]["step"] == 3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-3)
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 64).view(8, 8))
