"""After the run: an adapter merged, a model asked, on tiny models with an independent second way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.errors import UserError
from lowmem.models.adapters import base_of, name_base, published_name

runner = CliRunner()


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with weights of its own on the tiny model, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem.models.quiet import quiet

    folder = tmp_path_factory.mktemp("runs") / "adapter"
    with quiet(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        torch.manual_seed(1)
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def run(*arguments: Any, code: int = 0, given: str | None = None) -> Any:
    done = runner.invoke(cli.app, [str(part) for part in arguments], input=given)
    assert done.exit_code == code, done.output
    return done


def asked(model: Path, *more: Any) -> Any:
    flags = ("--max-new-tokens", 8, "--dtype", "float32", "--json", *more)
    return json.loads(run("generate", "--model", model, "What is 1 plus 1?", *flags).stdout)


def test_merge_adds_the_product_of_the_factors(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = tmp_path / "merged"
    document = json.loads(run("merge", adapter, out, "--json").stdout)
    assert document["base"] == str(tiny_model)
    whole, base = load_file(out / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for name, weight in base.items():
        at = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{at}.lora_A.weight" in factors:
            product = factors[f"{at}.lora_B.weight"].float() @ factors[f"{at}.lora_A.weight"].float()
            expected = weight + (2.0 * product).to(weight.dtype)  # alpha / r = 2
            changed += 1
        torch.testing.assert_close(whole[name], expected, rtol=0.01, atol=1e-3)
    assert changed == 14
    assert not (out / "adapter_config.json").exists()
    assert asked(out)["text"] != asked(tiny_model)["text"]


def test_an_adapter_is_asked_on_its_base(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    run("merge", adapter, out, "--dtype", "float32")
    assert asked(adapter)["text"] == asked(out)["text"]


def test_generate_streams_what_it_says_in_the_end(tiny_model: Path) -> None:
    flags = ("--max-new-tokens", 8, "--dtype", "float32")
    streamed = run("generate", "--model", tiny_model, "What is 1 plus 1?", *flags)
    told = asked(tiny_model)
    assert streamed.stdout.strip() == told["text"].strip()
    assert told["tokens"] <= 8
    assert "tokens per second" in streamed.stderr


def test_draws_follow_from_the_seed(tiny_model: Path) -> None:
    def drawn(seed: int) -> str:
        return str(asked(tiny_model, "--temperature", 1.5, "--seed", seed)["text"])

    before = torch.get_rng_state()
    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) > 1
    assert torch.equal(before, torch.get_rng_state())


def test_chat_remembers_until_reset(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from lowmem.data.examples import ensure_chat_template

    chat = tmp_path / "chat"
    run("merge", adapter, chat)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    ensure_chat_template(tokenizer)
    tokenizer.save_pretrained(chat)
    flags = ("--model", chat, "--max-new-tokens", 6, "--temperature", 0)
    first, second, again = run("chat", *flags, given="hi\nhi\n/reset\nhi\n").stdout.split("\n")[:3]
    assert first == again
    assert first != second
    assert run("chat", *flags, given="hi\n/exit\nhi\n").stdout.count("\n") == 1
    told = json.loads(run("chat", *flags, "--json", given="hi\n").stdout)["messages"]
    assert told == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "{model}", "{new}"), "holds no adapter"),
        (("merge", "{adapter}", "{model}"), "exists: name a new folder"),
        (("merge", "{adapter}", "{new}", "--base", "gpt3"), "no model 'gpt3'"),
        (("generate", "--model", "{model}", " "), "the prompt is empty"),
        (("generate", "--model", "{model}", "a", "--temperature", "-1"), "temperature: -1.0 is out of range"),
        (("generate", "--model", "{model}", "a", "--system", "b"), "no chat template"),
        (("generate", "--model", "{model}", "a", "--base", "gpt2"), "is no adapter"),
        (("generate", "--model", "{model}", "a" * 300), "the prompt has 300 tokens"),
        (("generate", "--model", "{model}", "a\udcff"), "the text is not UTF-8 (character 1)"),
        (("generate", "--model", "{model}", "--raw", "a\udcff"), "the text is not UTF-8 (character 1)"),
        (("chat", "--model", "{model}"), "no chat template"),
        (("chat", "--model", "{new}"), "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: tuple[str, ...], said: str, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    places = {"model": tiny_model, "adapter": adapter, "new": tmp_path / "new"}
    done = run(*(part.format(**places) for part in arguments), code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_run_names_the_base_of_its_adapter(
    flags: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)  # a path that holds on this desk only
    flags[flags.index("--model") + 1] = f"./{tiny_model.name}"
    run("finetune", *flags, "--lora-rank", 2, "--no-report")
    out = tmp_path / "out"
    assert {base_of(out), base_of(out / "checkpoint-4")} == {str(tiny_model.resolve())}
    assert run("merge", out, tmp_path / "merged").stdout.startswith("wrote ")


def test_a_base_is_named_as_others_can_load_it(adapter: Path, tmp_path: Path) -> None:
    import shutil

    assert published_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    shutil.copytree(adapter, tmp_path / "run")
    before = base_of(tmp_path / "run")
    name_base(tmp_path / "run", "owner/name")
    assert base_of(tmp_path / "run") == "owner/name"
    assert not [f for f in (tmp_path / "run").rglob("*.md") if before in f.read_text()]
    with pytest.raises(UserError, match="holds no adapter"):
        base_of(tmp_path)


def test_export_writes_an_adapter_with_its_base(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    def embedding_and_down(model: Path) -> Any:
        file = tmp_path / f"{model.name}.gguf"
        told = json.loads(run("export", "--model", model, "--gguf", file, "--type", "f32", "--json").stdout)
        assert told["bytes"] == file.stat().st_size
        return {t.name: t.data.copy() for t in gguf.GGUFReader(file).tensors}

    merged = tmp_path / "merged"
    run("merge", adapter, merged)
    base, ours, twice = map(embedding_and_down, (tiny_model, adapter, merged))
    assert (ours["token_embd.weight"] == base["token_embd.weight"]).all()
    assert (ours["blk.0.ffn_down.weight"] != base["blk.0.ffn_down.weight"]).any()
    assert ours["blk.0.ffn_down.weight"] == pytest.approx(twice["blk.0.ffn_down.weight"], rel=0.01, abs=1e-2)


def test_export_rounds_weights_once(tiny_model: Path, tmp_path: Path) -> None:
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.nn.init.normal_(whole.model.embed_tokens.weight)
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "whole")
    run("export", "--model", tmp_path / "whole", "--gguf", tmp_path / "a.gguf", "--type", "f16")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert (found["token_embd.weight"] == whole.model.embed_tokens.weight.detach().half().numpy()).all()


def test_merge_fills_the_folder_one_is_in(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    run("merge", adapter, ".")
    assert (tmp_path / "in" / "model.safetensors").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    run("merge", adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other" / "model.safetensors").is_file()


def test_export_says_the_command_where_it_does_not_know(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "attention_bias": True}))
    said = run("export", "--model", other, "--gguf", tmp_path / "a.gguf", code=2).stderr
    command = f"llama.cpp/convert_hf_to_gguf.py {other} --outfile {tmp_path / 'a.gguf'} --outtype bf16"
    assert f"python {command}" in said.splitlines()
    assert said.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "a.gguf").exists()


def test_what_an_adapter_cannot_become_is_said_in_a_line(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from lowmem.models.quiet import quiet

    with quiet(), torch.random.fork_rng(devices=[]):
        prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), prompts).save_pretrained(
            tmp_path / "p"
        )
        scores = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        scorer = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        get_peft_model(scorer, scores).save_pretrained(tmp_path / "s")
    for folder in ("p", "s"):
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / folder)
    said = run("export", "--model", tmp_path / "p", "--gguf", tmp_path / "a.gguf", code=2).stderr
    assert said.splitlines()[-1].endswith(
        "PROMPT_TUNING adds no weights that could be merged; use it as it is"
    )
    said = run("generate", "--model", tmp_path / "s", "a", code=2).stderr
    assert "gives a text a score" in said.splitlines()[-1]


def test_a_closed_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.cli.after._model import typed

    monkeypatch.setattr("sys.stdin", None)
    assert typed().read() == ""
