"""What a Trainer reads from its arguments when training begins, for a search may have changed them.

`trainer.hyperparameter_search` puts the values of each trial into `trainer.args`: a trial may have another
strategy, other options and another clipping than the trainer was made with, and they are checked as those of
a run of its own are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem import several
from lowmem.errors import ConfigError, UserError
from lowmem.optim.tensors.offload import NO_CUDA
from lowmem.training.arguments import check
from lowmem.training.callbacks import Divergence
from lowmem.training.ranks.sharding import of_run

if TYPE_CHECKING:
    from lowmem.optim.strategy import Strategy


class Searched:
    """Strategy and clipping of a Hugging Face trainer; mix in before it."""

    args: Any
    optimizer: Any
    _strategy: Strategy
    _clip: str
    _divergence: Divergence
    _sync: Any

    def _read_arguments(self) -> None:
        """Take strategy, clipping and limit from the arguments.

        Raises:
            ConfigError: naming everything in them that is wrong or would be ignored.
        """
        if problems := check(self.args):
            raise ConfigError(problems)
        self._strategy, self._clip = self.args.strategy(), self.args.clip_policy
        self._divergence.limit = self.args.nonfinite_limit
        if problems := engine_problems(self):
            raise ConfigError(problems)

    def _hp_search_setup(self, trial: Any) -> None:
        """Read the arguments anew: once a trial, if there is one, has had its say.

        Raises:
            ConfigError: as at construction; UserError: what cannot change once a trainer is made.
        """
        before = self._strategy
        super()._hp_search_setup(trial)  # type: ignore[misc]
        if trial is not None:  # each has a model of its own
            self._sync = None
        self._read_arguments()
        now = self._strategy
        if self.optimizer is not None and now != before:
            raise UserError(
                f"optim: the optimizer was made for {_written(before)}, not {_written(now)}; make another "
                "trainer, or give it model_init"
            )
        if now.source.needs_autograd != before.source.needs_autograd or (
            now.source.quantized != before.source.quantized
        ):
            takes = "other gradients" if now.source.needs_autograd else "no gradients"
            raise UserError(
                f"optim: {now.name} takes {takes}, and this trainer was made for {before.name}; search over "
                "methods of one kind, with a trainer for each"
            )


def _written(strategy: Strategy) -> str:
    """A strategy as one writes it."""
    given = ",".join(f"{key}={value}" for key, value in strategy.options.items())
    return f"{strategy.name}({given})" if given else str(strategy.name)


def engine_problems(trainer: Any) -> list[str]:
    """What only the trainer knows of the devices it runs on."""
    name, args = trainer._strategy.name, trainer.args
    by_values = not trainer._strategy.source.needs_autograd  # several processes exchange losses
    copied = not trainer.is_fsdp_enabled and (args.gradient_release or trainer._strategy.turns)
    alone = copied or bool(trainer._strategy.asks) or (by_values and args.n_gpu > 1)
    what = "gradient_release" if args.gradient_release else name
    rules = [
        (args.offload_state and args.device.type != "cuda", NO_CUDA),
        (args.offload_state and trainer.is_fsdp_enabled, several.STAYS),
        (trainer.is_deepspeed_enabled, several.DEEPSPEED),
        (
            args.gradient_sync == "low_rank" and args.world_size < 2,
            "gradient_sync: there is one process, which exchanges nothing; leave it out, or start several",
        ),
        (
            alone and (args.world_size > 1 or args.n_gpu > 1),
            several.one_device(what, max(args.world_size, args.n_gpu)),
        ),
    ]
    return [text for broken, text in rules if broken] + of_run(trainer)
