"""Fine-tune language models in a fraction of the memory, and know beforehand how much it takes.

Every low-memory method is a point of one space: projection x state precision x
residual x gradient source. Public names are resolved on first use, so importing
`lowmem` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Entry": "lowmem.strategies",
    "available": "lowmem.strategies",
    "create": "lowmem.strategies",
    "Strategy": "lowmem.optim.strategy",
    "LowMemOptimizer": "lowmem.optim.optimizer",
    "optimizer": "lowmem.strategies",
    "quantize_weights_": "lowmem.models.int8.convert",
    "state_bytes": "lowmem.memory.count",
    "plan": "lowmem.memory.plan",
    "Plan": "lowmem.memory.plan",
    "profile": "lowmem.memory.measure.profile",
    "Profile": "lowmem.memory.measure.profile",
    "LowMemTrainer": "lowmem.training.trainer",
    "LowMemSFTTrainer": "lowmem.training.trainer",
    "LowMemArguments": "lowmem.training.arguments",
    "LowMemSFTConfig": "lowmem.training.arguments",
    **{f"LowMem{task}Trainer": "lowmem.training.tasks" for task in ("DPO", "KTO", "ORPO", "Reward", "GRPO")},
    **{
        f"LowMem{task}Config": "lowmem.training.arguments"
        for task in ("DPO", "KTO", "ORPO", "Reward", "GRPO")
    },
    "LowMemChoiceTrainer": "lowmem.training.scored",
    "LowMemAnswerTrainer": "lowmem.training.scored",
    "hf_optimizer": "lowmem.training.trainer",
    "LowMemError": "lowmem.errors",
    "UserError": "lowmem.errors",
    "ConfigError": "lowmem.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the home of a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *__all__])
