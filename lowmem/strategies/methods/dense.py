"""Element by element: rules on whole weights, where every moment is as large as its weight."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "sgd",
        """Gradient descent without state.

            W <- (1 - lr wd) W - lr G

        Bytes for an (m, n) weight: 0.
        """,
        paper="1606.04838",
        rule="sgd",
    )
)

register(
    Method(
        "signsgd",
        """The sign of the gradient, without state.

            W <- (1 - lr wd) W - lr sign(G)

        Bytes for an (m, n) weight: 0.
        """,
        paper="1802.04434",
        rule="signsgd",
    )
)

register(
    Method(
        "lion",
        """The sign of gradient and momentum mixed.

            W <- (1 - lr wd) W - lr sign(beta1 M + (1 - beta1) G),  M <- beta2 M + (1 - beta2) G

        Take lr 3 to 10 times smaller than AdamW's, weight decay as much larger, betas (0.9, 0.99).

        Bytes for an (m, n) weight: 4 m n with fp32 states, m n + 4 ceil(m n / 256) with int8.
        """,
        paper="2302.06675",
        rule="lion",
    )
)

register(
    Method(
        "adamw_4bit",
        """AdamW with moments of 4 bits.

        The arithmetic is AdamW's, in fp32. The first moment has a signed map, the second a map without
        zero, both a scale for each 128 elements. Tensors below 4096 elements keep fp32 moments.

        Bytes for an (m, n) weight, d = m n: 2 ceil(d / 2) + 8 ceil(d / 128) + 4.
        """,
        paper="2309.01507",
        rule="adam",
        states="int4",
    )
)

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
        rule="ademamix",
    )
)

register(
    Method(
        "ano",
        """The direction of the momentum, the size of the gradient.

            W <- (1 - lr wd) W - lr |G| sign(M) / (sqrt(v_hat) + eps)

        The paper takes betas (0.92, 0.99).

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states.
        """,
        paper="2508.18258",
        rule="ano",
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
