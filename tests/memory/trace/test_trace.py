"""The trace without weights equals a real step: by our tracker exactly, by torch's to the last kilobyte."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig

from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.memory.trace.replica import trace
from lowmem.memory.trace.tracker import Tracker
from lowmem.models.computing.attention import attend_by_example
from lowmem.sources.directions import Pen
from lowmem.strategies import create
from tests.memory.families import FAMILIES, batch, loss, model, peaks_of

RUN = Run(batch_size=2, seq_len=48, dtype="float32", device="cpu", max_grad_norm=0.0)


def real_peaks(family: str, dtype: torch.dtype, checkpointing: bool) -> dict[str, dict[str, int]]:
    """Phases of a real step by our tracker: bytes by category."""
    return peaks_of(model(family, dtype, checkpointing=checkpointing), checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trace_equals_a_real_step_in_every_phase(family, checkpointing):
    config = FAMILIES[family]()
    run = Run(**{**vars(RUN), "gradient_checkpointing": checkpointing})
    found = {name: dict(moment.bytes) for name, moment in trace(config, run).moments.items()}
    assert found == real_peaks(family, torch.float32, checkpointing)
    assert config.use_cache  # the caller's configuration is left alone


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trace_in_16_bits_equals_a_real_step(family):
    run = Run(**{**vars(RUN), "dtype": "bfloat16"})
    found = {name: dict(moment.bytes) for name, moment in trace(FAMILIES[family](), run).moments.items()}
    assert found == real_peaks(family, torch.bfloat16, False)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_memtracker_sees_the_same_peak(family, checkpointing):
    made, inputs = model(family, checkpointing=checkpointing), batch()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    theirs = MemTracker()
    theirs.track_external(made, optimizer, *inputs.values())
    with theirs:
        loss(made, inputs).backward()
    peak = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]
    total = next(size for key, size in peak.items() if str(getattr(key, "value", key)) == "Total")
    run = Run(**{**vars(RUN), "gradient_checkpointing": checkpointing})
    moments = trace(FAMILIES[family](), run).moments.values()
    # scalars that torch's tracker does not see (the divisor of the loss)
    assert 0 <= max(m.total for m in moments) - total <= 4096


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers under an old name
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trace_of_adapters_equals_a_real_step(checkpointing):
    from peft import LoraConfig, get_peft_model

    base = model("llama", torch.bfloat16, checkpointing=checkpointing)
    made = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:  # as TRL does
        made.enable_input_require_grads()
    options = {"dtype": "bfloat16", "lora_rank": 4, "gradient_checkpointing": checkpointing}
    found = trace(FAMILIES["llama"](), Run(**{**vars(RUN), **options})).moments
    assert {n: dict(m.bytes) for n, m in found.items()} == peaks_of(made, checkpointing)


def test_release_keeps_one_gradient_and_names_each_step():
    config = FAMILIES["llama"]()
    held = trace(config, RUN)
    freed = trace(config, Run(**{**vars(RUN), "gradient_release": True}))
    names = {p.name for p in freed.parameters}
    assert set(freed.releases) == names
    every = sum(p.numel() for p in model("llama").parameters()) * 4
    assert held.moments["optimizer step"].bytes["gradients"] == every
    assert max(m.bytes["gradients"] for m in freed.releases.values()) < 2 * 512 * 64 * 4
    assert "optimizer step" not in freed.moments


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_release_equals_a_real_step_that_frees_its_gradients(family):
    found = trace(FAMILIES[family](), Run(**{**vars(RUN), "gradient_release": True}))
    real = peaks_of(model(family, torch.float32), released=True)
    assert {name: dict(m.bytes) for name, m in found.moments.items()} == real


def test_accumulation_holds_the_gradients_through_the_next_forward():
    once, twice = (trace(FAMILIES["llama"](), Run(**{**vars(RUN), "accumulation": n})) for n in (1, 4))
    gradients = twice.moments["loss forward"].bytes["gradients"]
    assert once.moments["loss forward"].bytes["gradients"] == 0
    assert gradients == once.moments["optimizer step"].bytes["gradients"]


def test_adapters_train_and_the_base_does_not():
    config = FAMILIES["llama"]()
    full = trace(config, RUN)
    lora = trace(config, Run(**{**vars(RUN), "dtype": "bfloat16", "lora_rank": 4}))
    options = {"dtype": "bfloat16", "lora_rank": 4, "quantize": "nf4", "adapter_dtype": "float32"}
    small = trace(config, Run(**{**vars(RUN), **options}))
    assert {p.dtype for p in lora.parameters} == {torch.float32}
    assert all("lora_" in p.name for p in lora.parameters)
    assert lora.total_parameters > full.total_parameters
    assert small.total_parameters == lora.total_parameters
    # NF4: half a byte per weight, one byte per 64, 4 bytes per 16384, an offset and the code tables
    linear = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 160)
    saved = lora.moments["forward"].bytes["weights"] - small.moments["forward"].bytes["weights"]
    tables = 3 * 7 * (1 + 16 + 256) * 4
    assert saved == linear * 2 - linear // 2 - linear // 64 - 3 * 7 * 4 - tables


def peak(rows: str, batch_size: int = 2, **options: object) -> int:
    run = Run(batch_size=batch_size, seq_len=128, rows=rows, **options)
    return max(m.total for m in trace(FAMILIES["llama"](), run).moments.values())


def test_padded_rows_pay_for_their_mask():
    mask = 2 * 128 * 128 * 2 * 3  # additive, 16 bits, saved in each of three layers
    assert peak("padded") - peak("full") >= mask


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_packed_rows_have_no_mask_and_cost_what_their_tokens_cost(device):
    two, four, eight = (peak("packed", n, device=device) for n in (2, 4, 8))
    # linear; the allocator's blocks of 512 bytes and the lengths themselves may differ a little
    assert abs((eight - four) - 2 * (four - two)) <= 64 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2.5", "qwen3"])  # dropout needs scores on a CPU
def test_packed_rows_equal_a_real_step_but_for_their_lengths(family, dtype):
    lengths = torch.tensor([5, 12, 1, 30])
    made, total = model(family, dtype), int(lengths.sum())
    attend_by_example(made)
    ids = torch.arange(total)[None] % 500
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    inputs = {"input_ids": ids, "labels": ids.clone(), "position_ids": positions, "cu_seq_lens_q": starts}
    run = Run(**{**vars(RUN), "dtype": str(dtype)[6:], "batch_size": 1, "seq_len": total, "rows": "packed"})
    found = {name: sum(m.bytes.values()) for name, m in trace(FAMILIES[family](), run).moments.items()}
    real = {name: sum(sizes.values()) for name, sizes in peaks_of(made, False, inputs).items()}
    assert found.keys() == real.keys()
    # the plan does not know how many examples there are: their starts, lengths and the scraps of cutting
    assert max(abs(found[name] - real[name]) for name in real) <= 64


def test_packed_rows_that_need_a_mask_pay_for_the_whole_batch():
    masked = {n: peak("packed", n, attention="eager") - peak("full", n, attention="eager") for n in (2, 4)}
    # scores between texts, and they grow with the square of the batch
    assert masked[4] >= 3 * masked[2] > 0


def test_chunked_loss_never_holds_the_logits():
    config = FAMILIES["llama"]()
    config.vocab_size = 32768
    plain, chunked = (
        trace(config, Run(batch_size=4, seq_len=128, loss=loss)).moments["loss backward"].bytes["logits"]
        for loss in ("plain", "chunked")
    )
    assert plain >= 12 * 4 * 128 * 32768
    assert chunked < plain / 2


def test_nothing_is_left_behind(monkeypatch):
    import transformers.masking_utils as masking

    names = ("dropout", "softmax", "scaled_dot_product_attention")

    def patched() -> tuple[object, ...]:
        return (masking.find_packed_sequence_indices, *(getattr(torch.nn.functional, n) for n in names))

    before = patched()
    trace(FAMILIES["gpt2"](), Run(batch_size=1, seq_len=16))
    assert patched() == before
    assert "lowmem_examples" not in transformers_attention()


def transformers_attention() -> list[str]:
    from transformers import AttentionInterface

    return list(AttentionInterface().valid_keys())


def test_global_generator_is_untouched():
    state = torch.random.get_rng_state()
    trace(FAMILIES["gpt2"](), Run(batch_size=1, seq_len=16))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mixture_of_experts_is_refused_with_the_reason():
    import transformers

    with pytest.raises(UserError, match="experts"):
        trace(transformers.PhimoeConfig(num_hidden_layers=2), Run(batch_size=1, seq_len=16))


def test_tracker_counts_a_storage_once_and_frees_it():
    tracker = Tracker(granularity=512)
    with tracker:
        tracker.enter("a")
        x = torch.empty(100)
        y = x.view(10, 10)
        y.add_(1)
        assert tracker.live == 512
        tracker.enter("b")
        del x, y
        assert tracker.live == 0
        torch.empty(200)
    moments = tracker.moments()
    assert (moments["a"].total, moments["b"].total) == (512, 1024)
    assert tracker.peak().event == "b"


def test_a_claim_holds_from_birth():
    tracker = Tracker()
    with tracker:
        tracker.enter("backward")
        x = torch.empty(8)
        tracker.claim(x, "gradients")
    assert tracker.moments()["backward"].bytes["gradients"] == 32


def test_a_large_tangent_is_drawn_at_once(monkeypatch):
    monkeypatch.setattr(Pen, "fill", lambda *args: pytest.fail("drawn piece by piece"))
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=1 << 15, num_hidden_layers=1, num_attention_heads=2
    )
    run = Run(seq_len=16, compile="on")
    found = trace(config, run, create("forward_gradient"))
    weights = found.moments["forward"].bytes["weights"]
    assert sum(found.moments["forward"].bytes.values()) - weights >= 0.99 * weights  # a tangent for each


def test_scores_of_packed_rows_are_those_of_their_texts_where_weights_carry_tangents():
    """Fused attention knows no tangents: the scores exist, as many as the longest text has tokens squared."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    run = Run(seq_len=512, rows="packed", loss="labels", label_tokens=8, device="cpu")

    def activations(strategy, longest):
        found = trace(config, dataclasses.replace(run, longest=longest), create(strategy))
        return found.moments["forward"].bytes["activations"]

    scores = 4 * 4 * 512 * 512  # bytes of the scores of four heads in fp32, of one text
    assert activations("forward_gradient", 512) > 2 * scores  # and a tangent
    assert activations("forward_gradient", 32) < scores / 4
    assert activations("mezo", 512) == activations("mezo", 32)
