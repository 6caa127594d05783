"""SubTrack++: a subspace that is tracked, not found anew."""

from lowmem.strategies.method import Method, register

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
