"""Online Subspace Descent: GaLore whose basis follows every gradient."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "online_subspace",
        """Adam in a subspace that descends on what it misses of each gradient.

            R = P'G,  W <- (1 - lr wd) W - lr scale P Adam(R)
            P <- P - rate lr d/dP (|P P'A - A|^2 + penalty |P'P - I|^2),  A = G / |G|

        No factorization after the first step. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 4.
        """,
        paper="2408.12857",
        projector="online",
        rule="adam",
        scale=0.25,
    )
)
