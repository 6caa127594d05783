"""A Trainer whose checkpoints are whole or absent (see `checkpoint`).

No hook of the Trainer runs before the files are written, so the place is moved:
during a save `_get_output_dir` answers with the staging folder, and the built-in
rotation, which looks there too, finds nothing to delete; ours runs after the rename.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowmem.errors import CheckpointError, UserError, first_line, ran_out_of_room
from lowmem.models import sealed
from lowmem.models.adapters import name_base
from lowmem.models.int8 import files as int8
from lowmem.models.int8.convert import weights
from lowmem.optim.evaluated import evaluated, is_beside
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.shards import local, shard_of
from lowmem.optim.tensors.marks import trains
from lowmem.training.callbacks import Divergence
from lowmem.training.folder import checkpoint, forms, settings
from lowmem.training.folder.lock import held
from lowmem.training.folder.staging import publish, staging

log = logging.getLogger(__name__)


class WholeCheckpoints:
    """Saving and resuming; mix in before a Hugging Face trainer.

    Attributes:
        origin: what else a checkpoint belongs to, such as model and data; another one is refused.
        keep_int8: whether a model for use keeps int8 codes; a checkpoint always does.
        base: what the folder of an adapter calls its base; where the base was read from when None.
        tell: receives what is worth knowing about a resumed run, one sentence at a time.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    lowmem_optimizer: Any
    origin: Mapping[str, Any] = {}
    base: str | None = None
    tell: Callable[[str], None] = log.warning
    _strategy: Any
    keep_int8: bool = False
    _codes: bool = False
    _staging: Path | None = None
    _resumed: str | None = None
    _changed: Mapping[str, str] = {}
    _divergence: Divergence
    save_log: Callable[[Path], None]

    def about(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to: strategy, options, what is trained, and how."""
        config = self._strategy.to_config()
        named = self._strategy.source.trained(self.model)
        names = {n: n.replace("_checkpoint_wrapped_module.", "") for n, _ in named}
        shapes = {names[n]: f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}" for n, p in named}
        return {
            "strategy": config["name"] or config["parts"],
            "options": config["options"],
            "parameters": shapes,
            "settings": {**settings.of_arguments(self.args), **self.origin},
        }

    def resume_path(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, whole and of this run, or None where none is wanted.

        Args:
            wanted: True for the newest in the output folder; a checkpoint; or the folder of a run.

        What this run changes is told; asked again about the same one, it answers what it found.

        Raises:
            CheckpointError: none is whole, it belongs to another strategy or model, or a setting
                differs that cannot be changed on the way.
        """
        if not wanted:
            self._resumed, self._changed = None, {}
        elif self._resumed is None or str(wanted) != self._resumed:
            found = self._whole(wanted)
            theirs, now = sealed.about(found)["settings"], self.about()["settings"]
            done, planned = checkpoint.step(found), self.planned_steps()
            self._changed = settings.changes(theirs, now, found.name, done, planned)
            self._resumed = str(found)
            for sentence in self._changed.values():
                self.tell(sentence)
        return self._resumed

    def _whole(self, wanted: str | Literal[True]) -> Path:
        """The checkpoint that is meant, every byte of it read."""
        if wanted is True or not checkpoint.is_checkpoint_name(Path(wanted)):
            folder = Path(self.args.output_dir if wanted is True else wanted)
            with self.accelerator.main_process_first():  # it settles what an interrupted save left
                found, skipped = checkpoint.newest(folder)
            for sentence in skipped:
                self.tell(sentence)
            if found is None:
                raise CheckpointError("; ".join([f"no whole checkpoint in {folder}", *skipped]))
            checkpoint.check_about(found, self.about())  # every byte has just been read
        else:
            found = Path(wanted)
            checkpoint.check_origin(found, self.about())
        return found

    def planned_steps(self) -> int:
        """Steps of the whole run, as the Trainer will count them."""
        trainer: Any = self
        if trainer.args.max_steps > 0:
            return int(trainer.args.max_steps)
        with torch.random.fork_rng(devices=[]):  # a sampler may draw its seed
            return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Save, log and evaluate as this run says, not as the one that wrote the checkpoint."""
        position: tuple[int, int] = super()._init_training_state(max_steps, *args, **kwargs)  # type: ignore[misc]
        self.state.compute_steps(self.args, max_steps)
        return position

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model; an adapter names its base by what others can load it by."""
        with int8.writing(self.model, keep=self._codes):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.base is not None and self.args.should_save:
            name_base(Path(output_dir or self.args.output_dir), self.base)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Of the weights that the method evaluates."""
        with self.evaluated():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Others get the weights that the method evaluates."""
        with self.evaluated():
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint holds the weights of training, a model for use those that the method evaluates.

        One without an optimizer is of no other use than that.
        """
        trained = _internal_call and not self.args.save_only_model
        self._codes = _internal_call or self.keep_int8
        with nullcontext() if trained else self.evaluated():
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read the weights; int8 codes as they were."""
        if weights(self.model if model is None else model):
            int8.restore_(self.model if model is None else model, resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Read the weights of the best checkpoint, and what the method evaluates beside them.

        Int8 codes as they were.
        """
        best = self.state.best_model_checkpoint
        if weights(self.model) and best:
            int8.restore_(self.model, best)
        else:
            super()._load_best_model()  # type: ignore[misc]
        if not is_beside(self.lowmem_optimizer):
            return
        if self.args.save_only_model:  # these are the evaluated ones, the state is of others
            self.lowmem_optimizer.state.clear()
            return
        skipped = self.lowmem_optimizer.chunks.skipped  # counted over the whole run
        super()._load_optimizer_and_scheduler(best)  # type: ignore[misc]
        self.lowmem_optimizer.chunks.skipped = skipped

    def evaluated(self) -> AbstractContextManager[None]:
        """The weights that the method evaluates and `save_model` saves; afterwards those of training."""
        return nullcontext() if self.optimizer is None else evaluated(self.lowmem_optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside, seal, rename, then delete what is too old; one process of several does.

        A model that is ruined is not saved: it would push out the checkpoint to go back to.
        """
        ruined = "the weights are" if nonfinite_weights(self.model) else "the loss is"
        lost = self._divergence.since is not None and self.args.world_size == 1  # all processes save, or none
        if lost or ruined == "the weights are":
            self.tell(f"checkpoint-{self.state.global_step} is not saved: {ruined} not finite")
            return
        run_dir = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        target = run_dir / f"checkpoint-{self.state.global_step}"
        with self._saving(run_dir, target) as staged:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()  # each process writes the state of its own generators
            self._name_best(staged, target)
            if self.args.should_save:
                self.save_log(staged)
                optimizer = self.lowmem_optimizer
                stands = {"optimizer": optimizer.strategy.text, "turn": forms.turn_of(optimizer)}
                sealed.seal(staged, {**self.about(), **stands})
                publish(staged, target)
                best = self.state.best_model_checkpoint
                spared = [target, *([Path(best)] if best else [])]
                checkpoint.rotate(run_dir, self.args.save_total_limit, spared)
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _alone(self, resume: str | bool | None) -> Iterator[str | None]:
        """Hold the output folder for this run, one process of several, and settle where it starts."""
        folder = Path(self.args.output_dir)
        with ExitStack() as stack:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(folder))
            start = self.resume_path(resume)
            if self.args.should_save:
                checkpoint.check_no_foreign(folder, after=checkpoint.step(Path(start)) if start else 0)
            yield start

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End the run; with a limit of one the Trainer would delete every folder of a checkpoint's name."""
        self._staging = staging(Path(self.args.output_dir))
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        """The staging folder during a save, the run's folder otherwise."""
        return str(self._staging or super()._get_output_dir(trial))  # type: ignore[misc]

    @contextmanager
    def _saving(self, run_dir: Path, target: Path) -> Iterator[Path]:
        """Point the Trainer at the staging folder; a failed save leaves nothing and says why."""
        self._staging = staging(run_dir)
        self._clear()
        self._meet(self._staging)
        try:
            yield self._staging / target.name
        except BaseException as error:
            cause = forms.failure(error)
            no_room = isinstance(cause, Exception) and ran_out_of_room(cause)
            if not isinstance(cause, OSError) and not no_room:
                raise
            raise UserError(_no_room(target, cause)) from error
        finally:
            self._clear()
            self._staging = None

    def _meet(self, folder: Path) -> None:
        """Wait for the other processes, if there are any, and see that all write to one folder."""
        if self.args.world_size == 1:
            return
        if self.args.should_save:
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        blind = torch.tensor(0.0 if folder.is_dir() else 1.0, device=self.args.device)
        if self.accelerator.reduce(blind, "sum"):
            raise UserError(
                f"output_dir: {folder.parent} is not one folder for all {self.args.world_size} processes: "
                "a checkpoint is written by all of them; name one on a file system that they share"
            )

    def _clear(self) -> None:
        if self._staging and self.args.should_save:
            sealed.discard(self._staging)

    def _name_best(self, staged: Path, target: Path) -> None:
        """The Trainer notes the best checkpoint by its path: make that the final one."""
        state = self.state
        if state.best_model_checkpoint and Path(state.best_model_checkpoint) == staged:
            state.best_model_checkpoint = str(target)
            if self.args.should_save:
                state.save_to_json(str(staged / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """Load them, then put in what this run changes; an unreadable file is the checkpoint's fault."""
        own = settings.Own.of(self.lowmem_optimizer, self.lr_scheduler)
        try:
            super()._load_optimizer_and_scheduler(folder)  # type: ignore[misc]
        except UserError:
            raise
        except Exception as error:
            raise CheckpointError(f"cannot resume from {folder}: {first_line(error)}") from error
        own.restore_(self.lowmem_optimizer, self.lr_scheduler, self._changed)


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Names of the trainable tensors that hold a number that is not finite, here or on another rank."""
    named = [(n, p) for n, p in model.named_parameters() if trains(p) and p.numel()]
    seen = [p.scale if isinstance(p, Int8Weight) else local(p.detach()) for _, p in named]  # codes always are
    ruined = [float(own.numel() > 0 and not _finite(own)) for own in seen]
    shard = next((found for _, p in named if (found := shard_of(p))), None)
    if shard is not None:
        ruined = shard.total(torch.tensor(ruined, device=named[0][1].device)).tolist()
    return [name for (name, _), count in zip(named, ruined, strict=True) if count]


def _finite(x: torch.Tensor) -> bool:
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())  # NaN wins over both


def _no_room(target: Path, error: BaseException) -> str:
    """One line on a save that failed."""
    free = shutil.disk_usage(target.parent).free
    found, _ = checkpoint.newest(target.parent)
    kept = f"{found.name} is whole and kept" if found else "there is no earlier one"
    return (
        f"could not write {target} ({first_line(error)}; {free} bytes free); {kept}: "
        "make room or set a smaller save_total_limit, then resume"
    )
