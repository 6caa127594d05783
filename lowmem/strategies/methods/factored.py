"""Factored moments: rows and columns in the place of elements."""

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

register(
    Method(
        "smmf",
        """Adam with both moments as outer products, and one bit for each sign.

            M <- b1 M + (1 - b1) G,  V <- b2 V + (1 - b2) G^2,  held as signs and row and column sums
            W <- (1 - lr wd) W - lr M / (sqrt(V) + eps)
            b1 = beta1 growth_rate^(t - 1),  b2 = 1 - t^decay_rate

        Tensors of any rank, vectors included, are seen as the most square matrix (a, b) of their
        elements. With growth_rate below 1, as in the paper, the momentum fades in a long run.

        Bytes for an (m, n) weight, a b = m n: ceil(m n / 8) + 8 (a + b) + 4, 0.128 bytes per parameter.
        """,
        paper="2412.08894",
        rule="smmf",
    )
)

register(
    Method(
        "came",
        """Adafactor's step, averaged, and shorter where steps disagree with their average.

            U = G / sqrt(V) clipped to rms 1,  M <- beta1 M + (1 - beta1) U
            S <- beta3 S + (1 - beta3) (U - M)^2
            W <- (1 - lr wd) W - lr M / sqrt(S),  V and S from row and column means

        Without bias correction, as in the paper: the first step is about 10 lr long, so warm up.
        Take 0.5 to 0.9 times AdamW's lr. With beta2=0.95 take beta3 from 0.99 to 0.999.

        Bytes for an (m, n) weight: 4 m n + 8 (m + n) with fp32 states; m n + 4 ceil(m n / 256) + 8 (m + n)
        with int8.
        """,
        paper="2307.02047",
        rule="came",
    )
)

register(
    Method(
        "sm3",
        """Adagrad with a number for each row and column.

            N = min(R, C) + G^2,  R and C <- row and column maxima of N
            W <- (1 - lr wd) W - lr G / sqrt(N)

        N only grows: warm up, then keep lr as it is. The paper trains with an average of steps beside
        it, `momentum=0.9`, which costs a moment as large as the weight. betas and eps are not used.

        Bytes for an (m, n) weight: 4 (m + n), and the average's with momentum (4 m n in fp32).
        """,
        paper="1901.11150",
        rule="sm3",
    )
)
