"""Plans, profiles and comparisons as one self-contained HTML page, and as plain tables for a terminal.

    report.build(data) -> Report            sections of tables and figures; `data` is a to_dict() / --json document
    report.html(data) -> str                one file: no network, light and dark, the JSON inside it
    report.write(data, path)                the same, written beside and then renamed

A document is recognised by its keys: "plans" (plan), "measured" (profile), "runs" (compare).
Besides the documented keys of `plan --json`, these are drawn when present and left out when absent:

    document  "waterfall": [{"lever": "plain AdamW", "peak": bytes, "event": name}, ...]    baseline first, each row adds one lever
              "grid":      {"strategy", "seq_lens": [int], "batch_sizes": [int], "peak": [[bytes per batch] per seq_len]}
                           (one such object, or a list of them: one small multiple per strategy)
              "assumptions": [sentence]   "warnings": [sentence]   "command": str   "gpu": {"name", ...}
    plan      "timeline":  {"bytes": {category: [bytes]}, "phases": [{"name", "start", "stop"}], "events": [{"name", "at"}]}
                           (equally long lists, one entry per sampled instant of one step; start, stop and at are indices)
              "max_seq_len", "max_batch_size": int    "levers": [{"lever", "saves"}]    "command": str
              "peak" may hold "reserved" and "device" as null where they were not estimated
"""

from __future__ import annotations
