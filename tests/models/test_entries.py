"""Names, folders and Hub ids become models; what lowmem cannot train is refused with the reason."""

import json

import pytest
import torch

from lowmem.errors import UserError
from lowmem.models import hub
from lowmem.models.entries import (
    available_models,
    build_config,
    parameter_count,
    resolve,
    skeleton,
    to_dtype,
    trainable_count,
)

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NAMES = sorted(available_models())


@pytest.mark.parametrize("name", NAMES)
def test_published_parameter_count(name):
    entry = resolve(name)
    model = skeleton(entry)
    assert parameter_count(model) == entry.parameters == trainable_count(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_names_that_users_expect():
    wanted = """
        llama-7b llama-2-7b llama-2-13b llama-2-70b llama-3-8b llama-3.2-1b llama-3.2-3b mistral-7b
        qwen2.5-0.5b qwen2.5-7b qwen3-0.6b qwen3-8b gemma-2b gemma-2-2b gemma-3-270m gemma-3-1b gpt2 opt-125m
        opt-1.3b smollm2-135m tinyllama-1.1b pythia-160m
    """
    wanted = wanted.split()
    assert set(wanted) <= set(NAMES)


def test_fake_skeleton_draws_nothing_and_holds_nothing():
    before = torch.get_rng_state()
    model = skeleton(build_config(TINY), "fp32", "fake")
    assert torch.equal(before, torch.get_rng_state())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert type(weight.data).__name__ == "FakeTensor"


def test_fake_skeleton_in_the_mode_of_the_caller():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    model = skeleton(build_config(TINY), torch.float32, "fake", mode=mode)
    assert next(model.parameters()).fake_mode is mode


def test_trainable_count_leaves_out_frozen_and_repeats():
    model = skeleton(build_config(TINY | {"tie_word_embeddings": True}))
    total = parameter_count(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight.requires_grad_(False)
    assert trainable_count(model) == total - 64 * 16


def test_attention_is_the_one_that_trains():
    assert skeleton(resolve("smollm2-135m")).config._attn_implementation == "sdpa"
    assert skeleton(resolve("gemma-2-2b")).config._attn_implementation == "eager"
    assert skeleton(build_config(TINY), attention="eager").config._attn_implementation == "eager"


def test_hub_id_of_a_listed_model_needs_no_network(monkeypatch):
    monkeypatch.setattr(hub, "config_dict", lambda hub_id: pytest.fail("asked the Hub"))
    entry = resolve("meta-llama/Llama-3.2-1B")
    assert (entry.name, entry.source, entry.config().head_dim) == ("llama-3.2-1b", "yaml", 64)


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    entry = resolve(str(tmp_path))
    assert (entry.source, entry.name, entry.hub_id) == ("path", tmp_path.name, None)
    assert parameter_count(skeleton(entry)) == parameter_count(skeleton(build_config(TINY)))


def test_hub_id_is_read_when_asked_for(monkeypatch):
    monkeypatch.setattr(hub, "config_dict", lambda hub_id: TINY | {"vocab_size": 65})
    entry = resolve("someone/some-model")
    assert entry.source == "hub"
    assert entry.config().vocab_size == 65


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("smollm2-135", ["smollm2-135m", "owner/name"]),
        ("./nowhere", ["no such folder"]),
        ("/nowhere/at/all", ["no such folder"]),
    ],
)
def test_unknown_name(text, words):
    with pytest.raises(UserError) as caught:
        resolve(text)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve(str(file))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no config.json"), ("{", "is not JSON"), ("{}", "no model_type")],
)
def test_bad_folder(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        resolve(str(tmp_path)).config()


def test_adapter_folder_names_the_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="give its base model"):
        resolve(str(tmp_path)).config()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "phimoe"}, "mixture of 16 experts"),
        ({"model_type": "deepseek_v3"}, "mixture of .* experts.* kinds mixtral"),
        ({"model_type": "dbrx"}, "mixture of several experts"),
        ({"model_type": "gemma3"}, r"tower beside its language model \(vision_config\)"),
        ({"model_type": "llava"}, "vision_config"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "clip_text_model"}, "no causal language model head"),
        ({"model_type": "wonder", "auto_map": {"AutoConfig": "c.C"}}, "does not run"),
        ({"model_type": "wonder"}, "no architecture 'wonder'"),
        (TINY | {"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    ],
)
def test_refusal_says_why(fields, words):
    with pytest.raises(UserError, match=words):
        build_config(fields, "it")


def test_own_code_beside_a_known_architecture_is_not_needed():
    config = build_config(TINY | {"auto_map": {"AutoConfig": "configuration_x.X"}})
    assert config.model_type == "llama"


def test_dtype_names():
    assert to_dtype("bf16") is to_dtype("bfloat16") is to_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(UserError, match="did you mean 'float16'"):
        to_dtype("float6")


def test_unknown_device():
    with pytest.raises(UserError, match="Known: fake, meta"):
        skeleton(build_config(TINY), device="cuda")
