"""Plans, profiles and comparisons as one self-contained HTML page, and as plain tables for a terminal.

    report.build(data) -> Report            sections; `data` is a to_dict() or --json document
    report.html(data) -> str                one file: no network, light and dark, the JSON inside it
    report.write(data, path)                the same, written beside and then renamed

A document is recognised by its keys: "plans" (plan), "result" (a run), "measured" (profile), "runs"
(compare).
Besides the documented keys of `plan --json`, these are drawn when present and left out when absent:

    document  "waterfall": [{"lever": "plain AdamW", "peak": bytes, "event": name}, ...]
                           baseline first; each row adds one lever to those above
              "grid":      {"strategy", "options", "seq_lens": [int], "batch_sizes": [int], "peak": [[bytes]]}
                           one row per length; one such object, or a list, one per strategy
              "assumptions": [sentence]   "warnings": [sentence]   "command": str
    plan      "timeline":  {"bytes": {category: [bytes]}, "phases": [{"name", "start", "stop"}]}
                           lists of one length, an entry per sampled instant of a step; phases by index
              "max_seq_len", "max_batch_size": int   "levers": [{"lever", "saves" or "peak"}]   "command": str
              "peak" may hold "reserved" and "device" as null where they were not estimated
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import UserError
from lowmem.report import compare as compare_report
from lowmem.report import page
from lowmem.report import plan as plan_report
from lowmem.report import profile as profile_report
from lowmem.report import run as run_report
from lowmem.report.page import Report

__all__ = ["Report", "build", "html", "write"]


def build(data: Mapping[str, Any]) -> Report:
    """Sections, tables and figures of a document.

    Args:
        data: what `plan`, `profile` or `compare` print with --json.

    Raises:
        UserError: the document is none of the three.
    """
    makers = {
        "result": run_report.build,
        "plans": plan_report.build,
        "measured": profile_report.build,
        "runs": compare_report.build,
    }
    for key, maker in makers.items():
        if key in data:
            return maker(data)
    raise UserError(
        f"no plan, profile, comparison or run: a document with one of the keys {', '.join(makers)} is needed"
    )


def html(data: Mapping[str, Any]) -> str:
    """The page of a document.

    Example:
        >>> html({"plans": []})  # doctest: +SKIP
        '<!doctype html>...'
    """
    return page.html(build(data))


def write(data: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of `data` to `path` and return it; a reader never sees half of it.

    Raises:
        UserError: the folder does not exist or cannot be written to.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    text = html(data)
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(
            f"cannot write the report to {target}: {error.strerror}; name a folder that exists"
        ) from error
    return target
