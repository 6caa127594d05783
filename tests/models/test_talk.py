"""Answers under settings that models bring along, and where they end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowmem.models.talk import Sampling, answer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """A Llama that says one letter for ever, and a tokenizer of bytes without an end."""
    core = Tokenizer(models.BPE(vocab={a: i for i, a in enumerate(LETTERS)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()[LETTERS.index("z")] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_beam_groups": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
    ],
)
def test_a_models_own_settings_leave_one_answer(settings: dict[str, Any], pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    told: list[str] = []
    said = answer(model, tokenizer, "a", told.append, Sampling(max_new_tokens=3))
    assert (said.text, "".join(told), said.ended) == ("zzz", "zzz", False)


def test_an_answer_ends_with_the_tokenizers_end(pair: tuple[Any, Any]) -> None:
    """An adapter's folder has a tokenizer, whose template ends answers, and no generation settings."""
    model, tokenizer = pair
    model.generation_config.eos_token_id = [LETTERS.index("a")]
    tokenizer.eos_token = "z"
    said = answer(model, tokenizer, "a", None, Sampling(max_new_tokens=3))
    assert (said.tokens, said.ended) == (1, True)
