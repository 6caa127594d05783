"""`lowmem check METHOD`: what every strategy promises, asked of one; for those that you write yourself."""

from __future__ import annotations

from typing import Annotated

import typer

from lowmem.errors import UserError

from .. import render
from ..app import Json, Plugins


def command(
    method: Annotated[str, typer.Argument(help="Strategy: a name, or module:factory of your own.")],
    optim_args: Annotated[
        str, typer.Option("--optim-args", metavar="K=V,...", help="Options of the strategy.")
    ] = "",
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Hold a strategy against the contract on a small model: bytes, bad gradients, resume, release."""
    import torch

    from lowmem.outside import bring
    from lowmem.strategies import create
    from lowmem.strategies.registry import parse_options
    from lowmem.training.contract.check import check, small

    bring(plugin or ())
    strategy = create(method, **small(method, parse_options(method, optim_args)))
    found = [finding for dtype in (torch.float32, torch.bfloat16) for finding in check(strategy, dtype)]
    document = {
        "strategy": strategy.name,
        "options": dict(strategy.options),
        "kept": not any(finding.problem for finding in found),
        "findings": [vars(finding) for finding in found],
    }
    rows = [(finding.promise, finding.dtype, finding.problem or "kept") for finding in found]
    render.emit(document, [render.table(str(strategy), ["promise", "weights", ""], rows)], as_json)
    if broken := sorted({finding.promise for finding in found if finding.problem}):
        raise UserError(f"{method} does not keep what every strategy promises: {', '.join(broken)}")
