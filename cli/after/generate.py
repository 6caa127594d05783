"""`lowmem generate --model M PROMPT`: one answer, token by token."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lowmem.errors import UserError

from .. import render
from ..app import Json
from ._model import POSITIONS, Base, Dtype, MaxNewTokens, Model, Seed, Temperature, TopP, loaded, typed


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from stdin.")],
    system: Annotated[str | None, typer.Option("--system", help="System message before it.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the text, without the chat template.")
    ] = False,
    base: Base = None,
    dtype: Dtype = "bfloat16",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Answer one prompt and print the answer as it comes; without a chat template go on with the text."""
    from lowmem.models.talk import Sampling, answer

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = typed().read() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("the prompt is empty; give a text, or - and a text on stdin")
    if raw and system:
        raise UserError("--system is a message of the chat template, --raw goes without one; leave one out")
    tuned, tokenizer = loaded(model, base, dtype)
    messages = [{"role": "system", "content": system}] if system else []
    plain = raw or not tokenizer.chat_template
    asked = text if plain else [*messages, {"role": "user", "content": text}]
    if plain and system:
        raise UserError(f"{model} has no chat template to give a system message to; leave out --system")
    said = answer(tuned, tokenizer, asked, None if as_json else render.stream, sampling)
    if not as_json:
        render.stream("\n")
        speed = f"{said.tokens / said.seconds:.1f} tokens per second"
        limit = f"--max-new-tokens {said.most}" if said.most == max_new_tokens else POSITIONS
        cut = "" if said.ended else f", cut at {limit}"
        render.say(f"{said.tokens} tokens, {speed}{cut}")
    render.emit({"model": model, "prompt": text, **dataclasses.asdict(said)}, None, as_json)
