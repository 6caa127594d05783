"""Rows and answers past the last position, and weights that no answer can come from."""

import pytest
import torch
import transformers

from lowmem.errors import UserError
from lowmem.models.positions import check_fits, learned
from lowmem.models.talk import Sampling, answer
from lowmem.training.evaluation import answers, refuse_ruined
from tests.trainer.tiny_folder import tokenizer
from tests.trainer.tiny_models import tiny


def gpt2(**values):
    config = transformers.GPT2Config(
        vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2, **values
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(("kind", "most"), [("gpt2", 64), ("opt", 64), ("llama", None), ("gemma2", None)])
def test_learned_positions_are_found(kind, most):
    assert learned(tiny(kind)) == most


def test_rows_past_a_table_of_positions_are_refused_with_the_length_that_fits():
    check_fits(tiny("gpt2"), 64, "rows")
    check_fits(tiny("llama"), 65, "rows")
    with pytest.raises(
        UserError, match=r"rows have 65 tokens, the model has 64 positions; give --seq-len 64"
    ):
        check_fits(tiny("opt"), 65, "rows")
    with pytest.raises(UserError, match=r"and 32 of an answer.*--seq-len 32 or less"):
        check_fits(tiny("gpt2"), 40, "rows", answer=32)


def test_an_answer_ends_at_the_last_position():
    said = answer(gpt2(), tokenizer(), "x" * 40)
    assert said.most == 24
    assert said.tokens <= 24
    assert said.ended == (said.tokens < 24)
    assert answer(gpt2(), tokenizer(), "x", sampling=Sampling(max_new_tokens=5)).most == 5
    with pytest.raises(UserError, match="fewer than 64"):
        answer(gpt2(), tokenizer(), "x" * 64)


def test_sample_answers_end_there_too_and_it_is_told():
    told = []
    answers(gpt2(), tokenizer(), ["x" * 50], tell=told.append)
    assert told == ["prompt: answers have at most 14 tokens, after the longest there are no more positions"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named(temperature):
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"not finite.*other weights"):
        answer(model, tokenizer(), "x", sampling=Sampling(temperature=temperature))
    with pytest.raises(UserError, match=r"m: 1 of its tensors .*first transformer.ln_f.weight"):
        refuse_ruined(model, "m", float("nan"))
    with pytest.raises(UserError, match="too narrow"):
        refuse_ruined(gpt2(), "m", float("inf"))
    refuse_ruined(gpt2(), "m", None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": 1e-40}, "temperature: 1e-40 is out of range; use 0 .greedy., or 0.0001 and more"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 10**23}, "seed: 1.* is out of range; use 0 to"),
        ({"top_p": 0.5}, "top_p: 0.5 has no effect at temperature 0"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be_done_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        Sampling(**values)


def test_the_coldest_draws_are_finite():
    answer(gpt2(), tokenizer(), "x", sampling=Sampling(4, 1e-4, seed=2**64 - 1))
