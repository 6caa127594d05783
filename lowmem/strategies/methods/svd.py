"""Leading subspaces: moments where the gradient's singular vectors see it, and what is done with the rest."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "galore",
        """Adam in the leading subspace of the gradient.

            R = P'G,  N = Adam(R),  W <- (1 - lr wd) W - lr scale P N

        P spans the leading r directions of the gradient, found anew every
        `update_proj_gap` steps (staggered over the parameters). Embeddings, head,
        norms and biases take the same rule plain.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states:
        4 s r (basis) + 8 r l (moments) + 4; with rule=adafactor 4 s r + 4 (r + l) + 4.
        """,
        paper="2403.03507",
        projector="power",
        rule="adam",
        rank=128,
        scale=0.25,
    )
)

register(
    Method(
        "golore",
        """Adam in the leading subspace of the gradient, later in random ones.

            R = P'G,  N = Adam(R),  W <- (1 - lr wd) W - lr scale P N,  M <- P_new'P_old M at a refresh

        Near a minimum the leading directions are those of the noise; random ones miss none. Set `after`
        to the step from which they are wanted: the paper takes 80 % of the run. The second moment is
        transported as a variance where the paper leaves it in coordinates that are gone. The released
        code uses a projected momentum for one step only. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 4.
        """,
        paper="2410.11289",
        projector="switch",
        rule="adam",
        on_refresh="rotate",
        scale=0.25,
    )
)

register(
    Method(
        "q_galore",
        """8-bit Adam in the leading subspace of the gradient, with a basis of 4 bits that is replaced lazily.

            R = P'G,  N = Adam(R),  W <- (1 - lr wd) W - lr scale P N
            |P_old'P_new|^2 / r at least `threshold` on average of 5: the time to the next P doubles

        Weights stay as they are: the paper's 8-bit weights are not part of it. The released code takes the
        cosine of two singular vectors, whose sign is open, holds a byte for each 4-bit code, and loses the
        range of numbers of one sign. Embeddings, head, norms and biases take 8-bit Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), 8-bit states, blocks of 256:
        s r / 2 + 8 s r / 256 + 28 (basis) + 2 (r l + 4 r l / 256) + 4.
        """,
        paper="2407.08296",
        projector="lazy",
        rule="adam",
        states="int8",
        scale=0.25,
    )
)

register(
    Method(
        "fira",
        """Adam in the leading subspace, and the rest scaled channel by channel.

            R = P'G,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr (scale P N + phi (G - P R)),  growing by 1 % a step at most

        Updates are of full rank at the memory of a projection. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 8.
        """,
        paper="2410.01623",
        projector="power",
        rule="adam",
        residual="scaled_rest",
        scale=0.25,
    )
)

register(
    Method(
        "subtrack",
        """Adam in a subspace that turns towards what it misses, and the rest scaled channel by channel.

            (sigma, u, v) the leading triple of 2 (A - P P'A)(P'A)',  A = G / |G|
            P <- P + (P v (cos(rate sigma) - 1) + u sin(rate sigma)) v'  every update_proj_gap steps
            R = P'G,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr (scale P N + phi (G - P R)),  growing by 1 % a step at most

        Moments follow the basis. In the released code bases on the right never move, moments follow
        one step early from the first basis of all, and scale P R is subtracted from G where P R is seen.
        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 8.
        """,
        paper="2502.01586",
        projector="track",
        rule="adam",
        residual="scaled_rest",
        on_refresh="rotate",
        scale=0.25,
    )
)
