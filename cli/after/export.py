"""`lowmem export --model M --gguf FILE`: a model for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowmem.errors import UserError

from .. import render
from ..app import Json
from ._model import Base, Model


def command(
    model: Model,
    gguf: Annotated[Path, typer.Option("--gguf", metavar="FILE", help="File to write.")],
    kind: Annotated[str, typer.Option("--type", help="Of matrices: f32, f16, bf16, q8_0.")] = "bf16",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a model as a GGUF file, an adapter merged into its base; or say how llama.cpp does it."""
    from lowmem.models.adapters import base_of, is_adapter, load_tuned
    from lowmem.models.entries import resolve
    from lowmem.models.gguf import write as writing
    from lowmem.models.loading import locate
    from lowmem.models.merging import merged
    from lowmem.models.quiet import quiet

    writing.check_kind(kind)
    writing.check_target(gguf)
    adapter = is_adapter(model)
    try:
        with quiet():
            config = resolve((base or base_of(model)) if adapter else model).config()
            writing.check_config(config)
            render.say(f"load {model}")
            tuned, tokenizer = load_tuned(model, writing.held_in(config, kind, adapter), base=base)
            whole = merged(tuned, model) if adapter else tuned
            render.say(f"write {gguf}")
            writing.write(whole, tokenizer, gguf, kind, Path(model).resolve().name)
    except writing.NotKnownError as error:
        merge = [f"lowmem merge {model} merged"] if adapter else []
        for typed in [*merge, *writing.commands("merged" if adapter else locate(model), gguf, kind)]:
            render.say(typed)
        raise UserError(f"{model}: {error}; llama.cpp converts it, by the commands above") from error
    size = gguf.stat().st_size
    document = {"model": model, "file": gguf, "type": kind, "bytes": size}
    render.emit(document, f"wrote {gguf} ({render.size(size)}); run it: llama-cli -m {gguf}", as_json)
