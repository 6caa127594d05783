"""VectorFit: the base at first, the right gradient, and an adapter like any other of PEFT."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.memory.trace.replica import trace
from lowmem.models.adapters import load_tuned, merge
from lowmem.models.peft_methods import adapter_config, attaching
from tests.memory import families
from tests.memory.test_quantized import measured

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IDS = torch.arange(24).view(2, 12) % 500


def adapted(base: nn.Module, args: str = "") -> Any:
    import peft

    config = adapter_config(Run(adapter="vectorfit", adapter_args=args))
    config.task_type = config.task_type if hasattr(base, "config") else None
    with attaching():
        return peft.get_peft_model(base, config)


def only(layer: nn.Module) -> nn.Module:
    """A model of one layer."""
    return nn.Sequential(OrderedDict(only=layer))


def moved(made: nn.Module) -> Any:
    """With vectors of its own, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "vectorfit" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made.eval()


def logits(made: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = made(IDS).logits
    return found


@pytest.mark.parametrize("family", ["opt", "gpt2"])  # linear layers with biases, and Conv1D
def test_it_starts_as_the_base_and_merges_into_what_it_computes(family: str) -> None:
    base = families.model(family).eval()
    before = logits(base)
    made = adapted(base)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"vectorfit_delta", "vectorfit_bias"}
    assert torch.equal(logits(made.eval()), before)
    after = logits(moved(made))
    assert not torch.allclose(after, before, atol=1e-2)
    made.merge_adapter()
    torch.testing.assert_close(logits(made), after)
    made.unmerge_adapter()
    torch.testing.assert_close(logits(made), after)
    with made.disable_adapter():
        torch.testing.assert_close(logits(made), before)
    torch.testing.assert_close(logits(made.merge_and_unload(safe_merge=True)), after)


def test_the_gradient_is_that_of_a_singular_value() -> None:
    """u_i' G v_i, with G the gradient of the whole weight and u_i, v_i numpy's; G v_i alone would not do."""
    import numpy as np

    layer = nn.Linear(5, 7)
    base = only(layer)
    x, goal = torch.linspace(-1, 1, 15).view(3, 5), torch.linspace(0, 1, 21).view(3, 7)
    (base(x) - goal).square().sum().backward()
    assert layer.weight.grad is not None
    U, S, V = np.linalg.svd(layer.weight.detach().double().numpy(), full_matrices=False)
    expected = np.einsum("mk,mn,kn->k", U, layer.weight.grad.double().numpy(), V)
    expected_bias = layer.bias.grad
    made = adapted(base, "target_modules=only,rank=3")
    (made(x) - goal).square().sum().backward()
    found = {name.split(".")[-2]: p.grad for name, p in made.named_parameters() if p.requires_grad}
    delta = found["vectorfit_delta"]
    assert delta is not None
    np.testing.assert_allclose(delta.numpy(), expected[:3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["vectorfit_bias"], expected_bias)
    assert (np.diff(S) < 0).all()  # the leading ones are those of the largest singular values


def test_a_saved_adapter_holds_vectors_alone_and_loads_and_merges(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.trainer.tiny_folder import make_model

    place = make_model(tmp_path / "base")
    base, _ = load_tuned(str(place), "float32")
    made = moved(adapted(base, "rank=8"))
    made.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"vectorfit_delta"}
    assert {t.numel() for t in saved.values()} == {8}
    loaded, _ = load_tuned(str(tmp_path / "adapter"), "float32", base=str(place))
    assert torch.equal(loaded(IDS % 200).logits, made(IDS % 200).logits)
    merge(tmp_path / "adapter", tmp_path / "whole", dtype="float32", base=str(place))
    whole, _ = load_tuned(str(tmp_path / "whole"), "float32")
    torch.testing.assert_close(whole(IDS % 200).logits, loaded(IDS % 200).logits)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "VECTORFIT"


def test_a_plan_counts_the_frozen_vectors_in_the_dtype_of_the_weights() -> None:
    made = adapted(families.model("llama", torch.bfloat16))
    run = Run(adapter="vectorfit", dtype="bfloat16", batch_size=2, seq_len=48, device="cpu")
    found = trace(families.FAMILIES["llama"](), run)
    bases = [layer.base_layer.weight for layer in made.modules() if hasattr(layer, "vectorfit_basis")]
    vectors = sum(2 * min(w.shape) * sum(w.shape) for w in bases)
    deltas = sum(4 * min(w.shape) for w in bases)
    plain = trace(families.FAMILIES["llama"](), Run(dtype="bfloat16", batch_size=2, seq_len=48, device="cpu"))
    rows = [one.moments["optimizer step"].bytes["weights"] for one in (found, plain)]
    assert rows[0] - rows[1] == vectors + deltas
    assert rows[0] == measured(made)["optimizer step"]["weights"]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ("rank=1.5", "rank is a number from 1 on or a share below 1, got 1.5"),
        ("freeze_every=0", "freeze_every is 1 or more"),
        ("freeze_beta=1", "freeze_beta is at least 0 and below 1"),
        ("rnk=2", "did you mean 'rank'"),
        ("target_modules=.*embed_tokens", "embed_tokens is Embedding, no linear layer"),
    ],
)
def test_what_it_does_not_take_is_said_in_one_line(args: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        adapted(families.model("llama"), args)
    assert "\n" not in str(refused.value)


def test_weights_that_are_codes_are_refused_by_the_layer_too() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="a Linear holds codes"):
        adapted(only(layer), "target_modules=only")
