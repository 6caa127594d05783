"""Silence for the packages that a job goes through, and only for its time.

transformers, datasets and hub clients draw bars, log and warn about things that
the person running the job cannot change. A recipe reports through its `Console`
instead. Everything is put back afterwards, errors included.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

LOGGERS = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "httpx",
    "huggingface_hub",
    "peft",
    "torch.utils._pytree",
    "torchao",
    "transformers",
    "trl",
)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, warnings or logs below error from other packages meanwhile."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_levels())
        stack.enter_context(_bars())
        yield


@contextmanager
def _levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _bars() -> Iterator[None]:
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging as hf

    hub: Any = huggingface_hub.utils
    switches = [
        (hf.is_progress_bar_enabled, hf.disable_progress_bar, hf.enable_progress_bar),
        (datasets.is_progress_bar_enabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (lambda: not hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    ]
    was_on = [on for is_on, off, on in switches if is_on()]
    for _, off, _ in switches:
        off()
    try:
        yield
    finally:
        for on in was_on:
            on()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use this many CPU threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
