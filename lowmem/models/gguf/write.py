r"""A model as one GGUF file, for llama.cpp and what is built on it.

The `gguf` package writes the file and knows what each tensor is called there. What is added here is
little, and is refused where it would be a guess: the numbers of a configuration; the vocabulary of
a byte-level BPE with the name that llama.cpp has for its pre-tokenizer, found by the very rule in
the tokenizer; and for Llama the order of the rows of Q and K, for there the two halves of a
rotated pair lie beside each other:

    row (head, half, i) -> row (head, i, half)

Matrices are written in the type asked for, vectors in fp32. Whatever is not known here (other
architectures, scaled rotations, SentencePiece) has a way through llama.cpp's own converter, and
the error says the command.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import UserError, nearest

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What matrices can be written in, and their name in the format."""
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_ENGLISH + r"\p{N}{1,3}" + _REST: "llama-bpe", _ENGLISH + r"\p{N}" + _REST: "qwen2"}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


class NotKnownError(UserError):
    """A model that only llama.cpp's own converter can write."""


def write(model: Any, tokenizer: Any, file: Path, kind: str = "bf16", name: str = "model") -> None:
    """Write a model and its tokenizer; the file appears when it is whole.

    Holds one tensor at a time beside the model.

    Args:
        model: causal language model of `ARCHITECTURES`, without adapters.
        tokenizer: byte-level BPE.
        file: to write; must not exist.
        kind: f32, f16, bf16 or q8_0, for matrices.
        name: for listings.

    Raises:
        NotKnownError: an architecture, a rotation or a tokenizer that is not known here.
        UserError: `file` exists, or an unknown kind.
    """
    import gguf

    check_kind(kind)
    check_target(file)
    numbers, words = _numbers(model.config), _vocabulary(tokenizer, model.config.vocab_size)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.resolve().parent) as beside:
        whole = Path(beside) / file.name
        writer = gguf.GGUFWriter(whole, model.config.model_type, use_temp_file=True)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + TYPES[kind]])
        for key, value in {**numbers, **words}.items():
            _add(writer, key, value)
        _tensors(writer, model, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(whole, file)


def check_kind(kind: str) -> None:
    """Refuse a type that is not in `TYPES`."""
    if kind not in TYPES:
        raise UserError(f"no type {kind!r}: {nearest(kind, TYPES)}")


def held_in(config: Any, kind: str, adapter: bool = False) -> str:
    """The dtype to load weights in, so that nothing is rounded before it is written as `kind`.

    Args:
        config: of the model, or of an adapter's base; kind: of matrices.
        adapter: whether one is merged first: its sum is rounded to that dtype.
    """
    own = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if adapter:
        return "bfloat16" if kind == "bf16" and own == "bfloat16" else "float32"
    narrow = "bfloat16" if kind == "bf16" else own
    return narrow if kind != "f32" and narrow in ("bfloat16", "float16") else "float32"


def check_target(file: Path) -> None:
    """Refuse a file that exists, or whose folder does not."""
    if file.exists():
        raise UserError(f"{file} exists: name another file")
    if not file.resolve().parent.is_dir():
        raise UserError(f"there is no folder {str(file.resolve().parent)!r}; create it first")


def check_config(config: Any) -> None:
    """Refuse what is not known here, before weights are read.

    Raises:
        NotKnownError: with what it is.
    """
    rope, act = getattr(config, "rope_parameters", None) or {}, getattr(config, "hidden_act", "silu")
    rules = [
        (config.model_type not in ARCHITECTURES, f"the architecture {config.model_type}"),
        (rope.get("rope_type", "default") != "default", f"rotations of the kind {rope.get('rope_type')}"),
        (config.model_type != "qwen2" and getattr(config, "attention_bias", False), "biases of attention"),
        (getattr(config, "mlp_bias", False), "biases of the MLP"),
        (getattr(config, "use_sliding_window", False), "a sliding window"),
        (act != "silu", f"the activation {act}"),
    ]
    for broken, what in rules:
        if broken:
            raise NotKnownError(f"{what} is not known here")


def commands(folder: str, file: Path, kind: str) -> list[str]:
    """What to type, line by line, to let llama.cpp convert a folder."""
    return [
        "git clone --depth 1 https://github.com/ggml-org/llama.cpp",
        "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt",
        f"python llama.cpp/convert_hf_to_gguf.py {shlex.quote(folder)} --outfile {shlex.quote(str(file))} "
        f"--outtype {kind}",
    ]


def _numbers(config: Any) -> dict[str, Any]:
    """The numbers of a configuration under their names in the format."""
    check_config(config)
    arch, heads = config.model_type, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    values = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": head,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
    }
    return {f"{arch}.{key}": value for key, value in values.items()}


def _vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Tokens, their types, merges and special tokens."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"]["type"] != "BPE" or core["model"].get("byte_fallback"):
        raise NotKnownError(f"a tokenizer of the kind {core['model']['type']} is not known here")
    pre = _pre_tokenizer(core.get("pre_tokenizer") or {})
    _check_words(core, pre)
    words = {at: token for token, at in tokenizer.get_vocab().items()}
    added = {token["id"]: _CONTROL if token["special"] else _USER for token in core["added_tokens"]}
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [words.get(at, f"[PAD{at}]") for at in range(rows)],
        "token_type": [added.get(at, _NORMAL) if at in words else _UNUSED for at in range(rows)],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in core["model"]["merges"]],
        "add_bos_token": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        **{f"{key}_token_id": at for key, at in special.items() if at is not None},
    }
    return {f"tokenizer.ggml.{k}": v for k, v in found.items() if v != []} | _templates(tokenizer)


def _templates(tokenizer: Any) -> dict[str, Any]:
    """The chat template; of several the default one has no name, the others are listed."""
    told = tokenizer.chat_template or {}
    named = {"default": told} if isinstance(told, str) else dict(told)
    found = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"}
    if found:
        found["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    return found | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})


def _check_words(core: Mapping[str, Any], pre: str) -> None:
    """Refuse what llama.cpp does not do to text or words, and would read other tokens without.

    NFC is left out by its own converter too; it takes whole words before merges for llama-bpe alone.
    """
    changes, kind = core.get("normalizer"), core["model"]
    if changes and changes["type"] != "NFC":
        raise NotKnownError(f"a tokenizer that changes text first ({changes['type']}) is not known here")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if kind.get(name) and (name, pre) != ("ignore_merges", "llama-bpe"):
            raise NotKnownError(f"a tokenizer with {name} is not known here")


def _pre_tokenizer(rule: Mapping[str, Any]) -> str:
    """llama.cpp's name for a rule that splits text before the merges.

    Raises:
        NotKnownError: it has none that is known here.
    """
    parts = rule.get("pretokenizers", [rule])
    kinds = [part.get("type") for part in parts]
    split = parts[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if split in _SPLITS and not parts[1].get("use_regex"):
        return _SPLITS[split]
    if kinds[-1:] == ["ByteLevel"] and parts[-1].get("use_regex", True) and not parts[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
            return "smollm"
    raise NotKnownError("this way of splitting text before the merges is not known here")


def _add(writer: Any, key: str, value: Any) -> None:
    """One entry, in the type that readers expect of it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _tensors(writer: Any, model: Any, kind: str) -> None:
    """All tensors, renamed; the head is left out where it is the embedding."""
    import gguf

    config = model.config
    arch = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    heads = {"q_proj": config.num_attention_heads, "k_proj": kv_heads}
    for name, parameter in model.named_parameters():
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if to is None:
            raise NotKnownError(f"the tensor {name} is not known here")
        value = parameter.detach().float().cpu()
        layer = name.split(".")[-2]
        if config.model_type == "llama" and layer in heads:
            value = value.unflatten(0, (heads[layer], 2, -1)).transpose(1, 2).flatten(0, 2)
        kept = _type_of(value, kind)
        data = gguf.quants.quantize(value.contiguous().numpy(), kept)
        writer.add_tensor(to, data, raw_dtype=kept)


def _type_of(value: Any, kind: str) -> Any:
    """The type to keep a tensor in: blocks of q8_0 are 32 wide."""
    import gguf

    if value.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    fits = kind != "q8_0" or value.shape[-1] % 32 == 0
    return gguf.GGMLQuantizationType[TYPES[kind] if fits else "F16"]
