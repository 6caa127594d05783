"""The names of torch that are not public: each may be gone in another version, which is done without.

Only this room knows any. What is missing is said once, to who debugs.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

PRIVATE = (
    "torch._inductor.compile_fx.compile_fx",
    "torch._inductor.compile_fx.compile_fx_inner",
    "torch._inductor.config.cpp.vec_isa_ok",
    "torch._inductor.cpu_vec_isa.VecISA.check_build",
    "torch._inductor.cpu_vec_isa.supported_vec_isa_list",
    "torch._inductor.cpu_vec_isa.valid_vec_isa_list",
    "torch._inductor.codegen.cpp.CppVecKernel._get_vec_load_line",
    "torch._inductor.codegen.cpp.CppVecKernel.get_to_dtype_expr",
    "torch._inductor.codegen.cpp.CppVecKernel._get_store_line",
    "torch._inductor.codegen.cpp.CppVecOverrides.to_dtype_bitcast",
    "torch._inductor.codegen.cpp.TilingSelect.select_tiling",
    "torch._inductor.codegen.cpp.get_loop_body_lowp_fp",
    "torch._inductor.codegen.cpp._get_loop_body",
    "torch._inductor.codegen.cpp.DTYPE_TO_CPP",
    "torch._inductor.exc.CppCompileError",
    "torch._inductor.exc.InductorError",
    "torch._inductor.virtualized.V",
    "torch.compiler.config.cache_key_tag",
    "torch._functorch.config.enable_autograd_cache",
    "torch._inductor.list_options",
    "torch._dynamo.mark_dynamic",
)
"""All of them."""
ABSENT = object()


def private(name: str) -> Any:
    """What a private name of torch stands for, None where there is no such thing."""
    owner, _, attribute = name.rpartition(".")
    try:
        home: Any = importlib.import_module(owner)
    except ImportError:  # no module, but something in one
        home = private(owner) if "." in owner else None
    found = None if home is None else look(home, attribute)
    if found is ABSENT:
        say(f"torch {torch.__version__} has no {name}: the step goes without")
        return None
    return found


def look(home: Any, attribute: str) -> Any:
    """What a thing has under a name, or `ABSENT`."""
    return getattr(home, attribute, ABSENT)


@functools.cache
def say(what: str) -> None:
    """Once."""
    log.debug(what)
