"""`lowmem chat --model M`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lowmem.errors import UserError

from .. import render
from ..app import Json
from ._model import POSITIONS, Base, Dtype, MaxNewTokens, Model, Seed, Temperature, TopP, loaded, typed

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def command(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="System message before everything.")] = None,
    base: Base = None,
    dtype: Dtype = "bfloat16",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP | None = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Talk to a model; each line from the keyboard (or from a pipe) is one message."""
    from lowmem.models.talk import Sampling, answer

    usual = 0.95 if temperature else 1.0
    sampling = Sampling(max_new_tokens, temperature, usual if top_p is None else top_p, seed)
    tuned, tokenizer = loaded(model, base, dtype)
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template: it goes on with text, use `lowmem generate --raw`")
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    render.say(_HELP)
    while (line := _read()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(first)
        elif line:
            messages.append({"role": "user", "content": line})
            said: list[str] = []

            def tell(text: str, heard: list[str] = said) -> None:
                heard.append(text)
                render.stream("" if as_json else text)

            try:
                found = answer(tuned, tokenizer, messages, tell, sampling)
                if not found.ended and found.most < max_new_tokens:
                    render.say(f"(cut at {POSITIONS}; /reset makes room)")
            except KeyboardInterrupt:
                render.say("(stopped)")
            render.stream("" if as_json else "\n")
            messages.append({"role": "assistant", "content": "".join(said)})
    render.emit({"model": model, "messages": messages}, None, as_json)


def _read() -> str | None:
    """The next line; None at the end of the input."""
    if typed().isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = typed().readline()
    return line.strip() if line else None
