"""FRUGAL against a plain transcription; what is active is read off the weights, not off the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from tests.oracles import drive
from tests.oracles.dense.reference_adamw import AdamW
from tests.oracles.low_rank.reference_frugal import Frugal

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": 0.0}
GAP = 4
MASKED = ["columns", "randk"]
SPLITS = [*MASKED, "svd"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("frugal")


@pytest.fixture
def key() -> str:
    return drive.name_without_offset(GAP)


def follow(
    start: Tensor, grads: list[Tensor], key: str = "w", watch: Any = None, **options: Any
) -> list[Tensor]:
    hyper = options.pop("hyper", HYPER)
    return drive.follow("frugal", start, grads, key=key, watch=watch, hyper=hyper, **options)


def share(split: str, density: float) -> dict[str, Any]:
    """Options for a share of columns, elements, directions, or of whole tensors; 1.0 is all there is."""
    if split == "blocks":
        return {"projector": "none", "schedule": "blocks", "density": density, "switch_gap": GAP}
    return {"projector": split, "rank": 256 if density == 1.0 else density, "update_proj_gap": GAP}


def active_entries(before: Tensor, after: Tensor, lr: float) -> Tensor:
    """After a reset the first step of an active entry is lr; that of another a tenth of it."""
    return (before - after).abs() > 0.5 * lr


@pytest.mark.parametrize("split", MASKED)
@pytest.mark.parametrize("shape", [(6, 12), (12, 6), (8, 8)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_masked_splits_are_the_algorithm(
    split: str, shape: tuple[int, int], weight_decay: float, key: str
) -> None:
    start, grads = torch.zeros(shape), drive.gradients(shape, 11)
    hyper = {**HYPER, "weight_decay": weight_decay}
    ours = follow(start, grads, key, **share(split, 0.5), residual_scale=0.1, hyper=hyper)
    truth = Frugal(start.double(), residual_scale=0.1, **hyper)
    for t, (g, w) in enumerate(zip(grads, ours, strict=True)):
        if t % GAP == 0:
            truth.refresh(mask=active_entries(truth.w * (1 - hyper["lr"] * weight_decay), w, hyper["lr"]))
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", MASKED)
@pytest.mark.parametrize("density", [0.25, 0.5])
def test_the_active_part_has_its_size_and_changes_at_a_refresh(split: str, density: float, key: str) -> None:
    shape = (8, 12)
    start, grads = torch.zeros(shape), drive.gradients(shape, 3 * GAP)
    ours = follow(start, grads, key, **share(split, density), residual_scale=0.1)
    masks = [active_entries(a, b, 1e-2) for a, b in zip([start, *ours], ours, strict=False)][::GAP]
    for mask in masks:
        assert int(mask.sum()) == int(density * 12) * 8 if split == "columns" else int(density * 96)
        if split == "columns":
            lines = mask.sum(0) if (mask.sum(0) % 8 == 0).all() else mask.sum(1)
            assert set(lines.tolist()) <= {0, *shape}
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])


@pytest.mark.parametrize("split", MASKED)
def test_an_inactive_entry_moves_by_lr_times_scale_exactly(split: str, key: str) -> None:
    start, grads = torch.zeros(8, 12), drive.gradients((8, 12), GAP)
    ours = follow(
        start, grads, key, **share(split, 0.25), residual_scale=0.125, hyper={**HYPER, "lr": 2.0**-6}
    )
    inactive = ~active_entries(start, ours[0], 2.0**-6)
    moved = torch.stack(ours).diff(dim=0, prepend=start.unsqueeze(0)).abs()
    assert (moved[:, inactive] == 2.0**-9).all()


@pytest.mark.parametrize("residual_scale", [0.1, 1.0])
def test_svd_split_is_adam_in_the_basis_and_sign_descent_of_the_rest(residual_scale: float, key: str) -> None:
    shape, rank = (8, 12), 2
    start, grads = drive.start_of(shape), drive.gradients(shape, 9)
    bases: list[Tensor] = []

    def look(optimizer: Any, p: Tensor) -> None:
        found = [v for v in optimizer.state[p].values() if tuple(v.shape) == (8, rank)]
        assert len(found) == 1
        bases.append(found[0].clone().double())

    ours = follow(start, grads, key, look, **share("svd", rank / 8), residual_scale=residual_scale)
    truth = Frugal(start.double(), residual_scale=residual_scale, **HYPER)
    for t, (g, w) in enumerate(zip(grads, ours, strict=True)):
        if t % GAP == 0:
            truth.refresh(basis=bases[t])
            seen = bases[t].mT @ g.double()
            best = torch.linalg.svdvals(g.double())[:rank].square().sum()
            torch.testing.assert_close(seen.square().sum(), best, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", [*SPLITS, "blocks"])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_density_one_is_adamw_within_a_window_and_restarts_after_it(
    split: str, shape: tuple[int, int], key: str
) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 2 * GAP)
    hyper = {**HYPER, "weight_decay": 0.1}
    ours = follow(start, grads, key, **share(split, 1.0), hyper=hyper)
    if split == "svd":
        plain = AdamW(start.double(), **hyper)
        expected = [plain.step(g) for g in grads]
        assert not torch.allclose(ours[0].double(), expected[0], atol=1e-6)  # Adam in another basis
        return
    adamw = drive.follow("adamw", start, grads[:GAP], hyper=hyper)
    for w, truth in zip(ours[:GAP], adamw, strict=True):
        assert torch.equal(w, truth)
    again = drive.follow("adamw", adamw[-1], grads[GAP:], hyper=hyper)
    for w, truth in zip(ours[GAP:], again, strict=True):
        torch.testing.assert_close(w, truth, rtol=0, atol=1e-7)


def test_svd_at_full_density_skips_the_sign_of_rounding_noise(key: str) -> None:
    """Without the guard the two differ by 0.08 after nine steps."""
    shape = (8, 12)
    start, grads = drive.start_of(shape), drive.gradients(shape, GAP)
    bases: list[Tensor] = []

    def look(optimizer: Any, p: Tensor) -> None:
        bases.extend(v.clone().double() for v in optimizer.state[p].values() if tuple(v.shape) == (8, 8))

    ours = follow(start, grads, key, look, **share("svd", 1.0))
    truth = Frugal(start.double(), **HYPER)
    truth.refresh(basis=bases[0])
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


NOTHING = [
    {"projector": "none", "residual": "drop", "rule": "signsgd", "vector": "adam"},
    {"projector": "none", "schedule": "blocks", "density": 0.0, "switch_gap": GAP},
]


@pytest.mark.parametrize("options", NOTHING, ids=["signsgd", "no block"])
def test_where_nothing_is_seen_it_is_sign_descent_and_holds_nothing(
    options: dict[str, Any], key: str
) -> None:
    """Over changes of the active tensors too, of which there are none."""
    shape, lr = (6, 12), 2.0**-6
    start, grads = torch.zeros(shape), drive.gradients(shape, GAP + 2)
    sizes: list[int] = []
    hyper = {**HYPER, "lr": lr}
    ours = follow(start, grads, key, lambda o, p: sizes.append(o.state_bytes()), **options, hyper=hyper)
    truth = start
    for g, w in zip(grads, ours, strict=True):
        truth = truth - lr * g.sign()
        assert torch.equal(w, truth)
    assert set(sizes) == {0}


def test_a_schedule_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="take residual=sign"):
        lowmem.create("frugal", projector="none", schedule="blocks", density=0.0, residual="drop")


@pytest.mark.parametrize("split", [*SPLITS, "random", "blocks"])
def test_every_step_has_full_rank(split: str, key: str) -> None:
    """What GaLore leaves out in a window takes its step here."""
    start, grads = torch.zeros(10, 16), drive.gradients((10, 16), GAP)
    for w in follow(start, grads, key, **share(split, 0.2), residual_scale=0.1):
        spectrum = torch.linalg.svdvals(w.double())
        assert float(spectrum[-1]) > 1e-2 * float(spectrum[0])


@pytest.mark.parametrize("split", MASKED)
def test_plain_residual_is_gradient_descent_on_the_rest(split: str, key: str) -> None:
    start, grads = torch.zeros(8, 12), [g.clamp(-3, 3) * 0.01 for g in drive.gradients((8, 12), GAP)]
    ours = follow(start, grads, key, **share(split, 0.25), residual="sgd", residual_scale=1.0)
    active = active_entries(start, ours[0], 1e-2)
    truth = Frugal(start.double(), residual="sgd", **HYPER)
    truth.refresh(mask=active)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_blocks_has_its_share_of_tensors_active_and_each_once_a_sweep(density: float) -> None:
    count, shape = 8, (4, 6)
    tensors = {f"layers.{i}.weight": torch.zeros(shape) for i in range(count)}
    optimizer, params = drive.on_weights(
        "frugal",
        tensors,
        hyper=HYPER,
        **share("blocks", density),
        residual_scale=0.1,
    )
    turns: list[set[str]] = []
    for t in range(int(GAP / density)):
        before = {name: p.detach().clone() for name, p in params.items()}
        drive.step(optimizer, params, {name: drive.gradients(shape, 1, seed=t)[0] for name in params})
        moved = {name for name, p in params.items() if active_entries(before[name], p.detach(), 1e-2).all()}
        if t % GAP == 0:
            turns.append(moved)
    assert all(len(turn) == round(density * count) for turn in turns)
    assert set().union(*turns) == set(tensors)
