"""Every architecture that transformers has a causal head for is planned, or refused in one line."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from transformers.utils import logging as verbosity

from lowmem.errors import UserError
from lowmem.memory.plan import plan
from lowmem.memory.trace import patience
from tests.memory.families import FAMILIES, batch, loss, model

TINY = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size", "max_seq_len"), 128),
    "num_key_value_heads": 2,
    "head_dim": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
ALSO: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 16},
    "cohere_compass_text": {"layer_types": None},
    "gptj": {"rotary_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64},
    "mpt": {"attn_config": {"alibi": True}},
    "persimmon": {"head_dim": None},
    "youtu": {"qk_rope_head_dim": 8, "qk_head_dim": None},
}
# planned today; a newer transformers may only add to them
PLANNED = {
    "apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "cwm",
    "diffllama", "ernie4_5", "exaone4", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3_text", "glm",
    "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "helium",
    "hunyuan_v1_dense", "lfm2", "llama", "ministral", "mistral", "mpt", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "openai-gpt", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
}  # fmt: skip
ENCODERS = ("bert", "camembert", "electra", "ernie", "megatron-bert", "rembert", "roberta", "roformer", "xlm")
CI = {*random.Random(5).sample(sorted(NAMES), 60), "bert", "falcon", "gptj", "mamba", "mixtral", "xlm"}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = verbosity.get_verbosity()
    verbosity.set_verbosity_error()
    yield
    verbosity.set_verbosity(before)


def tiny(kind: str) -> Any:
    """The architecture at two layers, as far as its configuration lets itself be shrunk."""
    made = CONFIG_MAPPING[kind]
    wanted = TINY | ALSO.get(kind, {})
    settable = {key: value for key, value in wanted.items() if _accepts(made, key)}
    for fields in (settable, {}):  # fields may depend on each other
        try:
            return made(**fields)
        except Exception:
            continue
    return pytest.skip("its configuration is made for one model only")


def _accepts(made: Any, key: str) -> bool:
    return key in getattr(made, "__dataclass_fields__", {}) or key in getattr(made, "attribute_map", {})


def answer(kind: str, **options: Any) -> str:
    """The binding event, or the refusal."""
    wanted = {"batch_size": 1, "seq_len": 32, "advise": False} | options
    config = tiny(kind)
    try:
        return plan(config, "adamw", **wanted).plans[0].event
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) <= 400
    return f"refused: {refusal}"


@pytest.mark.parametrize("kind", sorted(CI - PLANNED))
def test_planned_or_refused_in_one_line(kind):
    answer(kind)


OTHERS = sorted(set(NAMES) - CI - PLANNED)


@pytest.mark.parametrize(
    "kind",
    [kind if i % 3 == 0 else pytest.param(kind, marks=pytest.mark.thorough) for i, kind in enumerate(OTHERS)],
)
def test_all_the_others_too(kind):
    answer(kind)


@pytest.mark.parametrize("kind", sorted(PLANNED))
def test_these_are_planned(kind):
    assert not answer(kind).startswith("refused")


@pytest.mark.parametrize("kind", ["falcon", "gptj", "bamba", "gemma3_text"])
def test_levers_are_planned_as_well(kind):
    assert not answer(kind, advise=True).startswith("refused")


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_with_a_causal_head_is_refused(kind):
    assert "reads in both directions" in answer(kind)
    assert kind in answer(kind)


def test_a_decoder_made_of_an_encoder_is_planned():
    config = CONFIG_MAPPING["bert"](**{key: TINY[key] for key in ("hidden_size", "vocab_size")})
    config.num_hidden_layers, config.num_attention_heads, config.is_decoder = 2, 4, True
    assert plan(config, "adamw", batch_size=1, seq_len=32, advise=False).plans[0].state_bytes > 0


@pytest.mark.parametrize(("kind", "layers"), [("mamba", 24), ("mamba", 2), ("rwkv", 24)])
def test_a_walk_through_the_tokens_is_refused_at_once(kind, layers):
    config = CONFIG_MAPPING[kind](hidden_size=32, num_hidden_layers=layers)
    with pytest.raises(UserError, match="token by token"):
        plan(config, "adamw", seq_len=2048, advise=False)


def test_a_refusal_logs_no_traceback():
    records = []
    told = logging.getLogger("torch._subclasses.fake_tensor")
    handler = logging.Handler()
    handler.emit = records.append
    told.addHandler(handler)
    try:
        assert "does not run without data" in answer("gpt_neo", seq_len=256)  # longer than its mask
    finally:
        told.removeHandler(handler)
    assert (records, told.filters) == ([], [])


def test_what_is_asked_of_parameters_before_a_pass_is_no_walk(monkeypatch):
    monkeypatch.setattr(patience, "OPERATIONS", 3000)
    made, inputs = model("llama"), batch()
    weights = list(made.parameters())
    with patience.Patience(made).watching():
        assert all(p.requires_grad for _ in range(200) for p in weights)
        loss(made, inputs)


@pytest.mark.parametrize("method", ["lozo", "zo_adamu"])
def test_the_noise_that_a_probe_draws_before_a_layer_is_no_walk(method):
    options = {"device": "cpu", "compile": "off", "advise": False, "batch_size": 2, "seq_len": 48}
    assert plan(FAMILIES["llama"](), method, **options).plans[0].peak["allocated"]
