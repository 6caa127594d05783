"""What an architecture may ask of a trace before it is refused, in one line.

Layers of a recurrent model (Mamba, RWKV, xLSTM) walk through the text token by token in Python where their
own CUDA kernels are missing, as they are in a trace. Thousands of operations for each layer take minutes
without weights too, and say nothing about the kernels: such a walk is recognised in the first layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from lowmem.errors import UserError
from lowmem.memory.trace import trainable

OPERATIONS, LAYER, FIRST = 60_000, 1_500, 500
"""Of a forward pass, shared evenly by its layers; of one layer, however few there are; and before any layer.
Deep transformers take 10,000 in all, a layer that goes by chunks of the text some 700 for 2,048 tokens.
"""
SLOW = 600
"""Operations of a first layer from which on a plan takes long enough to say so."""


@functools.cache
def _say(kind: str, operations: int) -> None:
    logging.getLogger(__name__).info(
        "%s takes %d operations in its first layer without its own kernels: planning takes a minute or more",
        kind, operations,
    )  # fmt: skip


class Patience(TorchFunctionMode):
    """Counts the operations that a forward pass calls and refuses a walk; later passes are not counted.

    Nor is what hooks do before a module runs: a probe draws the noise of each weight there.

    Args:
        model: whose decoder layers are known.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.layers = model, trainable.decoder_layers(model)
        self.kind = str(getattr(model.config, "model_type", type(model).__name__))
        self.done = self.operations = self.before = 0
        self.begun = self.hooked = False
        self.modules = frozenset(model.modules())
        self.share = min(LAYER, OPERATIONS / max(1, len(self.layers)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.begun and not self.hooked and self.done < len(self.layers):
            self.operations += 1
            if self.operations > FIRST + self.share * (self.done + 1):
                raise UserError(
                    "its layers walk through the text token by token, which takes minutes without their own "
                    "CUDA kernels and says nothing about these (a short sequence can be planned)"
                )
        return func(*args, **(kwargs or {}))

    def _begin(self, *args: Any) -> None:
        # what looks at parameters before it grows with their number: reading `requires_grad` is a call too
        self.begun = True

    def _enter(self, *args: Any) -> None:
        self.before = self.before or self.operations

    def _count(self, *args: Any) -> None:
        self.done += 1
        if self.done == 1 and self.operations - self.before > SLOW:
            _say(self.kind, self.operations - self.before)

    def _before_hooks(self, module: nn.Module, args: Any) -> None:
        self.hooked = self.hooked or module in self.modules

    def _after_hooks(self, module: nn.Module, args: Any) -> None:
        self.hooked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within it."""
        handles = [layer.register_forward_hook(self._count) for layer in self.layers]
        handles += [layer.register_forward_pre_hook(self._enter) for layer in self.layers[:1]]
        handles.append(self.model.register_forward_pre_hook(self._begin))
        # those of all modules run first, and a probe's are put before those that a module has by then
        handles.append(register_module_forward_pre_hook(self._before_hooks))
        handles += [module.register_forward_pre_hook(self._after_hooks) for module in self.modules]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def refusing(config: Any, why: str) -> Iterator[None]:
    """One line for whatever the code of an architecture raises: there are some two hundred of them.

    torch logs what its shape formulas refuse, with a traceback, before it raises it: that is not shown.
    """
    told = logging.getLogger("torch._subclasses.fake_tensor")
    told.addFilter(_nothing)
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{why} ({_first_line(error)})"
        raise UserError(
            f"cannot plan {config.model_type!r}: {reason}; measure it with `lowmem profile` instead"
        ) from error
    finally:
        told.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__
