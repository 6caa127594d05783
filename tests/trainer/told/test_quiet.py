"""Third parties are silent inside, and as they were outside, errors included."""

import logging
import warnings

import datasets
import huggingface_hub.utils as hub
import pytest
import transformers
from transformers.utils import logging as hf

from lowmem.models.quiet import LOGGERS, quiet


def switches():
    return (
        hf.is_progress_bar_enabled(),
        datasets.is_progress_bar_enabled(),
        hub.are_progress_bars_disabled(),
        [logging.getLogger(name).level for name in LOGGERS],
        list(warnings.filters),
    )


@pytest.fixture
def loud():
    """All bars on, as in a fresh process; put back after the test."""
    was = (hf.is_progress_bar_enabled(), datasets.is_progress_bar_enabled(), hub.are_progress_bars_disabled())
    hf.enable_progress_bar()
    yield
    if not was[0]:
        hf.disable_progress_bar()


def test_everything_is_put_back_after_an_error(loud):
    before = switches()

    def fails():
        with quiet():
            assert not hf.is_progress_bar_enabled()
            assert not datasets.is_progress_bar_enabled()
            assert hub.are_progress_bars_disabled()
            warnings.warn("not shown", FutureWarning, stacklevel=1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert switches() == before


def test_errors_of_third_parties_are_still_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with quiet():
        transformers.logging.get_logger("transformers.x").warning("chatter")
        transformers.logging.get_logger("transformers.x").error("trouble")
    assert {record.message for record in caplog.records} == {"trouble"}
