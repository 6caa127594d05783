"""Kin of Adam: another second moment, more memory, or another order of the two."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "adan",
        """Nesterov momentum from differences of gradients.

            W <- (1 - lr wd) W - lr (m_hat + beta_diff q_hat) / (sqrt(n_hat) + eps)

        q averages the change of gradients, n the squares of gradients that look ahead. The paper takes
        betas (0.98, 0.99).

        Bytes for an (m, n) weight: 16 m n + 4 with fp32 states.
        """,
        paper="2208.06677",
        recommended=(
            Advice(
                "pre-training",
                "authors' recipes; lr 5 to 10 times AdamW's",
                {"betas": (0.98, 0.99), "weight_decay": 0.02},
            ),
        ),
        rule="adan",
    )
)

register(
    Method(
        "ademamix",
        """Adam with a second, slow average.

            W <- (1 - lr wd) W - lr (m_hat + alpha m_slow) / (sqrt(v_hat) + eps)

        The slow average is held in bf16 at least. Its half-life must fit the run: for a few thousand
        steps take beta3=0.999, or slow_warmup as long as the run.

        Bytes for an (m, n) weight: 12 m n + 4 with fp32 states.
        """,
        paper="2409.03137",
        recommended=(
            Advice("pre-training", "authors' example; slow_warmup as long as the run", {"alpha": 8.0}),
        ),
        rule="ademamix",
    )
)

register(
    Method(
        "amsgrad",
        """Adam over the largest second moment so far.

            W <- (1 - lr wd) W - lr m_hat / (sqrt(max_hat) + eps)

        Bytes for an (m, n) weight: 12 m n + 4 with fp32 states; the maximum is always fp32.
        """,
        paper="1904.09237",
        rule="amsgrad",
    )
)

register(
    Method(
        "adabelief",
        """Adam over how far gradients lie from their average.

            W <- (1 - lr wd) W - lr m_hat / (sqrt(s_hat) + eps),  s averages (G - M)^2

        eps plays the part of Adam's squared: take 1e-16.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2010.07468",
        recommended=(
            Advice("pre-training", "authors, transformers", {"eps": 1e-16, "rectify": True}),
            Advice(
                "fine-tuning",
                "measured here, SmolLM2-135M on the demo data: 0.9 % above AdamW's loss, 11 % with eps 1e-8",
                {"lr": 1e-4, "eps": 1e-16},
            ),
        ),
        rule="adabelief",
    )
)

register(
    Method(
        "nadam",
        """Adam that looks ahead along its momentum, as torch does.

            W <- (1 - lr wd) W - lr (a G + b M) / (sqrt(v_hat) + eps)

        a and b follow the schedule of Dozat (2016), which section 4.8 of the cited overview describes.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="1609.04747",
        rule="nadam",
    )
)

register(
    Method(
        "laprop",
        """An average of normalised gradients.

            W <- (1 - lr wd) W - lr m_hat,  m averages G / (sqrt(v_hat) + eps)

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2002.04839",
        recommended=(Advice("pre-training", "authors' code", {"lr": 0.0004, "eps": 1e-15}),),
        rule="laprop",
    )
)

register(
    Method(
        "diffgrad",
        """Adam slowed down where the gradient hardly changes.

            W <- (1 - lr wd) W - lr x m_hat / (sqrt(v) + eps),  x = 1 / (1 + exp(-|G_before - G|))

        With the small gradients of language models x is near a half.

        Bytes for an (m, n) weight: 12 m n + 4 with fp32 states.
        """,
        paper="1909.11015",
        rule="diffgrad",
    )
)

register(
    Method(
        "innaprop",
        """A heavy ball whose friction looks at the gradient's change, over RMSprop.

            W <- (1 - lr wd) W - lr (P / beta + beta u),  u = G / (sqrt(v_hat) + eps)
            P <- (1 - alpha lr) P + (1 - alpha beta) beta lr u

        P is the distance to the paper's second point, which starts at 0. Its authors take alpha and
        beta 0.1 and 0.9, or 2 and 2 with beta2 0.99 for language models; lr is AdamW's.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2410.05871",
        recommended=(
            Advice(
                "pre-training",
                "authors, GPT-2 of 125M",
                {"lr": 0.0006, "betas": (0.9, 0.99), "weight_decay": 0.1, "alpha": 2.0, "beta": 2.0},
            ),
            Advice("fine-tuning", "authors, GPT-2 with LoRA", {"alpha": 0.1, "beta": 0.9}),
        ),
        rule="innaprop",
    )
)

register(
    Method(
        "schedule_free",
        """Adam that averages its iterates instead of letting lr fall.

            u = s_t G / (sqrt(v_hat) + eps),  s_t = min(1, t / warmup),  c_t = s_t^2 / (s_1^2 + ... + s_t^2)
            W <- (1 - lr wd) W - lr ((1 - beta1 (1 - c_t)) u + c_t Q),  Q <- (1 - c_t)(Q + beta1 u)

        Take a constant lr, 1 to 10 times AdamW's, and some warmup. W is where gradients are taken; the
        average of the paper is W + (1 / beta1 - 1) lr Q: the Trainer evaluates and saves that, in a loop
        of your own `lowmem.optim.evaluated` does.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2405.15682",
        recommended=(
            Advice(
                "pre-training",
                "authors' code; a constant lr, 1 to 10 times AdamW's, and some warmup",
                {"lr": 0.0025},
            ),
        ),
        rule="schedule_free",
    )
)

register(
    Method(
        "mars",
        """Adam of gradients with less variance.

            C = G + gamma beta1 / (1 - beta1) (G - G_before),  C <- C / max(1, |C|)
            W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps),  of C

        Norms and biases take Adam. The paper takes betas (0.95, 0.99) and from scratch an lr ten times
        AdamW's. The gradient before is held in bf16 at least.

        Bytes for an (m, n) weight: 12 m n + 4 with fp32 states.
        """,
        paper="2411.10438",
        recommended=(
            Advice(
                "pre-training",
                "authors, GPT-2 of 125M; 3e-3 at 355M, 2e-3 from 770M",
                {"lr": 0.006, "betas": (0.95, 0.99), "weight_decay": 0.01},
            ),
        ),
        rule="mars",
        vector="adam",
    )
)

register(
    Method(
        "fadam",
        """Adam as natural gradient descent: an average of clipped natural gradients.

            U = G / (sqrt(f) + min(eps, 0.01 rms(G))),  U <- U / max(1, rms(U) / clip)
            M <- M + (1 - beta1)(U - M),  W <- (1 - lr wd) W - lr M

        f is the second moment without bias. Decay is decoupled: the paper's goes through the same root
        and clip.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2405.12807",
        rule="fadam",
    )
)

register(
    Method(
        "adam_cm",
        """Adam that remembers the momenta of its largest gradients.

            c = (m + mean of the kept momenta) / (1 - beta1^t),  v averages c^2
            W <- (1 - lr wd) W - lr c / (sqrt(v_hat) + eps)

        Five momenta are kept, by the norm of their gradient, which fades by `decay` at each step. What is
        squared is corrected: published code leaps in its first steps.

        Bytes for an (m, n) weight: 28 m n + 24 with fp32 states, 7 (m n + 4 ceil(m n / 256)) + 24 with int8.
        """,
        paper="2307.09638",
        rule="adam_cm",
    )
)

register(
    Method(
        "lamb",
        """Adam in steps as long as the weight, times lr.

            U = m_hat / (sqrt(v_hat) + eps),  W <- (1 - lr wd) W - lr U |W| / |U|

        Norms and biases take Adam's own steps, and so does a weight of zeros once. The decay is decoupled:
        it is not part of U. The paper takes eps 1e-6.

        Bytes for an (m, n) weight: 8 m n + 20 with fp32 states.
        """,
        paper="1904.00962",
        recommended=(
            Advice("pre-training", "paper, BERT", {"lr": 0.001, "eps": 1e-06, "weight_decay": 0.01}),
        ),
        rule="adam",
        modifiers="trust_ratio",
        vector_modifiers="none",
    )
)

register(
    Method(
        "adamp",
        """Adam that spends no step on the length of a weight that is normalised afterwards.

            U = m_hat / (sqrt(v_hat) + eps)
            where |cos(G, w)| < delta / sqrt(n) for all rows w:  U <- U - w <U, w> / |w|^2,  wd <- wd_ratio wd
            W <- (1 - lr wd) W - lr U

        Where it does not hold for rows, the matrix is asked as one row. Norms and biases take Adam. Language
        models have few weights whose length is free: there it is Adam. It cannot step inside a projection.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2006.08217",
        recommended=(Advice("pre-training", "authors' readme", {"weight_decay": 0.01}),),
        rule="adamp",
        vector="adam",
    )
)
