"""A Trainer whose checkpoints are whole or absent (see `checkpoint`).

No hook of the Trainer runs before the files are written, so the place is moved:
during a save `_get_output_dir` answers with the staging folder, and the built-in
rotation, which looks there too, finds nothing to delete; ours runs after the rename.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lowmem.errors import CheckpointError, UserError, first_line, ran_out_of_room
from lowmem.training import checkpoint

log = logging.getLogger(__name__)


class WholeCheckpoints:
    """Saving and resuming; mix in before a Hugging Face trainer."""

    args: Any
    model: Any
    state: Any
    accelerator: Any
    _strategy: Any
    _staging: Path | None = None

    def about(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to: strategy, options, and what is trained."""
        config = self._strategy.to_config()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        shapes = {n: f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}" for n, p in named}
        name = config["name"] or config["parts"]
        return {"strategy": name, "options": config["options"], "parameters": shapes}

    def resume_path(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, whole and of this run, or None where none is wanted.

        Args:
            wanted: True for the newest in the output folder; a checkpoint; or the folder of a run.

        Raises:
            CheckpointError: none is whole, or it belongs to another strategy or model.
        """
        if not wanted:
            return None
        if wanted is True or not checkpoint.is_checkpoint_name(Path(wanted)):
            folder = Path(self.args.output_dir if wanted is True else wanted)
            with self.accelerator.main_process_first():  # it settles what an interrupted save left
                found, skipped = checkpoint.newest(folder)
            for sentence in skipped:
                log.warning(sentence)
            if found is None:
                raise CheckpointError("; ".join([f"no whole checkpoint in {folder}", *skipped]))
            checkpoint.check_about(found, self.about())  # every byte has just been read
        else:
            found = Path(wanted)
            checkpoint.check_origin(found, self.about())
        return str(found)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside, seal, rename, then delete what is too old; one process of several does."""
        run_dir = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        target = run_dir / f"checkpoint-{self.state.global_step}"
        with self._saving(run_dir, target) as staged:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()  # each process writes the state of its own generators
            self._name_best(staged, target)
            if self.args.should_save:
                checkpoint.seal(staged, self.about())
                checkpoint.publish(staged, target)
                best = self.state.best_model_checkpoint
                spared = [target, *([Path(best)] if best else [])]
                checkpoint.rotate(run_dir, self.args.save_total_limit, spared)
            self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        """The staging folder during a save, the run's folder otherwise."""
        return str(self._staging or super()._get_output_dir(trial))  # type: ignore[misc]

    @contextmanager
    def _saving(self, run_dir: Path, target: Path) -> Iterator[Path]:
        """Point the Trainer at the staging folder; a failed save leaves nothing and says why."""
        self._staging = checkpoint.staging(run_dir)
        self._clear()
        self.accelerator.wait_for_everyone()
        try:
            yield self._staging / target.name
        except Exception as error:
            if not ran_out_of_room(error):
                raise
            raise UserError(_no_room(target, error)) from error
        finally:
            self._clear()
            self._staging = None

    def _clear(self) -> None:
        if self._staging and self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _name_best(self, staged: Path, target: Path) -> None:
        """The Trainer notes the best checkpoint by its path: make that the final one."""
        state = self.state
        if state.best_model_checkpoint and Path(state.best_model_checkpoint) == staged:
            state.best_model_checkpoint = str(target)
            if self.args.should_save:
                state.save_to_json(str(staged / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """Load them; a file that cannot be read is the checkpoint's fault."""
        try:
            super()._load_optimizer_and_scheduler(folder)  # type: ignore[misc]
        except UserError:
            raise
        except Exception as error:
            raise CheckpointError(f"cannot resume from {folder}: {first_line(error)}") from error


def _no_room(target: Path, error: BaseException) -> str:
    """One line on a save that failed."""
    free = shutil.disk_usage(target.parent).free
    found, _ = checkpoint.newest(target.parent)
    kept = f"{found.name} is whole and kept" if found else "there is no earlier one"
    return (
        f"could not write {target} ({first_line(error)}; {free} bytes free); {kept}: "
        "make room or set a smaller save_total_limit, then resume"
    )
