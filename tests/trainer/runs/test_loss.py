"""The loss over label positions equals the stock loss, values and gradients."""

import pytest
import torch
from tiny_models import CONFIGS, tiny

from lowmem.models.computing import loss as ours


def batch(rows: int = 3, length: int = 20, seed: int = 1) -> dict[str, torch.Tensor]:
    """Rows with a prompt, a labelled completion and padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, length), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(rows):
        labels[row, : 5 + row] = ours.IGNORE
        labels[row, length - row :] = ours.IGNORE
        mask[row, length - row :] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(seed: int = 2) -> dict[str, torch.Tensor]:
    """Three documents in one row, told apart by their positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (1, 24), generator=generator)
    positions = torch.cat([torch.arange(n) for n in (9, 5, 10)])[None]
    labels = ids.masked_fill(positions < 3, ours.IGNORE)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model, value, reference):
    torch.testing.assert_close(value, reference, rtol=1e-6, atol=0)
    got, expected = gradients(model, value), gradients(model, reference)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("inputs", [batch(), packed()], ids=["padded", "packed"])
def test_equals_the_models_own_loss_and_gradients(kind, inputs):
    model = tiny(kind)
    assert ours.supports(model)
    # With a cache the model does not look at where packed documents begin; no training uses one.
    assert_same(model, ours.label_loss(model, inputs), model(**inputs, use_cache=False).loss)


def test_softcap_is_applied():
    """A loss that went past the model's own forward would miss Gemma 2's cap."""
    model = tiny("gemma2")
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    value = ours.label_loss(model, batch())
    assert value < 2 * 3.0 + 4.2  # |logit| <= 3, so no token costs more than 2 * 3 + log 61
    torch.testing.assert_close(value, model(**batch()).loss)


def test_accumulated_windows_weigh_tokens_not_batches():
    """Two unequal micro-batches over the window's token count are the loss of all their tokens."""
    model = tiny()
    first, second = batch(rows=1, seed=3), batch(rows=4, length=12, seed=4)
    items = sum(int((b["labels"][:, 1:] != ours.IGNORE).sum()) for b in (first, second))
    value = ours.label_loss(model, first, items) + ours.label_loss(model, second, torch.tensor(items))
    token_sum = sum(model(**b, num_items_in_batch=1).loss for b in (first, second))
    assert_same(model, value, token_sum / items)


def test_only_label_positions_reach_the_head():
    model, seen = tiny(), []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    inputs = batch()
    ours.label_loss(model, inputs)
    handle.remove()
    assert seen == [(int((inputs["labels"][:, 1:] != ours.IGNORE).sum()), 61)]


def test_batch_without_labels_gives_zero_and_zero_gradients():
    model, inputs = tiny(), batch()
    inputs["labels"].fill_(ours.IGNORE)
    value = ours.label_loss(model, inputs)
    assert value == 0
    assert all(g.eq(0).all() for g in gradients(model, value).values())


def test_bf16_model_gets_an_fp32_loss():
    model = tiny(dtype=torch.bfloat16)
    value = ours.label_loss(model, batch())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, model(**batch()).loss, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads the old name
def test_lora_model_goes_the_same_way_and_virtual_tokens_do_not():
    import peft

    lora = peft.get_peft_model(
        tiny(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert ours.supports(lora)
    torch.testing.assert_close(ours.label_loss(lora, batch()), lora(**batch()).loss)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not ours.supports(peft.get_peft_model(tiny(), prompt))


def test_large_logits_are_left_to_the_chunked_loss():
    labels = torch.zeros(1, 1001, dtype=torch.long)
    assert ours.pays(labels, 30_000, 2)
    assert not ours.pays(labels, 150_000, 2)
    labels[:, :-200] = ours.IGNORE
    assert ours.pays(labels, 150_000, 2)
