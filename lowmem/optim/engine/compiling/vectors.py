"""How Inductor writes a kernel for a processor: by whole vectors, which never go through memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lowmem.optim.engine.compiling.private import private

_CPP = "torch._inductor.codegen.cpp"
_READ = re.compile(r"at::vec::Vectorized<(u?int8_t)>::loadu\((.*), static_cast<int64_t>\((8|16)L?\)\)")
_WRITTEN = re.compile(r"(\w+)\.store\((.*), static_cast<int64_t>\((8|16)L?\)\);")
_NARROWED = re.compile(r"at::vec::convert<(u?int8_t)(,1,int32_t,2)?>\(\w+\)")
_LOWEST = "_mm256_setr_epi8(" + ", ".join(2 * ["0, 4, 8, 12", *3 * ["-1, -1, -1, -1"]]) + ")"
"""The lowest bytes of four words to the front, in either half of a vector."""
_FIRST = "_mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1)"
"""The fronts of both halves to the front; the rest is zero."""


@contextlib.contextmanager
def whole_vectors() -> Iterator[None]:
    """Vectors are seen as other dtypes where they are, those of 16 bits are filled, bytes go straight.

    By itself Inductor takes a vector apart to see its bits as another dtype, which takes as long as all
    else in a step. Where a kernel has tensors of 32 bits too, it half fills the vectors of 16, which costs
    AVX2 two ways through memory each, and so do the codes of 8-bit states: more than all else in their
    step. Nothing but time depends on any of it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    with contextlib.ExitStack() as patches, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")  # as weights and states may be
        if capability in ("AVX2", "AVX512"):
            patches.enter_context(_apart_from_others())
            patches.enter_context(_in_place())
        if capability == "AVX2":
            patches.enter_context(_filled())
            patches.enter_context(_straight())
        yield


def _apart_from_others() -> contextlib.AbstractContextManager[Any]:
    """What others generated of the same graph is not taken from the cache."""
    tag = private("torch.compiler.config.cache_key_tag")
    if tag is None:
        return contextlib.nullcontext()
    changed: contextlib.AbstractContextManager[Any] = private("torch.compiler.config").patch(
        cache_key_tag=f"{tag} lowmem {_version()}"
    )
    return changed


@functools.cache
def _version() -> str:
    """Which changes these are."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _in_place() -> contextlib.AbstractContextManager[Any]:
    """The bits of a vector as those of another dtype of its size."""
    apart = private(f"{_CPP}.CppVecOverrides.to_dtype_bitcast")
    names, virtual = private(f"{_CPP}.DTYPE_TO_CPP"), private("torch._inductor.virtualized.V")
    if apart is None or names is None or virtual is None:
        return contextlib.nullcontext()

    def bits(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> Any:
        count = virtual.kernel._get_num_vectors(dtype)
        if x.dtype != src_dtype or dtype.itemsize != src_dtype.itemsize:
            return apart(x, dtype, src_dtype)
        kind = f"Vectorized<{names[dtype]}>" if count == 1 else f"VectorizedN<{names[dtype]}, {count}>"
        return (
            f"[&]() {{ at::vec::{kind} seen; static_assert(sizeof(seen) == sizeof({x})); "
            f"std::memcpy(static_cast<void*>(&seen), &{x}, sizeof(seen)); return seen; }}()"
        )

    home = private(f"{_CPP}.CppVecOverrides")
    return patch.object(home, "to_dtype_bitcast", staticmethod(bits))


def _filled() -> contextlib.AbstractContextManager[Any]:
    """As many elements at a time as a vector of 16 bits has, where any tensor of a kernel has such."""
    select, low = private(f"{_CPP}.TilingSelect.select_tiling"), private(f"{_CPP}.get_loop_body_lowp_fp")
    bodies = private(f"{_CPP}._get_loop_body")
    if select is None or low is None or bodies is None:
        return contextlib.nullcontext()

    def filled(self: Any, functions: Any, sizes: Any) -> Any:
        if not any(low(body)[0] for body in bodies(functions)):
            return select(self, functions, sizes)
        with patch(f"{_CPP}.get_loop_body_lowp_fp", lambda body: (torch.bfloat16, True)):
            tiling = select(self, functions, sizes)
        # tiles that are turned over are written for as many elements as 32 bits have
        return tiling if len(tiling[1]) < 2 else select(self, functions, sizes)

    return patch.object(private(f"{_CPP}.TilingSelect"), "select_tiling", filled)


def _straight() -> contextlib.ExitStack:
    """8 or 16 bytes are read, made of 32-bit integers and written without a buffer in between."""
    patches = contextlib.ExitStack()
    for name, change in _CHANGES.items():
        written = private(f"{_CPP}.CppVecKernel.{name}")
        if written is not None:
            changed = functools.partialmethod(_changed, written, change)
            patches.enter_context(patch.object(private(f"{_CPP}.CppVecKernel"), name, changed))
    return patches


def _changed(
    kernel: Any, written: Callable[..., Any], change: Callable[..., Any], *args: Any, **more: Any
) -> Any:
    return change(written(kernel, *args, **more), *args, **more)


def _read(line: str, *_: Any) -> str:
    """A load of part of a vector of bytes."""

    def straight(found: re.Match[str]) -> str:
        kind, place, count = found.groups()
        load = "_mm_loadl_epi64" if count == "8" else "_mm_loadu_si128"
        bits = f"{load}(reinterpret_cast<const __m128i*>({place}))"
        return f"at::vec::Vectorized<{kind}>(_mm256_zextsi128_si256({bits}))"

    return _READ.sub(straight, line)


def _narrowed(line: str, x: Any, dtype: torch.dtype, src_dtype: torch.dtype, **_: Any) -> str:
    """The lowest bytes of 32-bit integers, one or two vectors of them."""
    found = _NARROWED.fullmatch(line)
    if found is None or src_dtype != torch.int32:
        return line
    kind, two = found.groups()
    low = [
        f"_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(static_cast<__m256i>({part}), {_LOWEST}), {_FIRST})"
        for part in ((f"{x}[0]", f"{x}[1]") if two else (x,))
    ]
    return f"at::vec::Vectorized<{kind}>({f'_mm256_unpacklo_epi64({low[0]}, {low[1]})' if two else low[0]})"


def _write(lines: Any, value: Any, var: str, index: Any, dtype: torch.dtype, *_: Any, **__: Any) -> Any:
    """A store of part of a vector of bytes."""

    def straight(found: re.Match[str]) -> str:
        value, place, count = found.groups()
        store = "_mm_storel_epi64" if count == "8" else "_mm_storeu_si128"
        bits = f"_mm256_castsi256_si128(static_cast<__m256i>({value}))"
        return f"{store}(reinterpret_cast<__m128i*>({place}), {bits});"

    if dtype not in (torch.int8, torch.uint8):
        return lines
    return lines.map(lambda line: _WRITTEN.sub(straight, line))


_CHANGES: Mapping[str, Callable[..., Any]] = {
    "_get_vec_load_line": _read,
    "get_to_dtype_expr": _narrowed,
    "_get_store_line": _write,
}
