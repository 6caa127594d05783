"""Reading and writing models with int8 weights, tensor by tensor.

    load    files of bf16 weights -> codes; in memory: int8 weights, and one tensor of a file
    save    codes -> files of bf16 weights that `from_pretrained` loads; one decoded tensor
            or, to resume from or to keep, codes and scales: `NAME.codes`, `NAME.scale`

Files are safetensors: a header, then the tensors one after the other. They are written as the tensors
are decoded, since the usual writer wants all of a file at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import CheckpointError, UserError
from lowmem.models.int8.convert import chosen, coded, weights
from lowmem.optim.int8.tensor import Int8Weight

SHARD = 2 << 30
"""Bytes of a file, at most, unless one tensor is larger."""
CODES, SCALE = ".codes", ".scale"
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
KEPT = {"quant_method": "lowmem_int8", "block": 256}
"""What a configuration says of kept codes, so that nobody takes them for something else."""


def save(model: Any, folder: str | Path, *, keep: bool = False, shard: int = SHARD) -> None:
    """Write a model's weights and configuration.

    Args:
        model: of transformers, with int8 weights.
        folder: where to; made where it is not there.
        keep: write codes and scales instead of decoded weights.
        shard: bytes of a file.

    Raises:
        OSError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _configuration(model, folder, keep)
    files = _files(list(_entries(model, keep)), shard)
    where: dict[str, str] = {}
    for i, entries in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        _write(folder / name, entries)
        where |= {key: name for key, *_ in entries}
    if len(files) > 1:
        total = sum(_size(shape, dtype) for entries in files for _, shape, dtype, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def writing(model: Any, *, keep: bool) -> Iterator[None]:
    """Let a model's own `save_pretrained` write its int8 weights meanwhile; of others nothing changes.

    Args:
        model: any; keep: codes, not what they stand for.
    """
    if not (isinstance(model, nn.Module) and weights(model)):
        yield
        return
    own: Any = lambda folder, **_: save(model, folder, keep=keep)  # noqa: E731
    model.save_pretrained = own
    try:
        yield
    finally:
        del model.save_pretrained


def _configuration(model: Any, folder: Path, keep: bool) -> None:
    """config.json, and generation_config.json where the model has one."""
    if not hasattr(model, "config"):
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if keep:
        place = folder / "config.json"
        told = json.loads(place.read_text(encoding="utf-8")) | {"quantization_config": KEPT}
        place.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


Entry = tuple[str, tuple[int, ...], torch.dtype, Tensor]


def _entries(model: nn.Module, keep: bool) -> Iterator[Entry]:
    """Name, shape and dtype in the file, and the tensor; of tied ones the first name alone."""
    for name, x in _held(model):
        if keep and isinstance(x, Int8Weight):
            for end, part in ((CODES, x.codes), (SCALE, x.scale)):
                yield name + end, tuple(part.shape), part.dtype, part
        else:
            yield name, tuple(x.shape), x.dtype, x


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    names = set(model.state_dict().keys())
    yield from ((name, b) for name, b in model.named_buffers() if name in names)


def _files(entries: list[Entry], shard: int) -> list[list[Entry]]:
    """Entries in the order of the model, as many in a file as fit."""
    files: list[list[Entry]] = [[]]
    taken = 0
    for entry in entries:
        size = _size(entry[1], entry[2])
        if files[-1] and taken + size > shard:
            files.append([])
            taken = 0
        files[-1].append(entry)
        taken += size
    return files


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _write(path: Path, entries: list[Entry]) -> None:
    """One safetensors file: its header knows where each tensor will lie."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, _ in entries:
        size = _size(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, x in entries:
            dense = x.decode() if isinstance(x, Int8Weight) else x.detach()
            stream.write(dense.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder's safetensors, one at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def restore_(model: nn.Module, folder: str | Path) -> None:
    """Read codes and scales that `save` kept into a model like the one that was saved, in place.

    Raises:
        CheckpointError: tensors are missing, or have other shapes.
    """
    places = dict(_places(model))
    missing = set(places)
    for name, x in tensors(Path(folder)):
        own = places.get(name)
        if own is None or own.shape != x.shape:
            raise CheckpointError(f"{folder}: {name} is not of this model with int8 weights")
        with torch.no_grad():
            own.copy_(x)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing (first {sorted(missing)[0]})")


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, _, _, x in _entries(model, keep=True):
        yield name, x.detach() if not isinstance(x, Int8Weight) else x


def load(folder: str | Path, config: Any, dtype: torch.dtype, *, embeddings: bool = False) -> Any | None:
    """A model with int8 weights from files of floating-point ones, converted as they are read.

    Args:
        folder: with safetensors; config: of transformers; dtype: that weights compute in.
        embeddings: embedding and head too.

    Returns:
        None where the names in the files are not those of the model: then it must be loaded another way.

    Raises:
        UserError: a stack of matrices that are no multiple of 256 elements.
    """
    model = _hollow(config, dtype)
    names = {name for name, _ in _held(model)}
    alias = _aliases(model, names)
    wanted = set(chosen(model, embeddings=embeddings))
    fills = {name: (p, id(p) in wanted) for name, p in model.named_parameters()}
    seen = set()
    for name, x in tensors(Path(folder)):
        known = alias.get(name, name)
        if known not in fills:
            if known.endswith(("inv_freq", ".attn.bias", ".masked_bias", ".attention.bias")):
                continue  # what models of earlier versions kept, and none reads
            if known in dict(model.named_parameters(remove_duplicate=False)):
                continue  # another name of a tied weight
            return None
        p, as_codes = fills[known]
        if p.shape != x.shape:
            return None
        x = x.to(dtype) if x.is_floating_point() else x
        new = coded(x) if as_codes else nn.Parameter(x.clone() if x.data_ptr() % 64 else x)
        _replace(model, p, new)
        seen.add(known)
    if seen != set(fills):
        return None
    return model.eval()


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is old:
                module._parameters[name] = new


def _aliases(model: Any, names: Iterable[str]) -> Mapping[str, str]:
    """Names without the prefix of the backbone, as a backbone alone was saved."""
    head = f"{getattr(model, 'base_model_prefix', '')}."
    return {name.removeprefix(head): name for name in names if name.startswith(head)}


def _hollow(config: Any, dtype: torch.dtype) -> Any:
    """The model with parameters on meta and buffers as they are."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    return model


def check_folder(folder: Path) -> None:
    """Refuse a folder of kept codes.

    Raises:
        UserError: naming the way out.
    """
    if (folder / "config.json").is_file() and "lowmem_int8" in (folder / "config.json").read_text("utf-8"):
        raise UserError(f"{folder} holds int8 codes already; train from the model's bf16 weights")
