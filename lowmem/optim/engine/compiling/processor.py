"""By which instructions Inductor writes a kernel for a processor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from lowmem.optim.engine.compiling.private import private


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
