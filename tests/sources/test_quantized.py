"""Scales of 4-bit weights: they move, the codes never do, and the result is an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.trace.tracker import Tracker
from lowmem.optim.source import Query
from lowmem.sources import SPSA, Scales
from lowmem.sources.quantized import is_four_bit, scales, unsaved

bnb = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*kernels.*:UserWarning"),
]


def linear(m: int, n: int, nested: bool) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        n, m, bias=False, compute_dtype=torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    return layer.to("cpu")


class Net(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.up, self.norm, self.down = linear(128, 64, nested), nn.LayerNorm(128), linear(64, 128, nested)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).relu())


def net(nested: bool = False) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(nested)


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - Y).square().mean()


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.data.clone() for n, m in model.named_modules() if is_four_bit(m)}


def absmax(model: nn.Module) -> list[Tensor]:
    return [m.weight.quant_state.absmax.detach().clone() for m in model.modules() if is_four_bit(m)]


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_codes_are_untouched_and_the_loss_falls(nested: bool) -> None:
    """Invariants 21 and 25: through training, evaluation and mode changes, AVX512-BF16 or not."""
    model = net(nested)
    whole = net(nested)
    with torch.no_grad():
        reference = loss_of(whole.train())
    before = codes(model)
    optimizer = lowmem.optimizer(model, "qzo", lr=0.3, queries=4, clip_slope=0.0)
    with torch.no_grad():
        start = loss_of(model.eval())
        torch.testing.assert_close(start, reference, rtol=1e-5, atol=0.0)  # nested scales decode to the same
        for step in range(60):
            model.train(step % 3 == 0)
            optimizer.backward(lambda: loss_of(model), model)
            optimizer.step()
            loss_of(model.eval())
        assert float(loss_of(model)) < 0.97 * float(start)
    after = codes(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(
        m.weight.quant_state.absmax is p for m, (_, p) in zip(layers(model), scales(model), strict=True)
    )
    assert all(float(a.min()) >= 0 and a.dtype == torch.float32 for a in absmax(model))


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if is_four_bit(m)]


def test_scales_are_seen_by_the_forward_pass_and_come_back() -> None:
    """Invariants 22 and 26: the sides differ; a hundred probes leave every bit, also when one raises."""
    model = net().eval()
    params = scales(model)
    before = absmax(model)
    source = SPSA(eps=0.1, structure=Scales())
    for step in range(100):
        (slope,) = source.backward(params, lambda: loss_of(model), model=model, query=Query(0, step))[1]
        assert slope.c != 0.0
    assert equal(absmax(model), before)

    def raising() -> Tensor:
        loss_of(model)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        source.backward(params, raising, model=model, query=Query(0, 0))
    assert equal(absmax(model), before)
    optimizer = lowmem.optimizer(model, "qzo", lr=0.0)
    optimizer.backward(lambda: loss_of(model), model)
    optimizer.step()
    assert equal(absmax(model), before)


def test_a_probe_takes_the_scales_of_one_layer_and_a_piece_of_noise_more_than_a_forward() -> None:
    """Two layers of 2 MiB where they are decoded, with 32 KiB of scales each."""
    model = nn.Sequential(linear(1024, 512, False), linear(512, 1024, False)).eval()
    params = scales(model)
    source, x = SPSA(eps=0.1, structure=Scales()), torch.randn(2, 512)

    def loss() -> Tensor:
        return model(x).square().mean()

    def peak(run: Any) -> int:
        run()  # what is made once is made here
        tracker = Tracker()
        tracker.register([p.data for _, p in params], "weights")
        before = tracker.live
        with tracker, torch.no_grad():
            tracker.enter("probe", "workspace")
            run()
        tracker.stop()
        return tracker.peak().total - before

    forward = peak(loss)
    probe = peak(lambda: source.backward(params, loss, model=model, query=Query(0, 0)))
    scale = 4 * params[0][1].numel()
    assert scale <= probe - forward <= 7 * scale  # a copy, and what Gaussian noise is made of on the way


def test_the_step_is_relative_and_ends_at_zero() -> None:
    """s <- max(s - lr s c z, 0), |c| at most the clip, by the directions that were probed."""
    for lr in (1e-3, 1e3):
        model = net().eval()
        params, before = scales(model), absmax(model)
        optimizer = lowmem.optimizer(model, "qzo", lr=lr, clip_slope=0.01)
        optimizer.backward(lambda m=model: loss_of(m), model)
        ((slope,),) = optimizer._evidence
        assert abs(slope.c) == pytest.approx(0.01)  # Invariant 24
        optimizer.step()
        for (name, p), s in zip(params, before, strict=True):
            z = slope.direction.draw(name, p.detach(), 0, p.numel())
            wanted = (s - lr * s * slope.c * z).clamp(min=0)
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-9)
            assert bool((p == 0).any()) == (lr > 1)


def test_slope_is_the_gradient_by_the_logarithm_of_the_scales() -> None:
    model = net().eval()
    params = scales(model)
    (slope,) = SPSA(eps=0.05, structure=Scales()).backward(
        params, lambda: loss_of(model).double(), model=model, query=Query(0, 0)
    )[1]
    shift, values = 0.05, []
    originals = [p.data for _, p in params]
    for side in (1, -1):
        for (name, p), s in zip(params, originals, strict=True):
            p.data = s * torch.exp(side * shift * slope.direction.draw(name, s, 0, s.numel()))
        with torch.no_grad():
            values.append(float(loss_of(model).double()))
    for (_, p), s in zip(params, originals, strict=True):
        p.data = s
    assert slope.c == pytest.approx((values[0] - values[1]) / (2 * shift), rel=1e-3)


def test_what_is_not_quantized_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--quantize nf4"):
        lowmem.optimizer(nn.Linear(4, 4), "qzo")


class Gptq(nn.Module):
    """GPTQ's layer, written out: w[k, n] = scales[g(k), n] (q[k, n] - 8), eight codes to an int32."""

    def __init__(self, m: int, n: int, group: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(m)
        codes = torch.randint(0, 16, (n // 8, 8, m), generator=generator)
        packed = (codes << (4 * torch.arange(8)[:, None])).sum(1)
        self.register_buffer("qweight", packed.to(torch.int32))
        spread = torch.rand(n // group, m, generator=generator)
        self.register_buffer("scales", (0.01 + 0.01 * spread).half())
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        codes = (self.qweight[:, None] >> (4 * torch.arange(8)[:, None]) & 15).flatten(0, 1)
        return x @ (self.scales.float().repeat_interleave(self.group, 0) * (codes - 8))


def hqq(m: int, n: int) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(m)
        plain = nn.Linear(n, m, bias=False)
    return core.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("make", [Gptq, hqq])
def test_other_quantizers_are_trained_by_the_same_settings(make: Any) -> None:
    """Codes stay and the loss falls, by the rate and the radius that serve NF4."""
    model = nn.Sequential(make(128, 64), nn.LayerNorm(128), nn.ReLU(), make(64, 128))
    params = scales(model)
    assert [name.rpartition(".")[2] for name, _ in params] == ["scale" if make is hqq else "scales"] * 2
    assert all(p is q for (_, p), (_, q) in zip(params, scales(model), strict=True))
    layers = [model[0], model[3]]
    before = [(layer.W_q if make is hqq else layer.qweight).clone() for layer in layers]
    optimizer = lowmem.optimizer(model, "qzo", lr=0.3, queries=4, clip_slope=0.0)
    with torch.no_grad():
        start = float(loss_of(model))
        for _ in range(60):
            optimizer.backward(lambda: loss_of(model), model)
            optimizer.step()
        assert float(loss_of(model)) < 0.97 * start
    assert equal([layer.W_q if make is hqq else layer.qweight for layer in layers], before)
    assert all(float(p.detach().min()) >= 0 for _, p in params)


def test_a_gptq_checkpoint_keeps_its_names() -> None:
    model = nn.Sequential(Gptq(16, 32))
    names = set(model.state_dict())
    scales(model)
    assert set(model.state_dict()) == names


def test_a_quantizer_that_cannot_be_saved_is_refused_by_the_trainer() -> None:
    class Layer(nn.Module):
        W_q, meta = torch.zeros(1), {"scale": torch.ones(1)}

    assert "saves no HQQ layers" in unsaved(nn.Sequential(Layer()))
    assert unsaved(net()) == ""


@pytest.mark.skipif(not hasattr(torch.ops, "bitsandbytes"), reason="bitsandbytes registers no operators here")
def test_a_repacked_model_is_refused_with_the_remedy() -> None:
    """Where the CPU repacks in eval mode, taking scales after that would take copies that nobody reads."""
    model = net().eval()
    with torch.no_grad():
        loss_of(model)
    if not getattr(model.up.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU does not repack")
    with pytest.raises(UserError, match="before the first forward pass"):
        lowmem.optimizer(model, "qzo")


def llama(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=nf4, device_map="cpu", dtype=torch.float32
    )


def test_a_language_model_is_saved_and_loaded_with_the_same_loss(tmp_path: Path) -> None:
    """Invariant 23: by save_pretrained and from_pretrained, as any quantized checkpoint."""
    import transformers

    model = llama(tmp_path)
    ids = torch.arange(40).view(2, 20)
    optimizer = lowmem.optimizer(model, "qzo", lr=0.02)
    before = codes(model)
    for _ in range(3):
        optimizer.backward(lambda: model(input_ids=ids, labels=ids).loss, model)
        optimizer.step()
    assert all(torch.equal(codes(model)[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", device_map="cpu")
    fresh = scales(again)  # also closes the trap
    assert equal([p.detach() for _, p in fresh], absmax(model))
    with torch.no_grad():
        losses = [float(m.eval()(input_ids=ids, labels=ids).loss) for m in (model, again)]
    assert losses[0] == losses[1]
