"""SMMF: both moments factored over the most square matrix of a tensor's elements."""

from lowmem.strategies.method import Method, register

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
