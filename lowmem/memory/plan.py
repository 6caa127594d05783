"""What a fine-tuning run will take, before anything is downloaded or run.

    plan(model, strategy, ...) -> Plan      one model, one run, one or many strategies ("galore", a Strategy, a list, "all")
    Plan.to_dict()                          exactly the keys of `lowmem plan --json`
    Plan.report_data()                      the same, plus what the pictures need (see below)
    solve("seq_len" | "batch_size", ...)    the largest that fits a budget

How: the real model takes one real training step without weights (`trace`), which gives the live bytes at every named
event; the strategies' own code counts state and scratch (`count`); closed forms say the same a second time and any
disagreement is reported. All strategies share one trace: only the optimizer's rows differ.

Fields
    Plan    model: ModelInfo(name, parameters, trainable)   run: Run (every option of the trace)   budget: Budget | None
            plans: tuple[StrategyPlan], those that fit first, then by peak   warnings, assumptions: tuple[str]   command: str
            cross_check: difference in percent between the closed form's peak and the trace's, None where no form is known
    StrategyPlan    strategy, options, state_bytes, at_peak {row: bytes}, peak {allocated, reserved, device}, event,
            events {name: bytes}, certainty {row: word}, fits, verdict (fits | fits with retries | out of memory),
            headroom_bytes, why (sentences), levers (Lever(name, peak, event)), max_seq_len, max_batch_size
report_data() adds to the document "waterfall", "grid", "assumptions", "warnings", "command", "gpu" and to each plan
"timeline", "levers", "max_seq_len", "max_batch_size", "command", in the shapes that `report` names.
"""
