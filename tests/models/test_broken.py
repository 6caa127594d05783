"""Folders that hold no model: each kind of damage is one line, whoever stumbles over it first."""

import json
import os
import shutil
import struct

import pytest

from lowmem.errors import UserError
from lowmem.models.entries import resolve, skeleton
from lowmem.models.loading import load_model

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("whole")
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    return folder


def written(name, content):
    def damage(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return damage


def gone(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def folder_instead(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def config(**fields):
    def damage(folder):
        said = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))

    return damage


def header(change):
    """Rewrite the header of the weights, the bytes behind it as they are."""

    def damage(folder):
        raw = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        said = json.loads(raw[8 : 8 + length])
        change(said, min(name for name in said if name != "__metadata__"))
        text = json.dumps(said).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def index(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def loop(folder):
    (folder / "model.safetensors").unlink()
    os.symlink("model.safetensors", folder / "model.safetensors")


CONFIGS = {
    "no config": (gone("config.json"), "has no config.json"),
    "config is a folder": (folder_instead("config.json"), "has no config.json"),
    "config is no JSON": (written("config.json", "{nope"), "config.json is not JSON"),
    "config is empty": (written("config.json", ""), "config.json is not JSON"),
    "config is a list": (written("config.json", "[1]"), "holds a list, not an object"),
    "config is binary": (written("config.json", b"\xff\xfe\x00"), "is not UTF-8"),
    "config nests": (written("config.json", '{"a": ' + DEEP + "}"), "brackets nest more than 100 deep"),
    "config has digits": (written("config.json", '{"a": ' + "9" * 5000 + "}"), "a number has 5000 digits"),
    "no type": (config(model_type=...), "has no model_type"),
    "type is a list": (config(model_type=["llama"]), "no architecture"),
    "code of its own": (config(model_type="x", auto_map={"AutoConfig": "evil.py"}), "lowmem does not run"),
    "huge": (config(hidden_size=10**12), "hidden_size 1000000000000; it must be a number from 1"),
    "negative": (config(hidden_size=-32), "hidden_size -32"),
    "zero heads": (config(num_attention_heads=0), "num_attention_heads 0"),
    "text for a number": (config(hidden_size="32"), "hidden_size '32'"),
    "endless layers": (config(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "negative vocabulary": (config(vocab_size=-1), "vocab_size -1"),
    "heads that do not divide": (config(num_attention_heads=5, head_dim=...), "does not describe a model"),
    "unknown dtype": (config(dtype="bananas"), "does not describe a model: .*bananas"),
    "quantised by nobody": (config(quantization_config="4bit"), "does not describe a model|quantized"),
    "eps is a word": (config(rms_norm_eps="x"), "does not describe a model: .*rms_norm_eps"),
}
FILES = {
    "unknown activation": (config(hidden_act="bananas"), "bananas"),
    "other shapes": (config(vocab_size=9), "do not have the shapes"),
    "other layers": (config(num_hidden_layers=2), "9 tensors are not among the weights"),
    "no weights": (gone("model.safetensors"), "no weights"),
    "weights cut off": (half, "cannot read the model"),
    "weights empty": (written("model.safetensors", b""), "header too small"),
    "weights of noise": (written("model.safetensors", bytes(range(256)) * 9), "header too large"),
    "weights are a pointer": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "pointer of Git LFS.*run `git lfs pull` in ",
    ),
    "weights are a folder": (folder_instead("model.safetensors"), "cannot read the model"),
    "weights are a loop": (loop, "cannot read the model"),
    "offsets beyond": (header(lambda h, n: h[n].update(data_offsets=[0, 10**9])), "offset"),
    "negative shape": (header(lambda h, n: h[n].update(shape=[-1, 16])), "cannot read the model"),
    "unknown dtype of weights": (header(lambda h, n: h[n].update(dtype="BANANA")), "BANANA"),
    "header without a tensor": (header(lambda h, n: h.pop(n)), "cannot read the model"),
    "index is no JSON": (index("{no"), "index.json is not JSON"),
    "index is a list": (index("[]"), "holds a list"),
    "index without a map": (index("{}"), "has no weight_map"),
    "shard is missing": (
        index('{"weight_map": {"a": "m-1.safetensors"}}'),
        "m-1.safetensors, which is not there",
    ),
    "shard lies elsewhere": (index('{"weight_map": {"a": "../../passwd"}}'), "no file beside it"),
    "pickled code": (pickled, "cannot read the model"),
    "no tokenizer": (gone("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    "tokenizer is no JSON": (written("tokenizer.json", "{nope"), "tokenizer.json is not JSON"),
    "tokenizer is empty": (written("tokenizer.json", "{}"), "cannot read the model"),
    "tokenizer nests": (written("tokenizer.json", DEEP), "tokenizer.json is not JSON: brackets"),
    "tokenizer's settings are a list": (written("tokenizer_config.json", "[]"), "holds a list"),
    "generation settings are no JSON": (
        written("generation_config.json", "{"),
        "generation_config.json is not",
    ),
    "template is binary": (written("chat_template.jinja", b"\xff\xfe"), "cannot read the model"),
}


def broken(whole, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    return str(folder)


@pytest.mark.parametrize("kind", [*CONFIGS, *FILES])
def test_one_line_says_what_is_wrong(whole, tmp_path, kind):
    damage, words = {**CONFIGS, **FILES}[kind]
    folder = broken(whole, tmp_path, damage)
    with pytest.raises(UserError, match=words) as caught:
        load_model(folder, "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shape_is_refused_alike(whole, tmp_path, kind):
    damage, words = CONFIGS[kind]
    with pytest.raises(UserError, match=words):
        skeleton(resolve(broken(whole, tmp_path, damage)))


def test_the_whole_one_loads(whole):
    assert load_model(str(whole), "float32")[0].config.vocab_size == 8


def test_layers_that_the_configuration_leaves_out_are_named(whole, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    load_model(folder, "float32")
    assert not caplog.records  # nor is a head that is tied
    _deeper(folder)
    load_model(folder, "float32")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "9 tensors of its files have no place" in told
    assert "first model.layers.1.input_layernorm.weight" in told


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_tensors_that_a_model_makes_itself_are_not_named(key, whole, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    held = load_file(folder / "model.safetensors")
    more = {key: held["model.embed_tokens.weight"].clone()}
    save_file(held | more, folder / "model.safetensors", metadata={"format": "pt"})
    config(tie_word_embeddings=True)(folder)
    load_model(folder, "float32")
    assert not caplog.records


def _deeper(folder):
    """Weights of one layer more than the configuration says."""
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    more = {n.replace(".0.", ".1."): x.clone() for n, x in held.items() if ".layers.0." in n}
    save_file(held | more, folder / "model.safetensors", metadata={"format": "pt"})
