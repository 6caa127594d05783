"""Packed rows: every example attends as if it were alone, and no mask exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.memory.run import Run
from lowmem.memory.trace import kernels
from lowmem.memory.trace.replica import trace
from lowmem.models.computing import attention
from tests.memory import families

LENGTHS = [5, 12, 1, 30]
TOKENS = sum(LENGTHS)
CAUSAL = sorted(set(families.FAMILIES) - {"gemma2"})  # which soft-caps its scores


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return without_dropout(families.model(request.param))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def row() -> dict[str, Any]:
    """A packed row as TRL collates it."""
    ids = torch.arange(TOKENS)[None] * 7 % 500
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "use_cache": False,
    }


def gradients(model: nn.Module, *logits: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every logit has a weight of its own, by the logits of consecutive tokens."""
    model.zero_grad()
    found = torch.cat(logits, dim=1)
    found.mul(torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())  # a key's bias has none
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=5e-6 * largest, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_examples_attend_as_if_alone(model, checkpointing):
    ids = row()["input_ids"].split(LENGTHS, dim=1)
    alone = [model(input_ids=one, use_cache=False).logits for one in ids]
    expected = gradients(model, *alone)
    assert attention.applies(model)
    attention.attend_by_example(model)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    packed = model(**row()).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-5)
    assert_alike(gradients(model, packed), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_adapters_attend_by_example_too():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(families.model("llama"), lora)
    expected = [model(input_ids=one).logits for one in row()["input_ids"].split(LENGTHS, dim=1)]
    attention.attend_by_example(model)
    torch.testing.assert_close(model(**row()).logits, torch.cat(expected, dim=1), rtol=0, atol=1e-5)


class Shapes(TorchDispatchMode):
    """Every shape that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.seen.add(tuple(x.shape))
        return out


def test_nothing_is_as_large_as_all_pairs_of_tokens():
    found = {}
    for own in (True, False):
        model = families.model("llama")
        if own:
            attention.attend_by_example(model)
        with Shapes() as shapes:
            model(**row()).logits.sum().backward()
        found[own] = any(shape[-2:] == (TOKENS, TOKENS) for shape in shapes.seen)
    assert found == {True: False, False: True}


def test_other_calls_give_what_they_gave(model):
    ids = torch.arange(24).view(2, 12) * 5 % 500
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    calls = [{}, {"attention_mask": mask}, {"position_ids": torch.arange(12)[None] % 7}]
    model.eval()
    before = [model(input_ids=ids, use_cache=False, **call).logits for call in calls]
    written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    attention.attend_by_example(model)
    for call, logits in zip(calls, before, strict=True):
        assert torch.equal(model(input_ids=ids, use_cache=False, **call).logits, logits)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again, written)


def test_half_precision_keeps_its_dtype_and_is_nearer_to_the_truth_than_a_mask():
    exact = families.model("llama")
    expected = exact(**row()).logits.detach()
    errors = {}
    for own in (True, False):
        model = families.model("llama").to(torch.bfloat16)
        if own:
            attention.attend_by_example(model)
        logits = model(**row()).logits.detach()
        assert logits.dtype == torch.bfloat16
        errors[own] = float((logits.float() - expected).norm())
    assert errors[True] <= 1.02 * errors[False]


def windowed(window: int) -> nn.Module:
    base = {name: value for name, value in families.BASE.items() if name != "max_position_embeddings"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.MistralForCausalLM(transformers.MistralConfig(**base, sliding_window=window))


@pytest.mark.parametrize("window", [max(LENGTHS), max(LENGTHS) - 1])
def test_a_window_that_an_example_exceeds_is_kept(window):
    model = windowed(window)
    expected = model(**row()).logits
    attention.attend_by_example(model)
    with Shapes() as shapes:
        logits = model(**row()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    masked = any(shape[-2:] == (TOKENS, TOKENS) for shape in shapes.seen)
    assert masked is (window < max(LENGTHS))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_where_it_does_not_apply():
    peft = pytest.importorskip("peft")
    assert not attention.applies(families.model("gemma2"))  # eager, for its soft cap
    eager = families.model("llama")
    eager.set_attn_implementation("eager")
    assert not attention.applies(eager)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert not attention.applies(peft.get_peft_model(families.model("llama"), prompts))


def test_it_is_switched_on_once():
    model = families.model("llama")
    attention.attend_by_example(model)
    assert attention.applies(model)
    attention.attend_by_example(model)
    assert len(model._forward_pre_hooks) == 1


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model = families.model("llama")
    attention.attend_by_example(model)
    model.save_pretrained(tmp_path)
    assert attention.PACKED not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("device", "capability"), [("cpu", None), ("cuda", 7.5)])
def test_a_plan_of_many_texts_in_a_row_looks_at_some_together(device, capability, monkeypatch):
    config = families.FAMILIES["llama"]()

    def sizes(pieces, rows):
        monkeypatch.setattr(kernels, "PIECES", pieces)
        run = Run(batch_size=rows, seq_len=16, rows="packed", device=device, compute_capability=capability)
        return {name: moment.total for name, moment in trace(config, run).moments.items()}

    assert sizes(4, 9) == sizes(100, 9)
    assert sizes(4, 8192)["forward"] > 0  # one by one, that is more than a trace may ask of a layer
