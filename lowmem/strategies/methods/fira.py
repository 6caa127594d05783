"""Fira: GaLore with a step for what it does not see."""

from lowmem.strategies.method import Method, register

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
