"""A conversation in one example is trained as its answers are one by one: same tokens, labels and loss."""

import json

import pytest
import torch
import transformers
from tiny_folder import make_model, tokenizer
from tiny_runs import BASE
from torch.nn import functional as F

from lowmem.console import Console
from lowmem.data.examples import ensure_chat_template
from lowmem.data.fitting import fitting
from lowmem.data.load import load_data
from lowmem.training.arguments import LowMemSFTConfig
from lowmem.training.evaluation import held_out_loss
from lowmem.training.trainer import LowMemSFTTrainer

THINKING = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def said(role, i, k, **fields):
    return {"role": role, "content": f"{role[0]}{i} {k}" * (1 + k), **fields}


ROWS = [
    [
        m
        for k in range(1 + i)
        for m in (said("user", i, k), said("assistant", i, k, weight=int((i + k) % 3 > 0)))
    ]
    for i in range(1, 6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[None, THINKING], ids=["ChatML", "thinking"])
def words(request):
    made = tokenizer()
    made.chat_template = request.param
    ensure_chat_template(made)
    return made


def fitted(words, folder, seq_len=512):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    return fitting(load_data(str(file)), words, seq_len, Console())


def one_by_one():
    """Prompt and completion of each answer that counts."""
    for row in ROWS:
        plain = [{"role": m["role"], "content": m["content"]} for m in row]
        for i, message in enumerate(row):
            if message["role"] == "assistant" and message["weight"]:
                yield {"prompt": plain[:i], "completion": plain[i : i + 1]}


def trainer(folder, place, words, dataset, **values):
    settings = {**BASE, "optim": "adamw", "bf16": False, "max_length": 512, **values}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = LowMemSFTTrainer(
        model,
        LowMemSFTConfig(output_dir=str(place), **settings),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=words,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def prepared_by_trl(folder, place, words):
    """Tokens and labels of one example per answer."""
    from datasets import Dataset

    made = trainer(folder, place, words, Dataset.from_list(list(one_by_one())))
    return [(row["input_ids"], row["labels"]) for row in made.train_dataset]


def test_each_answer_is_trained_once_with_what_was_said_before(folder, tmp_path, words):
    expected = prepared_by_trl(folder, tmp_path, words)
    found = []
    for example in fitted(words, folder).examples:
        for start, stop in example.spans:
            labels = [-100] * start + example.labels()[start:stop]
            found.append((example.ids[:stop].tolist(), labels))
    assert found == expected


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_labels_are_those_of_the_answers_one_by_one(folder, tmp_path, words, packing):
    data = fitted(words, folder)
    made = trainer(folder, tmp_path / "run", words, data.dataset(), packing=packing, max_steps=2)
    total, count = 0.0, 0
    for ids, labels in prepared_by_trl(folder, tmp_path / "trl", words):
        with torch.no_grad():
            logits = made.model(torch.tensor([ids])).logits[0, :-1]
        total += float(F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))
        count += sum(label != -100 for label in labels[1:])
    batches = list(made.get_eval_dataloader())
    assert sum(int((b["labels"][..., 1:] != -100).sum()) for b in batches) == count
    assert held_out_loss(made) == pytest.approx(total / count, rel=1e-5)
    assert made.train().training_loss > 0


def test_a_long_conversation_costs_its_tokens_once(folder):
    words = tokenizer()
    ensure_chat_template(words)
    turns = [{"role": role, "content": "0123456789"} for _ in range(30) for role in ("user", "assistant")]
    file = folder / "long.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    (example,) = fitting(load_data(str(file)), words, 10**6, Console()).examples
    assert len(example.spans) == 30
    assert len(example.ids) == len(
        words.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    )
