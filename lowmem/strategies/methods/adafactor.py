"""Adafactor: second moments from row and column means."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "adafactor",
        """Second moments from row and column means, no first moment.

            V = r c' / mean(r),  U = G / sqrt(V) clipped to rms 1
            W <- (1 - alpha wd) W - alpha U,   alpha = lr

        The defaults are those of `optim="adafactor"` in transformers: lr is the step.
        With `scale_parameter` steps are in units of the weight's rms, with
        `relative_step` they shrink as 1 / sqrt(t) once that is below lr. What
        transformers calls relative_step=True, lr=None is lr=0.01 here, and its
        warmup_init=True is warmup=10000. Matrices are the first dimension by the rest.
        `states` is the precision of what is held in full: the average of steps, and
        second moments of vectors.

        Bytes for an (m, n) weight: 4 (m + n) + 4, and the momentum's with beta1 (4 m n in
        fp32); for a vector of d elements 4 d + 4 in fp32. betas and eps are not used.
        """,
        paper="1804.04235",
        rule="adafactor",
    )
)
