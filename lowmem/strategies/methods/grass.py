"""GrassWalk and GrassJump: random subspaces, with moments that follow and the rest scaled back in."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "grass_walk",
        """Adam in a subspace that walks at random, and the rest scaled channel by channel.

            X ~ N(0, 1),  X - P P'X = U S V',  P <- P V cos(a S) V' + U sin(a S) V',  a S_1 = angle
            R = P'G,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr (scale P N + phi (G - P R)),  growing by 1 % a step at most

        The first subspace is the leading one. The paper does not print its step; ours is an angle.
        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 8.
        """,
        paper="2510.01878",
        projector="walk",
        rule="adam",
        residual="scaled_rest",
        on_refresh="rotate",
        scale=0.25,
    )
)

register(
    Method(
        "grass_jump",
        """Adam in random subspaces that are never held, and the rest scaled channel by channel.

            P = QR(X), X ~ N(0, 1) drawn from its name,  R = P'G,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr (scale P N + phi (G - P R)),  growing by 1 % a step at most

        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, l = max(m, n), fp32 states: 8 r l + 8.
        """,
        paper="2510.01878",
        projector="jump",
        rule="adam",
        residual="scaled_rest",
        on_refresh="rotate",
        scale=0.25,
    )
)
