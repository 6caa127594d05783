"""The flags and the loading that the commands on a finished model share."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any, TextIO

import typer

from lowmem.errors import UserError

from .. import render

Model = Annotated[
    str, typer.Option("--model", metavar="NAME|PATH", help="Folder of a run, or as `lowmem models` lists.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="NAME|PATH", help="Base of an adapter, where it lies elsewhere."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: bfloat16, float16, float32.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]
POSITIONS = "the last position that the model has"
"""Where an answer is cut that max_new_tokens would not cut."""


def loaded(model: str, base: str | None, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer, on the GPU where there is one."""
    import torch

    from lowmem.models.adapters import load_tuned
    from lowmem.models.quiet import quiet

    render.say(f"load {model}")
    with quiet():
        tuned, tokenizer = load_tuned(model, dtype, base=base)
    if not tuned.can_generate():
        raise UserError(f"{model} gives a text a score and makes none: name a language model")
    return tuned.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def typed() -> TextIO:
    """Standard input; an empty one where it is closed."""
    return sys.stdin or io.StringIO()
