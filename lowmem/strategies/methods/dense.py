"""Element by element: rules on whole weights, where every moment is as large as its weight."""

from lowmem.strategies.method import Advice, Method, register

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
        recommended=(
            Advice(
                "pre-training",
                "authors, language models; lr 3 to 10 times below AdamW's, the decay as many times above",
                {"betas": (0.95, 0.98)},
            ),
        ),
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
        "adamw_4bit_rank1",
        """AdamW with moments of 4 bits, the second under scales of rows and columns.

        The arithmetic is AdamW's, in fp32. The scale of an element of the second moment is the smaller of
        its row's and its column's largest, which follows loud tokens and channels; the first
        moment has a scale for each 128 elements, as in `adamw_4bit`. Norms and biases take Adam with
        fp32 moments.

        Bytes for an (m, n) weight, d = m n: 2 ceil(d / 2) + 4 ceil(d / 128) + 4 (m + n) + 4.
        """,
        paper="2309.01507",
        rule="adam_rank1",
        vector="adam",
        states="int4",
        vector_states="fp32",
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
        recommended=(Advice("pre-training", "authors' package", {"lr": 0.0001, "betas": (0.92, 0.99)}),),
        rule="ano",
    )
)
