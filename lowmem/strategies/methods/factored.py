"""Factored moments: rows and columns in the place of elements."""

from lowmem.strategies.method import Advice, Method, register

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
        recommended=(
            Advice("fine-tuning", "T5, as transformers documents it; a constant lr", {"lr": 0.001}),
        ),
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
        recommended=(Advice("pre-training", "authors, transformers", {"decay_rate": -0.8}),),
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
        recommended=(
            Advice(
                "pre-training",
                "authors, Llama; lr 0.5 to 0.9 of AdamW's",
                {"betas": (0.9, 0.95), "beta3": 0.995},
            ),
        ),
        rule="came",
    )
)

register(
    Method(
        "subset_norm",
        """Adam with one second moment for each row or column: the norm of what shares it.

            M <- beta1 M + (1 - beta1) G,  v_i <- beta2 v_i + (1 - beta2) |G_i|^2
            W <- (1 - lr wd) W - lr M_i / (1 - beta1^t) / (sqrt(v_i / (1 - beta2^t)) + eps)

        i counts the rows of a tall matrix and the columns of a wide one, or `subset_size` elements at a
        time; vectors have Adam. Norms are sums, so that steps are shorter than Adam's: take about ten
        times its lr (the paper has 0.05 where Adam has 0.005). Embeddings take Adam, as published;
        embedding=subset_norm saves their second moment too.

        Bytes for an (m, n) weight, fp32 states: 4 m n + 4 max(m, n) + 4.
        """,
        paper="2411.07120",
        recommended=(
            Advice(
                "pre-training",
                "authors, 60M; ten times Adam's lr, because sums divide",
                {"lr": 0.05, "eps": 1e-06},
            ),
        ),
        rule="subset_norm",
        embedding="adam",
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

register(
    Method(
        "adam_mini",
        """Adam with one second moment for each row, or head.

            W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps),  v averages the mean of G^2 over a block

        A block is a head of query and key weights, which the model tells, a row of other matrices, and all
        of a norm or bias. Take AdamW's lr and betas. A fused query-key-value weight goes row by row.

        Bytes for an (m, n) weight: 4 m n + 4 m + 4 with fp32 states; m n + 4 ceil(m n / 256) + 4 m + 4
        with int8.
        """,
        paper="2406.16793",
        rule="adam_mini",
    )
)

register(
    Method(
        "mlorc",
        """Adam with both moments held as products of two thin matrices: the momentum is compressed.

            M = beta1 M~ + (1 - beta1) G,  V = beta2 V~ + (1 - beta2) G^2,  held as P R of rank r
            W <- (1 - lr wd) W - lr M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)

        The gradient is not projected: a step sees all of it and has full rank. Negative entries of V~
        become the mean of their magnitudes. Where the released code draws a sketch at every step, power
        iterations go on from what is held; and vectors, which it leaves as they are, take Adam, which a
        rank of one is for them. Take Adam's lr.

        Bytes for an (m, n) weight: 8 r (m + n) + 4.
        """,
        paper="2506.01897",
        recommended=(
            Advice("fine-tuning", "authors' scripts", {"lr": 0.0001, "rank": 4, "weight_decay": 0.01}),
        ),
        rule="mlorc",
    )
)
