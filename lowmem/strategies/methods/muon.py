"""Muon: momentum whose singular values are made equal."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "muon",
        """Momentum with equal singular values.

            M <- M + (1 - momentum)(G - M),  X = orthogonal factor of M by five steps of Newton and Schulz
            W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) X

        One moment instead of two. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight: 4 m n with fp32 states, m n + 4 ceil(m n / 256) with int8.
        """,
        paper="2502.16982",
        rule="muon",
        other="adam",
    )
)
