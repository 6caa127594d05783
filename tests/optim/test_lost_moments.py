"""No step is many times the learning rate because a codec has lost a second moment beside a first one.

The pattern is always the same: large and small gradients share a block of a codec, and then an element's
gradient is exactly zero, as those of absent rows, dead units and experts without a token are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem
from lowmem.optim.codecs.blockwise import Codec, codec

LR = 1e-4
AT_MOST = 3.0
"""Times the learning rate."""

CHOICES = [
    (name, states)
    for name in ("adamw", "adamw_8bit", "galore", "frugal")
    for states in lowmem.available()[name].options["states"].choices or ()
] + [("adamw_4bit_rank1", "int4")]


@pytest.fixture(params=CHOICES, ids=lambda choice: "-".join(choice))
def choice(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A method and how it holds its moments."""
    found: tuple[str, str] = request.param
    return found


def random(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=g)


def largest_step(model: nn.Module, choice: tuple[str, str], losses: Iterator[Tensor], **hyper: Any) -> float:
    """The most that an element of the model moves in one step, in units of the learning rate."""
    name, states = choice
    sizes = {"rank": 8, "update_proj_gap": 16} if name == "galore" else {}
    optimizer = lowmem.optimizer(model, name, lr=LR, states=states, **sizes, **hyper)
    worst = 0.0
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        moved = [(p.detach() - w).abs().max() for p, w in zip(model.parameters(), before, strict=True)]
        worst = max(worst, *map(float, moved))
    return worst / LR


class Weight(nn.Module):
    """One matrix, whose gradient is given."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def losses(self, gradients: list[Tensor]) -> Iterator[Tensor]:
        return ((self.weight * g).sum() for g in gradients)


def one_large_element() -> list[Tensor]:
    g = torch.full((64, 64), 1e-5)
    g[3, 5] = 1.0
    return [g, *[torch.zeros(64, 64)] * 3]


def one_without_measure() -> list[Tensor]:
    """Its square has no fp32."""
    normal = random(0)
    gradients = [1e-3 * normal(64, 64) * (t % 3 == 0) for t in range(24)]
    gradients[0][3, 5] = 1e38
    return gradients


def rare_rows() -> list[Tensor]:
    """Embeddings: a row is there one time in five."""
    normal, gradients = random(1), []
    sizes = 10 ** (-5 * normal(256, 1).abs().clamp(max=1.0))
    for _ in range(40):
        gradients.append(normal(256, 64) * sizes * (normal(256, 1) > 0.84))
    return gradients


def rare_columns() -> list[Tensor]:
    """Large and small ones side by side in every block."""
    normal, gradients = random(2), []
    sizes = 10 ** (-6 * torch.rand(64, generator=torch.Generator().manual_seed(3)))
    for _ in range(40):
        gradients.append(normal(256, 64) * sizes * (normal(64) > 0.0))
    return gradients


def experts() -> list[Tensor]:
    """One sees every batch, the others one in turn for some steps, at another scale; a block has several."""
    normal, gradients = random(4), []
    sizes = 10 ** -torch.arange(0.0, 8.0).view(8, 1, 1)
    for t in range(48):
        seen = torch.zeros(8, 1, 1)
        seen[0] = seen[(t // 3) % 8] = 1.0
        gradients.append((normal(8, 2, 32) * sizes * seen).view(16, 32).repeat(8, 2))
    return gradients


@pytest.mark.parametrize(
    "pattern",
    [one_large_element, one_without_measure, rare_rows, rare_columns, experts],
    ids=lambda f: f.__name__,
)
def test_gradients_that_come_and_go(pattern: Callable[[], list[Tensor]], choice: tuple[str, str]) -> None:
    gradients = pattern()
    model = Weight(*gradients[0].shape)
    assert 0.2 < largest_step(model, choice, model.losses(gradients)) <= AT_MOST


@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_gradients_of_every_size_down_to_nothing(eps: float, choice: tuple[str, str]) -> None:
    """Moments decay for as long as a weight is not touched."""
    sizes = torch.logspace(-30, 0, 64).view(64, 1)
    model = Weight(64, 64)
    gradients = [random(5)(64, 64) * sizes, *[torch.zeros(64, 64)] * 40]
    assert largest_step(model, choice, model.losses(gradients), eps=eps, betas=(0.9, 0.95)) <= AT_MOST


@pytest.mark.parametrize("states", ["int4", "companded8"])
def test_a_moment_that_its_code_keeps(states: str) -> None:
    """Columns that are always there set the scale of blocks; the others had gradients once."""
    normal, sizes = random(21), 10 ** (-8 * torch.rand(64, 64, generator=torch.Generator().manual_seed(2)))
    there = torch.arange(64) % 32 == 0
    gradients = [torch.where(there, 1.0, normal(64, 64) * sizes * (t < 3)) for t in range(60)]
    model = Weight(64, 64)
    choice = ("adamw_4bit_rank1", states)
    assert largest_step(model, choice, model.losses(gradients), betas=(0.9, 0.95)) <= AT_MOST


def test_relu_net(choice: tuple[str, str]) -> None:
    """Units that are alive for some inputs only, at scales of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    normal = random(6)
    with torch.no_grad():
        model[0].bias -= 1.5 * torch.rand(128, generator=torch.Generator().manual_seed(7))
    sizes = 10 ** (-3 * torch.rand(64, generator=torch.Generator().manual_seed(8)))

    def losses() -> Iterator[Tensor]:
        for _ in range(40):
            yield ((model(2 * normal(2, 64)) - normal(2, 64)) * sizes).square().mean()

    assert largest_step(model, choice, losses()) <= AT_MOST


def test_untied_embeddings_of_a_llama(choice: tuple[str, str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(9)

    def losses() -> Iterator[Tensor]:
        for _ in range(24):  # low ids come often, high ones almost never
            ids = (255 * torch.rand(2, 12, generator=draw) ** 4).long()
            yield F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    assert largest_step(model, choice, losses()) <= AT_MOST


def unsigned(states: str) -> Codec:
    return codec(states, signed=False, stream="m")


class Draws:
    """Random bits for codecs that round at random."""

    def __init__(self, size: int) -> None:
        self.size = size

    def noise(self, use: str) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randint(-(2**31), 2**31 - 1, (self.size,), generator=g, dtype=torch.int32)


def back(made: Codec, x: Tensor) -> Tensor:
    constants = made.shared(x)
    hp: Any = Draws(x.numel())
    return made.decode(made.encode(x, hp, constants), constants)


STATES = ["fp32", "bf16", "int8", "int4", "companded8"]


@pytest.mark.parametrize("top", [1e36, 1.0, 1e-12, 1e-30, 1e-37])
@pytest.mark.parametrize("states", STATES)
def test_what_is_not_zero_does_not_become_zero(states: str, top: float) -> None:
    """Whatever it lies beside, and for as long as it decays."""
    made = unsigned(states)
    x = torch.logspace(-38, 36, 256).clamp(max=top)
    x[::4], x[1::32] = 0.0, top
    for _ in range(40):
        held = back(made, x)
        assert (held[x > 0.0] > 0.0).all()
        if states != "int4":  # its map has no zero
            assert (held[x == 0.0] == 0.0).all()
        x = held * 0.5
        x[x < 1e-37] = 0.0


@pytest.mark.parametrize("size", [1e30, 1e37, 1e38, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("states", STATES)
def test_what_is_finite_does_not_become_infinite(states: str, signed: bool, size: float) -> None:
    made = codec(states, signed=signed, stream="m")
    x = torch.tensor([1.0, 0.5, 0.25, 0.75]).repeat(64) * size
    x[::3] *= -1.0 if signed else 1.0
    held = back(made, x)
    assert held.isfinite().all()
    assert ((held - x).abs() / size).max() <= (0.12 if states == "int4" else 0.02)


@pytest.mark.parametrize("size", [1e-6, 3e-7, 1e-8, 1e-11])
@pytest.mark.parametrize("states", ["int8", "int4"])
def test_small_gradients_move_as_far_as_without_codes(states: str, size: float) -> None:
    """Their squares are far below 1e-12: a second moment that no longer moves would shorten the steps."""
    signal, normal = random(22)(64, 64), random(23)
    gradients = [(signal + normal(64, 64)) * size for _ in range(20)]
    moved = []
    for held in ("fp32", states):
        model = Weight(64, 64)
        optimizer = lowmem.optimizer(model, "adamw", lr=LR, states=held)
        for loss in model.losses(gradients):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved.append(model.weight.detach().norm())
    assert 0.9 < float(moved[1] / moved[0]) < 1.1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("states", ["int8", "int4"])
def test_blocks_of_nothing_are_held_as_torchao_holds_them(states: str, signed: bool) -> None:
    made = codec(states, signed=signed, stream="m")
    held = made.encode(torch.zeros(256), Draws(256), made.shared(torch.zeros(256)))  # type: ignore[arg-type]
    assert (held["scale"] == 1e-12).all()
