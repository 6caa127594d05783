"""A rendered row and its loss mask are those that TRL trains on."""

import pytest

from lowmem.console import Console
from lowmem.data.examples import ensure_chat_template, render_example
from lowmem.data.fitting import fitting
from lowmem.data.load import load_data
from lowmem.errors import UserError

CHAT = {
    "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is Kenya?"}],
    "completion": [{"role": "assistant", "content": "In Africa."}],
}
ROWS = [{"text": "Kenya is in Africa."}, {"prompt": "Kenya is in", "completion": " Africa."}, CHAT]


def test_the_answer_and_its_end_are_trained(tokenizer):
    example = render_example(ROWS[1], tokenizer)
    assert example.marked() == "Kenya is in[[ Africa.</s>]]"
    assert (example.tokens, example.trained) == (20, 9)
    assert example.parts() == [("Kenya is in", False), (" Africa.</s>", True)]
    assert render_example(ROWS[0], tokenizer).marked() == "[[Kenya is in Africa.</s>]]"


def test_fallback_template_ends_turns_with_the_own_token(tokenizer):
    size = len(tokenizer)
    assert ensure_chat_template(tokenizer) is True
    assert ensure_chat_template(tokenizer) is False
    assert len(tokenizer) == size
    assert render_example(CHAT, tokenizer).marked() == (
        "<|im_start|>system\nBe short.</s>\n<|im_start|>user\nWhere is Kenya?</s>\n"
        "<|im_start|>assistant\n[[In Africa.</s>\n]]"
    )


def test_fallback_template_starts_as_the_tokenizer_does(tokenizer):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    ensure_chat_template(tokenizer)
    text = render_example(CHAT, tokenizer).text
    assert text.startswith("<s><|im_start|>system")
    assert text.count("<s>") == 1


def test_fallback_marks_answers_for_assistant_only_loss(tokenizer):
    ensure_chat_template(tokenizer)
    out = tokenizer.apply_chat_template(
        [*CHAT["prompt"], *CHAT["completion"]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == "In Africa.</s>"


def test_an_existing_template_stays(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert ensure_chat_template(tokenizer) is False
    assert render_example(CHAT, tokenizer).marked() == "Be short.Where is Kenya?[[In Africa.]]"


def test_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(UserError, match="no system message, please"):
        render_example(CHAT, tokenizer)


def test_no_token_to_end_a_turn_with(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a chat template nor an end-of-text token"):
        ensure_chat_template(tokenizer)


@pytest.mark.parametrize("row", ROWS, ids=["text", "pair", "chat"])
def test_mask_is_that_of_trl(row, tokenizer, tmp_path):
    """What TRL's own preparation marks as labels is what is shown."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    ensure_chat_template(tokenizer)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=256,
        pad_token_id=256,
    )
    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, activation_checkpointing=False
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=args,
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    prepared = trainer.train_dataset[0]
    example = render_example(row, tokenizer)
    trained = [t for t in prepared["labels"] if t != -100]
    assert tokenizer.decode(prepared["input_ids"]) == example.text
    assert tokenizer.decode(trained) == "".join(text for text, counts in example.parts() if counts)
    assert (len(prepared["input_ids"]), len(trained)) == (example.tokens, example.trained)


def test_dataset_for_trl(tokenizer):
    ensure_chat_template(tokenizer)
    dataset = fitting(load_data("factbook", limit=3), tokenizer, 2048, Console()).dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert [len(dataset), len(dataset[0]["labels"])] == [3, len(dataset[0]["input_ids"])]
