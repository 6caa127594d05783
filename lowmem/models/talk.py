"""Answers from a model, token by token as they come.

    answer(model, tokenizer, messages, tell) -> Answer

The chat template renders the messages as in training; a model without one continues plain text. What
arrives is told in whole characters: a token may end in the middle of one. Greedy by default;
with a temperature the random draws follow from the seed, and the caller's generators stay as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.errors import UserError
from lowmem.models.positions import room

Message = Mapping[str, str]
Tell = Callable[[str], None]
COLDEST = 1e-4  # below, logits divided by it may pass the largest number of fp32
TEMPERATURES = f"0 (greedy), or {COLDEST} and more"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that have this probability together.
        seed: of the draws.

    Raises:
        UserError: a value out of range, or one that greedy search would ignore.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fine, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature == 0 or COLDEST <= self.temperature < math.inf, TEMPERATURES),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2^64 - 1"),
        ):
            if not fine:
                raise UserError(f"{name}: {getattr(self, name)} is out of range; use {allowed}")
        if self.temperature == 0 and self.top_p < 1:
            raise UserError(
                f"top_p: {self.top_p} has no effect at temperature 0, which takes the likeliest token; give "
                "a temperature above 0, or leave it out"
            )


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        prompt_tokens: read; tokens: made; seconds: for both.
        ended: whether the model ended by itself; else it was cut at `most` tokens.
        most: `max_new_tokens`, or fewer where the model has no positions for as many after the prompt.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    ended: bool
    most: int


def answer(
    model: Any,
    tokenizer: Any,
    asked: str | Sequence[Message],
    tell: Tell | None = None,
    sampling: Sampling | None = None,
) -> Answer:
    """Answer a conversation, or go on with a text.

    Args:
        model: its mode and generation settings are left as they were.
        tokenizer: its chat template renders messages.
        asked: messages with `role` and `content`, or plain text to go on with.
        tell: told the answer piece by piece.
        sampling: greedy, 256 tokens when None.

    Raises:
        UserError: messages without a chat template, or one that refuses them; a prompt that is too long;
            a model whose logits are not finite.
    """
    import torch

    from lowmem.models.computing.wide import wide

    chosen = sampling or Sampling()
    inputs = _encode(tokenizer, asked).to(model.device)
    count = int(inputs["input_ids"].shape[1])
    most = room(model, count, chosen.max_new_tokens)
    ends = sorted(stops(model, tokenizer))
    began, was = time.perf_counter(), model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), wide(model), torch.random.fork_rng(devices=devices):
            torch.random.manual_seed(chosen.seed)
            output = model.generate(
                **inputs,
                **_settings(chosen, tokenizer),
                eos_token_id=ends or None,
                max_new_tokens=most,
                logits_processor=[_finite],
                streamer=_streamer(tokenizer, tell),
            )
    finally:
        model.train(was)
    made = output[0, count:].tolist()
    return Answer(
        text=tokenizer.decode(made, skip_special_tokens=True),
        prompt_tokens=count,
        tokens=len(made),
        seconds=time.perf_counter() - began,
        ended=len(made) < most or made[-1] in ends,
        most=most,
    )


def _finite(ids: Any, scores: Any) -> Any:
    """Stop where nothing can be chosen: sampling would fail, the likeliest of NaN is any token."""
    if bool(scores.isnan().any()) or bool(scores.isposinf().any()):
        raise UserError(
            "the model's logits are not finite: its weights are damaged or the dtype is too narrow for them; "
            "give --dtype float32, or other weights"
        )
    return scores


def stops(model: Any, tokenizer: Any) -> set[int]:
    """Tokens at which generation ends: those of the generation settings, the model and the tokenizer."""
    found: list[Any] = []
    for said in (model.generation_config, model.config, tokenizer):
        ids = getattr(said, "eos_token_id", None)
        found += ids if isinstance(ids, (list, tuple)) else [ids]
    return {one for one in found if isinstance(one, int)}


def _settings(sampling: Sampling, tokenizer: Any) -> dict[str, Any]:
    """For `generate`; what greedy search would ignore is unset, or transformers warns of it.

    A model's own settings may ask for beams or several answers, which cannot be told as they come.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    common = {
        "pad_token_id": pad,
        "use_cache": True,
        "top_k": None,
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "tokenizer": tokenizer,  # reads the model's stop strings, if it has any
    }
    if sampling.temperature == 0:
        return {**common, "do_sample": False, "temperature": None, "top_p": None}
    return {**common, "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}


def _encode(tokenizer: Any, asked: str | Sequence[Message]) -> Any:
    """Token ids of a text, or of messages up to where the answer begins."""
    for text in [asked] if isinstance(asked, str) else [message["content"] for message in asked]:
        _check_text(text)
    if isinstance(asked, str):
        return tokenizer(asked, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: this model goes on with text, use --raw")
    try:
        return tokenizer.apply_chat_template(
            list(asked), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # a template raises whatever its author chose
        raise UserError(f"the chat template refuses this conversation: {error}") from error


def _check_text(text: str) -> None:
    """Refuse what tokenizers cannot take: Python reads bytes that are no UTF-8 as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not UTF-8 (character {error.start}); convert it first") from error


def _streamer(tokenizer: Any, tell: Tell | None) -> Any:
    """Hands finished pieces of text to `tell`."""
    if tell is None:
        return None
    from transformers import TextStreamer

    hear = tell

    class Telling(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                hear(text)

    return Telling(tokenizer, skip_prompt=True, skip_special_tokens=True)
