"""Adapters: small weights beside a base model that is named, not copied.

A folder that PEFT wrote holds an adapter and the name of its base. That name has to mean the same
model on another machine, so it is a Hub id wherever there is one (`published_name`): never the place
in a cache at which the base happened to lie. `load_tuned` puts the two together for use,
`merge` into one model of the ordinary kind (`lowmem.models.merging`).

PEFT takes whatever of an adapter's file fits, and starts the rest afresh. Here each of its tensors must
have its place, and each place its tensor: an adapter of a deeper model is none of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError, first_line, nearest, ran_out_of_room
from lowmem.models.entries import resolve
from lowmem.models.loading import check_vocabulary, load_model
from lowmem.models.merging import merged
from lowmem.models.quiet import quiet
from lowmem.models.scoring import with_score
from lowmem.texts import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
_CARD = "README.md"


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    folder = Path(name_or_path).expanduser()
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def published_name(name_or_path: str) -> str:
    """What others can load the same model by: its Hub id, or for a folder of the user its whole path.

    Raises:
        UserError: as `lowmem.models.entries.resolve`.

    Example:
        >>> published_name("smollm2-135m")
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    entry = resolve(name_or_path)
    return entry.hub_id or str(Path(entry.location).resolve())


def base_of(folder: str | Path) -> str:
    """Name of the model that an adapter belongs to.

    Raises:
        UserError: no adapter there, or one that names no base.
    """
    base = _fields(Path(folder).expanduser()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{Path(folder) / CONFIG} names no base model: give one with --base")
    return str(base)


def name_base(folder: Path, base: str) -> None:
    """Write the base's name into a folder that PEFT saved; nothing happens where there is no adapter.

    Args:
        folder: with an adapter_config.json, and perhaps PEFT's card.
        base: from `published_name`.
    """
    file, card = folder / CONFIG, folder / _CARD
    if not file.is_file():
        return
    fields = json.loads(file.read_text(encoding="utf-8"))
    before, fields["base_model_name_or_path"] = fields.get("base_model_name_or_path"), base
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if before and card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(str(before), base), encoding="utf-8")


def load_tuned(
    name_or_path: str, dtype: torch.dtype | str = "bfloat16", *, base: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model to use it: a whole one, or an adapter on its base.

    Args:
        name_or_path: a listed name, a folder or a Hub id; or the folder of an adapter.
        dtype: of the weights.
        base: of an adapter, instead of the one that it names.

    Raises:
        UserError: as `load_model`; an adapter whose base is not there or has other shapes.
    """
    if not is_adapter(name_or_path):
        if base is not None:
            raise UserError(f"{name_or_path} is no adapter, it has no base: leave out --base")
        return load_model(name_or_path, dtype)
    folder = Path(name_or_path).expanduser()
    named = base or base_of(folder)
    try:
        model, tokenizer = load_model(named, dtype)
    except UserError as error:
        raise UserError(f"the base of {folder}: {error}; or name another place with --base") from error
    if (folder / "tokenizer_config.json").is_file():  # with the chat template that it was trained with
        tokenizer = _tokenizer_of(folder)
        check_vocabulary(model, tokenizer, f"{folder} on {named}")
    if _fields(folder).get("task_type") == "SEQ_CLS":
        model = with_score(model, tokenizer)
    return _with_adapter(model, folder, named), tokenizer


def merge(
    folder: str | Path, out: Path, *, dtype: torch.dtype | str = "bfloat16", base: str | None = None
) -> str:
    """Write the model that an adapter and its base make together.

    Holds the base once, and what `lowmem.models.merging.merged` holds beside it.

    Args:
        folder: of the adapter.
        out: new folder, which appears when it is whole.
        dtype: of the weights written.
        base: instead of the one that the adapter names.

    Returns:
        The name of the base.

    Raises:
        UserError: no adapter, no base, a method that adds no weights (prompts), `out` exists.
    """
    named = base or base_of(folder)
    with whole_folder(out) as made:
        model, tokenizer = load_tuned(str(folder), dtype, base=named)
        whole: PreTrainedModel = merged(model, str(folder))
        whole.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return named


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which appears as `out` when everything is in it.

    Raises:
        UserError: `out` holds something, its parent is missing, or the disk is full.
    """
    out = out.resolve()  # the folder that a link or "." stands for
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: name a new folder")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {str(out.parent)!r}; create it first")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
            made = Path(beside) / "whole"
            made.mkdir()
            yield made
            for path in made.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.replace(made, out)
    except Exception as error:  # safetensors has a class of its own for a full disk
        if isinstance(error, UserError) or not ran_out_of_room(error):
            raise
        raise UserError(
            f"cannot write {out}: {first_line(error)}; make room or name another place"
        ) from error


def _fields(folder: Path) -> dict[str, Any]:
    """What an adapter's configuration says."""
    if not (file := folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no adapter (no {CONFIG}): name the folder of a run with --lora-rank")
    return read_json(file)


def _tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of all classes, as a damaged file has it
        raise UserError(f"cannot read the tokenizer in {folder}: {first_line(error)}") from error
    return tokenizer


def _with_adapter(model: Any, folder: Path, base: str) -> Any:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
    from safetensors import SafetensorError

    from lowmem.models.vectorfit import register

    register()
    kind, known = _fields(folder).get("peft_type"), [str(k.value) for k in PEFT_TYPE_TO_CONFIG_MAPPING]
    if kind not in known:
        raise UserError(f"{folder / CONFIG}: PEFT has no method {kind!r}; {nearest(str(kind), known)}")
    if not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        raise UserError(f"{folder} has no adapter_model.safetensors: is the copy complete?")
    places = set(model.state_dict())
    try:
        with quiet():
            tuned = PeftModel.from_pretrained(model, str(folder)).eval()
            _check_places(tuned, folder, places)
    except (RuntimeError, ValueError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} does not go with {base}: {first_line(error)}") from error
    return tuned


def _check_places(tuned: Any, folder: Path, base: set[str]) -> None:
    """Compare the tensors of an adapter's file with those that such an adapter of this model has.

    Args:
        tuned: with the adapter; folder: it was read from; base: names of the base's own tensors, of which
            an adapter may bring some along (embeddings).

    Raises:
        ValueError: one has no place, or a place has none.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    found = set(load_peft_weights(str(folder), device="cpu"))
    brought = {name for name in found if _bare(name) in base}
    for left, what in (
        (found - wanted - brought, "of its tensors have no place in that model"),
        (wanted - found, "tensors that it has in that model are not in its file"),
    ):
        if left:
            raise ValueError(f"{len(left)} {what} (first {min(left)})")


def _bare(name: str) -> str:
    """Name of a tensor in the base, of that which PEFT gives it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
