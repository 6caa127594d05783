"""A model with int8 weights and its tokenizer, from a name, a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem.errors import UserError
from lowmem.models.entries import resolve, to_dtype
from lowmem.models.int8.convert import quantize_weights_
from lowmem.models.int8.files import check_folder, load
from lowmem.models.loading import check_vocabulary, load_model, load_tokenizer, locate
from lowmem.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_int8(
    name_or_path: str, dtype: torch.dtype | str = "bfloat16", *, embeddings: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model with int8 weights, and its tokenizer.

    Each tensor is converted as it is read: in memory are int8 weights and one tensor in the dtype of the
    file. Where the names in the files are not those of the model (experts that lie one by one, a repository
    that is not on this machine) it is loaded whole first, and converted then.

    Args:
        name_or_path: as `lowmem.models.loading.load_model`.
        dtype: that weights compute in; embeddings: embedding and head too.

    Raises:
        UserError: as `load_model`; a folder that holds int8 codes already.

    Example:
        >>> model, tokenizer = load_int8("smollm2-135m")
        >>> model.model.layers[0].mlp.up_proj.weight.codes.dtype
        torch.int8
    """
    if Path(name_or_path).is_dir():
        check_folder(Path(name_or_path))
    place = Path(locate(name_or_path))
    if not place.is_dir():  # the Hub's own loader fetches it
        model, tokenizer = load_model(name_or_path, dtype)
        return quantize_weights_(model, embeddings=embeddings), tokenizer
    found = _streamed(place, to_dtype(dtype), embeddings) if any(place.glob("*.safetensors")) else None
    if found is None:
        model, tokenizer = load_model(name_or_path, dtype)
        return quantize_weights_(model, embeddings=embeddings), tokenizer
    tokenizer = load_tokenizer(name_or_path)
    check_vocabulary(found, tokenizer, name_or_path)
    return found, tokenizer


def _streamed(place: Path, dtype: torch.dtype, embeddings: bool) -> Any | None:
    """The model, tensor by tensor; None where it must be loaded another way."""
    from transformers import GenerationConfig

    with quiet(), torch.random.fork_rng(devices=[]):
        config = resolve(str(place)).config()
        try:
            model = load(place, config, dtype, embeddings=embeddings)
        except UserError:
            raise
        except Exception:  # the ordinary way says what is wrong with the files
            return None
        if model is not None and (place / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(place)
    if model is not None:
        model.config._name_or_path = model.name_or_path = str(place)
    return model
