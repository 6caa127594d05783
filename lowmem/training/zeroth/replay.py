"""The weights of a run without gradients, rebuilt from its base model and its log."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lowmem.console import Console
from lowmem.errors import UserError
from lowmem.training.zeroth.log import ReplayLog


def replay(
    model: str,
    log: str | Path,
    output_dir: str | Path,
    *,
    steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Take the steps of a log again and save the model.

    Args:
        model: base model: name, folder or Hub id.
        log: the file that the run left.
        output_dir: folder to write; it must not exist, or be empty.
        steps: of the run, all if None.
        console: told what happens.

    Returns:
        Plain values: steps taken, the strategy, where the model is, the hash of its weights.

    Raises:
        UserError: not a log, another base model, adapters, or a folder that holds something.
    """
    from lowmem.models.loading import load_model, nf4
    from lowmem.strategies import create
    from lowmem.training.zeroth.log import fingerprint

    told, folder = console or Console(), Path(output_dir)
    found = ReplayLog.load(Path(log))
    _check(found, folder, steps)
    found = found.cut(len(found.steps) if steps is None else steps)
    name, options = found.header["strategy"]["name"], found.header["strategy"]["options"]
    strategy, dtype = create(name, **options), found.header["dtype"]
    told.start("load")
    four_bit = found.header["origin"].get("quantize")
    quantized = {"quantization_config": nf4(dtype, double=False)} if four_bit else {}
    base, tokenizer = load_model(model, dtype, **quantized)
    optimizer = found.optimizer(base, strategy)
    told.finish()
    told.start("replay", len(found.steps))
    found.apply(optimizer, lambda done: told.advance(done, {}))
    told.finish()
    _save(base, tokenizer, folder)
    return {
        "model": model,
        "strategy": name,
        "steps": len(found.steps),
        "sha256": fingerprint(base),
        "output_dir": str(folder),
    }


def _check(log: ReplayLog, folder: Path, steps: int | None) -> None:
    """Refuse what cannot be done before a model is loaded."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something already; name a folder that does not exist")
    if steps is not None and not 0 <= steps <= len(log.steps):
        raise UserError(f"steps: the log has {len(log.steps)}, got {steps}; take as many or fewer")
    if not log.header["strategy"]["name"]:
        raise UserError(
            "the run's strategy was composed in Python and has no name; "
            "ReplayLog.load(...).optimizer(model, strategy) takes it"
        )
    if adapters := [name for name in log.header["parameters"] if name.startswith("base_model.")]:
        raise UserError(
            f"the run trained adapters ({adapters[0]}), whose first values are not in the base model; "
            "in Python, ReplayLog.load(...).optimizer(model, strategy) takes the model they began in"
        )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write beside and rename: the folder is there when all of it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(folder)
