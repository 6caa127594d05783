"""How Inductor writes a kernel for a processor: by which instructions, and by whole vectors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from lowmem.optim.engine.compiling.private import private

_CPP = "torch._inductor.codegen.cpp"


@contextlib.contextmanager
def instructions_believed() -> Iterator[None]:
    """No test is compiled of what the processor says it can: it takes ten seconds, and g++ can it too."""
    home = private("torch._inductor.cpu_vec_isa.VecISA")
    if private("torch._inductor.cpu_vec_isa.VecISA.check_build") is None:
        yield
        return
    with patch.object(home, "check_build", lambda instructions, code: True):
        yield


def refused(error: Exception) -> bool:
    """Whether the C++ compiler did not take what it was given."""
    wrapper = private("torch._inductor.exc.InductorError")
    kind = private("torch._inductor.exc.CppCompileError")
    if wrapper is None or kind is None or not isinstance(error, wrapper):
        return False
    return isinstance(getattr(error, "inner_exception", None), kind)


def forget_instructions() -> None:
    """Let Inductor find out anew what the compiler takes: every set of instructions remembers its claim."""
    getattr(private("torch._inductor.cpu_vec_isa.valid_vec_isa_list"), "cache_clear", lambda: None)()
    for instructions in private("torch._inductor.cpu_vec_isa.supported_vec_isa_list") or ():
        for found in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            vars(instructions).pop(found, None)  # of the class, False
        for kind in type(instructions).__mro__:
            for member in vars(kind).values():
                getattr(member, "cache_clear", lambda: None)()


@contextlib.contextmanager
def whole_vectors() -> Iterator[None]:
    """Vectors are seen as other dtypes where they are, and those of 16 bits are filled.

    By itself Inductor takes a vector apart to see its bits as another dtype, which takes as long as all
    else in a step. Where a kernel has tensors of 32 bits too, it half fills the vectors of 16, which costs
    AVX2 two ways through memory each. Nothing but time depends on either.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    with contextlib.ExitStack() as patches, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")  # as weights and states may be
        if capability in ("AVX2", "AVX512"):
            patches.enter_context(_apart_from_others())
            patches.enter_context(_in_place())
        if capability == "AVX2":
            patches.enter_context(_filled())
        yield


def _apart_from_others() -> contextlib.AbstractContextManager[Any]:
    """What others generated of the same graph is not taken from the cache."""
    tag = private("torch.compiler.config.cache_key_tag")
    if tag is None:
        return contextlib.nullcontext()
    changed: contextlib.AbstractContextManager[Any] = private("torch.compiler.config").patch(
        cache_key_tag=f"{tag} lowmem whole vectors"
    )
    return changed


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
