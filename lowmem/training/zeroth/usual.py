"""Rates and lengths of runs without gradients, where the user names none.

A slope c belongs to one direction with an element for each of d weights, so that a step is as long as
lr |c| sqrt(d): what a model takes falls with its size. What the papers take for models of 0.4 to 66 billion
weights (1e-5 to 1e-7, arXiv 2305.17333), and what 135 million take, lies about

    lr = 4000 / d                 along slopes
    lr = 5 / sqrt(d)              where the slope's size is divided out, so that lr itself is a length
    lr = 280 / d^(2/3)            the same for the mean over several directions (fzoo)
    lr = 1e-4                     for adapters, whatever their size
    lr = 0.54 / d^(1/4)           for scales of 4-bit weights, which are stepped in proportion to themselves

two of them from what 135 million weights take and what the papers take: fzoo 1e-3 (0.4 of it learned a third
as fast) and 5e-5 for 13 billion (arXiv 2506.09034); qzo 5e-3 (1e-2 learned somewhat faster and well for 600
steps, 2e-3 a fifth as fast) and 2e-3 for seven, in these units (arXiv 2505.13430). Never more than 1e-4,
1e-3 and 1e-2: models of a million weights take no rate a thousand times that of a billion.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lowmem.config import RunConfig
from lowmem.optim.strategy import Strategy
from lowmem.training.arguments import build_strategy

FIRST_ORDER = ADAPTERS = 1e-4
SLOPE = 4000.0
LENGTH, MEAN, SCALES = (5.0, 1 / 2, 1e-3), (280.0, 2 / 3, 1e-3), (0.54, 1 / 4, 1e-2)
"""Of rates that do not fall with the whole size: what over which power of it, and the most."""
PAPERS = (20_000, 16)
"""Steps, and rows of each, of most of what the papers report."""


def settled(config: RunConfig) -> RunConfig:
    """A run with a learning rate.

    Args:
        config: one of a strategy that exists.

    Raises:
        UserError: no such strategy, or no such model where its size is needed.
    """
    return config if config.lr is not None else dataclasses.replace(config, lr=usual_rate(config))


def usual_rate(config: RunConfig) -> float:
    """The learning rate to start from, to two digits."""
    strategy = build_strategy(config.optim, config.optim_args or None)
    if strategy.source.needs_autograd:
        return FIRST_ORDER
    if config.adapts:
        return ADAPTERS
    from lowmem.models.entries import parameter_count, resolve, skeleton

    entry = resolve(config.model)
    weights = entry.parameters or parameter_count(skeleton(entry))
    if (scales := strategy.source.quantized) or steps_a_length(strategy):
        averaged = strategy.options["source"] == "spread_spsa"
        unit, power, most = SCALES if scales else MEAN if averaged else LENGTH
        return float(f"{min(unit / weights**power, most):.1e}")
    return float(f"{min(SLOPE / weights, ADAPTERS):.1e}")


def steps_a_length(strategy: Strategy) -> bool:
    """Whether lr is the size of a step of one weight, whatever the slope."""
    chosen = strategy.options
    return chosen["rule"] not in ("sgd", "momentum") or chosen["source"] in ("spread_spsa", "momentum_spsa")


def expected(args: Any, steps: int | None) -> str:
    """One line about how long such runs are, to be said when one begins.

    Args:
        args: the trainer's; steps: that it will take, where that is known.
    """
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"{args.optim} learns from values of the loss: expect ten to a hundred times the steps of a run with "
        f"gradients (the papers take {PAPERS[0]:,} of {PAPERS[1]} rows); this one takes "
        f"{'steps' if steps is None else f'{steps:,}'} of {rows}, lr {args.learning_rate:g}"
    )
