"""Measured memory in the plan's own words: the same rows, so that the two subtract.

One step of a run (the third by default: optimizer state exists by then) happens under the storage
tracker of `lowmem.memory.trace`. Every live byte belongs to one category, and the peak is one instant:
its categories sum to it. Every other step costs nothing but a host-side reading at its end: no hook, no
dispatch mode and no device synchronisation is left behind.

Three ways to the same numbers:

    profile(step, model, optimizer)        run a few steps of a closure and return the `Profile`
    with profiler.step(): ...              one step of a hand-written loop
    trainer.add_callback(profiler.callback())      any Hugging Face Trainer; read `profiler.result()` after it

`Profile.to_dict()` is `{"kind": "profile", "model", "run", "budget_bytes", "predicted": PLAN | None,
"measured": PLAN, "error_percent": {row: float | None}, "steps": [...], "timeline": {...}, "modules": [...],
"allocator": {...}, "command"}`, where PLAN has the keys of one entry of `plan --json`'s "plans": strategy,
options, state_bytes, at_peak, peak, event, events, certainty, fits, headroom_bytes, why.

On a CPU there is no caching allocator: tracked bytes are the truth, resident memory is shown beside them as
a sanity check. On CUDA the allocator's own peak stands beside the tracked one, and the difference, what
kernels allocate without the dispatcher seeing it, is named `unattributed`.
"""

from __future__ import annotations
