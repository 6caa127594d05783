"""Adapters and bases: what is merged is what was trained, and what does not go together is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowmem.errors import UserError
from lowmem.models.adapters import load_tuned, merge
from lowmem.models.peft_methods import parse_args
from lowmem.models.quiet import quiet

IDS = torch.arange(20)[None]
FILE = "adapter_model.safetensors"


def words() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={a: i for i, a in enumerate(letters)} | {"</s>": 256}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")


def base(folder: Path, dtype: str = "float32", **more: Any) -> Path:
    """A small Llama with weights large enough that a change of one tells."""
    settings: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**settings, **more})
        transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def trained(model: Path, folder: Path, *, score: bool = False, kind: Any = None, **options: Any) -> Any:
    """An adapter of a base, every weight of it moved, as PEFT saves it; and what it computes."""
    from peft import LoraConfig, get_peft_model

    auto = transformers.AutoModelForSequenceClassification if score else transformers.AutoModelForCausalLM
    told = {"task_type": "SEQ_CLS" if score else "CAUSAL_LM"} | options
    told |= {} if kind else {"r": 4, "lora_alpha": 8}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loaded = auto.from_pretrained(model, **({"num_labels": 1} if score else {}))
        tuned = get_peft_model(loaded, (kind or LoraConfig)(**told))
        with torch.no_grad():
            for p in tuned.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.1)
        tuned.save_pretrained(folder)
        words().save_pretrained(folder)
        return computed(tuned)


@torch.no_grad()
def computed(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    ],
)
def test_tied_ends_merge_to_what_was_trained(options: dict[str, Any], tmp_path: Path) -> None:
    expected = trained(base(tmp_path / "base"), tmp_path / "run", **options)
    with quiet():
        merge(tmp_path / "run", tmp_path / "out", dtype="float32")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(computed(whole), expected, rtol=1e-4, atol=1e-4)
    assert whole.config.tie_word_embeddings == ("trainable_token_indices" in options)


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    place = base(tmp_path / "base", "bfloat16")
    trained(place, tmp_path / "run", target_modules=["q_proj"])
    merge(tmp_path / "run", tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    factors = load_file(tmp_path / "run" / FILE)
    a, b = (factors[f"base_model.model.{name}.lora_{end}.weight"] for end in "AB")
    weight = load_file(place / "model.safetensors")[f"{name}.weight"]
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(whole[f"{name}.weight"], (weight.float() + 2.0 * (b @ a)).bfloat16())
    assert {x.dtype for x in whole.values()} == {torch.bfloat16}


def test_what_peft_would_merge_twice_is_merged_once(tmp_path: Path) -> None:
    from peft import OSFConfig

    place = base(tmp_path / "base")
    expected = trained(place, tmp_path / "run", kind=OSFConfig, target_modules=["q_proj"])
    merge(tmp_path / "run", tmp_path / "out", dtype="float32")
    with quiet():
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(computed(whole), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "said"), [(1, "2 of its tensors have no place"), (3, "2 tensors that it has in that model")]
)
def test_an_adapter_of_another_depth_is_refused(layers: int, said: str, tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), tmp_path / "run", target_modules=["q_proj"])
    other = base(tmp_path / "other", num_hidden_layers=layers)
    with pytest.raises(UserError, match=said):
        merge(tmp_path / "run", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_a_reward_adapter_keeps_its_score(tmp_path: Path) -> None:
    expected = trained(base(tmp_path / "base"), tmp_path / "run", score=True, target_modules=["q_proj"])
    merge(tmp_path / "run", tmp_path / "out", dtype="float32")
    with quiet():
        whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(computed(whole), expected, rtol=1e-4, atol=1e-4)


def test_tokens_beyond_the_rows_of_the_base_are_refused(tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), tmp_path / "run", target_modules=["q_proj"])
    more = words()
    more.add_tokens(["<x>"])
    more.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="1 tokens beyond the 257 rows"):
        load_tuned(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: (run / FILE).write_bytes(b"xx"), "does not go with"),
        (lambda run: (run / FILE).unlink(), "has no adapter_model.safetensors"),
        (lambda run: save_file({}, run / FILE), "are not in its file"),
        (lambda run: (run / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
        (lambda run: _set(run, peft_type="LORAX"), "PEFT has no method 'LORAX'; did you mean 'LORA'"),
        (lambda run: _set(run, r="many"), "does not go with"),
    ],
)
def test_a_damaged_adapter_is_said_in_a_line(harm: Any, said: str, tmp_path: Path) -> None:
    trained(base(tmp_path / "base"), tmp_path / "run", target_modules=["q_proj"])
    harm(tmp_path / "run")
    with pytest.raises(UserError, match=said):
        load_tuned(str(tmp_path / "run"))


def _set(run: Path, **fields: Any) -> None:
    file = run / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("value", ["2026-13-45", "1" * 5000, "[" * 5000, "\x00"])
def test_a_value_that_yaml_cannot_make_is_said_in_a_line(value: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        parse_args(f"r={value}")
