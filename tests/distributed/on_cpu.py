"""What accelerate builds on cards alone, on CPU processes: FSDP2 where a plugin asks for it.

The command line under torchrun, as on cards:

    torchrun --nproc-per-node 2 -m tests.distributed.on_cpu finetune --fsdp --model smollm2-135m ...
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from lowmem.training.ranks import sharding


def let_cpus_shard() -> None:
    """From now on accelerate takes processes on CPUs for cards where FSDP is asked for."""
    made, sharding.IGNORED = AcceleratorState.__init__, ()

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make  # type: ignore[method-assign]


if __name__ == "__main__":
    import lowmem.cli

    let_cpus_shard()
    lowmem.cli.app()
