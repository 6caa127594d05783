"""Two values of the loss for a gradient: every read of a weight is displaced, none is left so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import lowmem
from lowmem.errors import UserError
from lowmem.memory.trace.tracker import Tracker
from lowmem.optim.source import Query
from lowmem.sources.directions import Perturbation
from lowmem.sources.spsa import SPSA, Slope

W = torch.empty(0)
"""Free directions do not look at the weight."""
NOISE = ["gaussian", "rademacher"]
VOCABULARY, WIDTH = 17, 8


def slope_and_truth(
    model: nn.Module, loss_fn: Callable[[], Tensor], step: int = 0, **options: Any
) -> tuple[float, float]:
    """c of one evaluation, and what it must be: the true gradient along the direction it names."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    (slope,) = SPSA(**options).backward(params, loss_fn, model=model, query=Query(0, step))[1]
    was = model.training
    model.eval().zero_grad()
    loss_fn().backward()
    model.train(was)
    drawn = {name: slope.direction.draw(name, p, 0, p.numel()).view(p.shape) for name, p in params}
    truth = sum(float((drawn[name] * p.grad).sum()) for name, p in params if p.grad is not None)
    return slope.c, truth


def agree(slope: tuple[float, float], rel: float = 1e-3) -> None:
    c, truth = slope
    assert c == pytest.approx(truth, rel=rel, abs=1e-4)
    assert abs(truth) > 1e-3  # or the test would say nothing


# ---- models that read their weights in every way there is ----


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 24)
        self.norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(24, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.down(self.drop(self.norm(F.gelu(self.up(self.embed(ids))))))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


class Tied(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class ReadsTheEmbedding(Plain):
    """Its head has no module: the embedding's weight is read after the embedding has run."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.embed.weight)


class ReadsAView(ReadsTheEmbedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.embed.weight.data.t()[:, :VOCABULARY]

    def truth(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.embed.weight.t()


class Attention(Plain):
    """torch's own reads the weights of its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.hidden(ids)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Nested(Plain):
    """A module that owns a weight and calls another that owns it too."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.weight.t() + self.inner(x)

    def __init__(self) -> None:
        super().__init__()
        self.outer = Nested.Outer(nn.Linear(WIDTH, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.outer(self.hidden(ids)))


class CallsForward(Plain):
    """Calling `forward` of a module instead of the module runs no hook."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head.forward(self.hidden(ids))


MODELS = [Plain, Tied, ReadsTheEmbedding, Attention, Nested, CallsForward]


def made(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().to(dtype)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(seed))
    return ids, (3 * ids + 1) % VOCABULARY


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    ids, target = batch(seed)
    return F.cross_entropy(model(ids).double().flatten(0, 1), target.flatten())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_every_read_is_displaced(kind: type[nn.Module]) -> None:
    """The slope is the gradient along z only if no read of a weight was missed."""
    model = made(kind, torch.float64).train()
    for step in range(2):  # the second time nothing is watched any more
        agree(slope_and_truth(model, lambda: loss_of(model, 1), step, eps=1e-4), rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between peft and transformers
def test_adapters_of_a_language_model_are_displaced() -> None:
    """LoRA on a tiny Llama: the adapters alone, whatever the base is made of."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base, lora)
    ids, _ = batch()
    agree(slope_and_truth(model, lambda: model(input_ids=ids, labels=ids).loss.double()), rel=2e-2)
    optimizer = lowmem.optimizer(model, "mezo", lr=1e-3)
    before = bits(model)
    optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert optimizer.state_bytes() == 0


def test_a_read_through_a_view_is_caught() -> None:
    model = made(ReadsAView, torch.float64)
    ids, target = batch()

    def loss(forward: Callable[[Tensor], Tensor]) -> Tensor:
        return F.cross_entropy(forward(ids).flatten(0, 1), target.flatten())

    c, _ = slope_and_truth(model, lambda: loss(model))
    _, truth = slope_and_truth(model, lambda: loss(model.truth))
    agree((c, truth))


def test_a_path_that_changes_later_is_caught() -> None:
    """First the head runs as a module, later its weight is read directly."""
    model = made(Tied, torch.float64)
    ids, target = batch()
    agree(slope_and_truth(model, lambda: loss_of(model)))

    def direct() -> Tensor:
        logits = F.linear(model.hidden(ids), model.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    agree(slope_and_truth(model, direct, 1))
    agree(slope_and_truth(model, lambda: loss_of(model), 2))


def test_held_weights_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = made(ReadsTheEmbedding)
    with caplog.at_level(logging.WARNING):
        slope_and_truth(model, lambda: loss_of(model))
    (record,) = caplog.records
    assert record.getMessage().endswith(f"({4 * VOCABULARY * WIDTH} bytes): embed.weight")


@pytest.mark.parametrize("kind", [Plain, Tied])
def test_ordinary_models_take_two_evaluations(kind: type[nn.Module]) -> None:
    model, count = made(kind), []
    for step in range(2):
        loss_fn = lambda: count.append(1) or loss_of(model)  # noqa: E731
        SPSA().backward(list(model.named_parameters()), loss_fn, model=model, query=Query(0, step))
    assert len(count) == 4


def test_without_a_model_and_with_weights_outside_of_it_all_is_displaced() -> None:
    model = made(Tied, torch.float64).eval()  # nobody turns dropout off where there is no model
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = [*model.named_parameters(), ("extra", extra)]
    found = []
    for owner in (model, None):
        loss_fn = lambda: loss_of(model) + extra.square().sum()  # noqa: E731
        found.append(SPSA().backward(params, loss_fn, model=owner, query=Query(0, 0))[1][0].c)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    without = SPSA().backward(params, lambda: loss_of(model), model=model, query=Query(0, 0))[1][0].c
    z = Perturbation("gaussian", (0, 0, 0, 0)).draw("extra", W, 0, 3)
    assert found[0] - without == pytest.approx(2 * float(z.sum()), rel=1e-6)


# ---- what is left behind ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_weights_keep_every_bit_and_their_memory(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = made(kind, dtype)
    before, places = bits(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    SPSA().backward(list(model.named_parameters()), lambda: loss_of(model), model=model, query=Query(0, 0))
    assert all(torch.equal(p, before[n]) and p.dtype == dtype for n, p in model.named_parameters())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("at", range(6))
def test_an_exception_inside_any_module_restores(at: int) -> None:
    """Raised in the forward of each module in turn, on the first and on the second side."""
    for side in (0, 1):
        model = made(Nested, torch.bfloat16).train()
        before, count = bits(model), []
        owners = [model.embed, model.up, model.norm, model.down, model.outer, model.outer.inner]

        def fail(*_: Any, count: list[int] = count, side: int = side) -> None:
            count.append(1)
            if len(count) > side:
                raise ValueError("no")

        inner = owners[at].forward
        owners[at].forward = lambda *a, f=inner, fail=fail: (f(*a), fail())[0]
        with pytest.raises(ValueError, match="no"):
            SPSA().backward(
                list(model.named_parameters()), lambda m=model: loss_of(m), model=model, query=Query(0, 0)
            )
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_module_gets_its_own_mode_back() -> None:
    model = made(Plain).train()
    model.drop.eval()
    seen = []
    model.drop.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    model.up.register_forward_pre_hook(lambda m, _: seen.append(m.training))
    SPSA().backward(list(model.named_parameters()), lambda: loss_of(model), model=model, query=Query(0, 0))
    assert not any(seen)
    assert model.up.training
    assert not model.drop.training


def test_a_frozen_weight_is_neither_displaced_nor_stepped() -> None:
    model = made(Plain)
    model.up.weight.requires_grad_(False)
    optimizer = lowmem.optimizer(model, "mezo", lr=1e-2, weight_decay=0.1)
    seen = []
    model.up.register_forward_hook(lambda m, *_: seen.append(m.weight.detach().clone()))
    before = bits(model)
    optimizer.backward(lambda: loss_of(model), model)
    optimizer.step()
    assert all(torch.equal(w, before["up.weight"]) for w in seen)
    assert torch.equal(model.up.weight, before["up.weight"])
    assert not torch.equal(model.down.weight, before["down.weight"])


# ---- the direction ----


@pytest.mark.parametrize("noise", NOISE)
def test_noise_does_not_depend_on_the_cutting(noise: str) -> None:
    z = Perturbation(noise, (3, 1, 4, 1))
    whole = z.draw("w", W, 0, 200_000)
    for start, stop in [(0, 1), (5, 4097), (4096, 9000), (65_535, 65_537), (123_456, 199_999)]:
        assert torch.equal(z.draw("w", W, start, stop), whole[start:stop])
    assert not torch.equal(z.draw("v", W, 0, 99), whole[:99])
    assert float(whole.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(whole.var()) == pytest.approx(1.0, abs=0.02)
    kurtosis = float(whole.pow(4).mean())
    assert kurtosis == pytest.approx(3.0 if noise == "gaussian" else 1.0, abs=0.1)


def test_noise_goes_on_past_32_bits() -> None:
    z, far = Perturbation("gaussian", (0, 0, 0, 0)), 1 << 32
    across = z.draw("w", W, far - 3000, far + 3000)
    assert torch.equal(across[3000:], z.draw("w", W, far, far + 3000))
    assert not torch.equal(across[3000:], z.draw("w", W, 0, 3000))


@pytest.mark.parametrize("noise", NOISE)
def test_what_is_probed_is_what_is_stepped(noise: str) -> None:
    """Displaced by eps z on both sides, moved by c z: the same z, in any layout."""
    z = Perturbation(noise, (0, 2, 0, 0))
    w = torch.randn(37, 2048, dtype=torch.float64)
    plus, minus = z.displaced("w", w, 0.5), z.displaced("w", w, -0.5)
    drawn = z.draw("w", W, 0, w.numel()).view(w.shape)
    torch.testing.assert_close(plus - minus, drawn.double(), rtol=0.0, atol=1e-6)
    turned = z.displaced("w", w.t().contiguous().t(), 0.5)
    assert turned.stride() == (1, 37)
    assert torch.equal(turned, plus)
    (_, g), *_ = SPSA(noise=noise).gradients([("w", nn.Parameter(w))], [(Slope(2.0, z),)])
    assert torch.equal(g.rows(3, 9), 2.0 * drawn[3:9])
    assert torch.equal(g.chunk(5000, 70_001), 2.0 * drawn.flatten()[5000:70_001])


@pytest.mark.parametrize("noise", NOISE)
def test_a_norm_weight_in_bf16_moves_in_the_mean(noise: str) -> None:
    """Near 1 the spacing is 2^-7: to nearest, a displacement of 1e-3 would be lost altogether."""
    w = torch.ones(1 << 18, dtype=torch.bfloat16)
    z = Perturbation(noise, (0, 0, 0, 0))
    moved = z.displaced("w", w, 1e-3).float() - z.displaced("w", w, -1e-3).float()
    drawn = z.draw("w", W, 0, w.numel())
    assert float(moved @ drawn / (2e-3 * drawn @ drawn)) == pytest.approx(1.0, abs=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler meets its own
@pytest.mark.parametrize("noise", NOISE)
def test_compiled_noise_is_the_eager_one(noise: str) -> None:
    eager, compiled = (Perturbation(noise, (0, 0, 0, 0), compile=on) for on in (False, True))
    a, b = (z.draw("w", W, 0, 10_000) for z in (eager, compiled))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert torch.equal(b[4000:9000], compiled.draw("w", W, 4000, 9000))
    w = torch.randn(10_000).bfloat16()
    one, other = eager.displaced("w", w, 1e-3), compiled.displaced("w", w, 1e-3)
    assert (one != other).sum() <= (0 if noise == "rademacher" else 5)


# ---- how evaluations combine ----


@pytest.mark.parametrize("noise", NOISE)
def test_a_quadratic_has_an_exact_slope_whatever_the_radius(noise: str) -> None:
    model = nn.Linear(12, 1, bias=False).double()
    x = torch.randn(30, 12, dtype=torch.float64)
    for eps in (1e-3, 0.5):
        agree(slope_and_truth(model, lambda: model(x).square().mean(), eps=eps, noise=noise), rel=1e-5)


def test_micro_batches_add_up_each_along_its_own_direction() -> None:
    model = made(Plain)
    optimizer = lowmem.optimizer(model, "mezo", lr=1e-2)
    before = bits(model)
    for seed in (0, 1):
        optimizer.backward(lambda seed=seed: loss_of(model, seed) / 2, model)
    slopes = [slope for evidence in optimizer._evidence for slope in evidence]
    assert len({slope.direction.name for slope in slopes}) == 2
    optimizer.step()
    for name, p in model.named_parameters():
        z = [s.direction.draw(name, p, 0, p.numel(), s.c).view(p.shape) for s in slopes]
        torch.testing.assert_close(p.detach(), before[name] - 1e-2 * (z[0] + z[1]), rtol=1e-6, atol=1e-7)


def test_zero_grad_forgets_an_evaluation() -> None:
    model = made(Plain)
    optimizer = lowmem.optimizer(model, "mezo", lr=1e-2)
    before = bits(model)
    optimizer.backward(lambda: loss_of(model), model)
    optimizer.zero_grad()
    with pytest.raises(UserError, match=r"nothing to go by: call optimizer\.backward"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_one_direction_over_micro_batches_is_the_large_batch() -> None:
    model = made(Tied, torch.float64)
    ids, target = batch()

    def part(rows: slice) -> Tensor:
        return F.cross_entropy(model(ids[rows]).flatten(0, 1), target[rows].flatten(), reduction="sum")

    params, total = list(model.named_parameters()), target.numel()
    whole = SPSA().backward(params, lambda: part(slice(0, 4)) / total, model=model, query=Query(0, 0))
    parts = SPSA().backward(
        params, lambda: (part(slice(0, 1)) + part(slice(1, 4))) / total, model=model, query=Query(0, 0)
    )
    assert whole[1][0].c == pytest.approx(parts[1][0].c, rel=1e-6)


def test_queries_are_averaged_and_their_variance_falls() -> None:
    """E |c z - g|^2 is (d + 1) |g|^2 for one normal direction, an eighth of that for eight."""
    model = nn.Linear(40, 1, bias=False).double()
    x = torch.randn(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params, source, sample = list(model.named_parameters()), SPSA(queries=8), []
    for step in range(250):
        _, evidence = source.backward(params, lambda: model(x).sum(), model=model, query=Query(0, step))
        (_, g), *_ = source.gradients(params, [evidence])
        sample.append(g.rows(0, 1).double() - x)
    deviation = torch.cat(sample)
    assert deviation.mean(0).abs().max() < 5 * float(deviation.std()) / 250**0.5
    energy = float(deviation.square().sum(1).mean() / x.square().sum())
    assert energy == pytest.approx(41 / 8, rel=0.15)


def test_closure_uses_the_model_the_optimizer_was_made_with() -> None:
    """The same step as by backward(loss, model); no second copy of all weights."""
    runs = []
    for closure in (True, False):
        model = made(Plain, torch.bfloat16)
        optimizer = lowmem.optimizer(model, "mezo", lr=1e-2)
        places = []
        model.down.register_forward_hook(lambda *_, m=model, d=places: d.append(m.up.weight.data_ptr()))
        before = model.up.weight.data_ptr()
        if closure:
            optimizer.step(lambda m=model: loss_of(m))
        else:
            optimizer.backward(lambda m=model: loss_of(m), model)
            optimizer.step()
        assert places == [before, before]  # one module later it is back
        runs.append(bits(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_loss_that_is_not_finite_leaves_every_weight_and_counts_it() -> None:
    model = made(Plain)
    optimizer = lowmem.optimizer(model, "mezo", lr=1.0, weight_decay=0.1)
    before = bits(model)
    optimizer.backward(lambda: loss_of(model), model)
    optimizer.backward(lambda: loss_of(model) * torch.nan, model)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.nonfinite() == sum(p.numel() for p in model.parameters())
    optimizer.step(lambda: loss_of(model))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- refusals ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler meets its own
def test_what_cannot_be_probed_is_refused_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Plain)
    params = list(model.named_parameters())
    inside = made(Plain)
    inside.up.compile()
    for compiled in (torch.compile(model), inside):
        with pytest.raises(UserError, match="torch_compile=False"):
            SPSA().backward(params, lambda: loss_of(model), model=compiled, query=Query(0, 0))
    with pytest.raises(UserError, match="one number"):
        SPSA().backward(params, lambda: model(batch()[0]), model=model, query=Query(0, 0))
    with caplog.at_level(logging.WARNING):
        SPSA().backward(params, lambda: loss_of(model).bfloat16(), model=model, query=Query(0, 0))
    assert "too coarse" in caplog.text
    for bad in (
        {"eps": 0.0},
        {"eps": float("nan")},
        {"eps": float("inf")},
        {"queries": 0},
        {"noise": "pink"},
    ):
        with pytest.raises(UserError):
            SPSA(**bad)


# ---- memory ----


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(512, 512), nn.Linear(512, 8192)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(self.small(x)).float().square().mean()


def peak_of(run: Callable[[], Any], model: nn.Module) -> int:
    tracker = Tracker()
    tracker.register(list(model.parameters()), "weights")
    before = tracker.live
    with tracker:
        tracker.enter("probe", "workspace")
        run()
    tracker.stop()
    return tracker.peak().total - before


def test_a_probe_takes_one_module_and_a_piece_of_noise_more_than_a_forward() -> None:
    model, x = Layers().bfloat16(), torch.randn(2, 512).bfloat16()
    source, params = SPSA(), list(model.named_parameters())
    owned = {
        name: [(p.shape, p.dtype) for p in module.parameters(recurse=False)]
        for name, module in model.named_modules()
    }
    largest = 2 * (512 + 1) * 8192
    assert source.probe_bytes(owned) == largest
    with torch.no_grad():
        forward = peak_of(lambda: model(x), model)
    probe = peak_of(lambda: source.backward(params, lambda: model(x), model=model, query=Query(0, 0)), model)
    assert largest <= probe <= forward + largest + (4 << 20)


def test_a_probe_can_be_planned_without_weights() -> None:
    with FakeTensorMode():
        model = Layers()
        x = torch.zeros(2, 512)
        source, params = SPSA(), list(model.named_parameters())
        loss, evidence = source.backward(params, lambda: model(x), model=model, query=Query(0, 0))
        assert loss.shape == ()
        assert [tuple(g.rows(0, 2).shape) for _, g in source.gradients(params, [evidence])][2] == (2, 512)
