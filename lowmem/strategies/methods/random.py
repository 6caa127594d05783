"""Random subspaces: drawn from a name instead of held, or walking."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "apollo",
        """The gradient with channels scaled by Adam's statistics of a random sketch.

            R = P'G with P drawn from a normal distribution,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr residual_scale G phi,  growing by 1 % a step at most

        The sketch P is never held, and drawn again from its name in every step. Embeddings, head,
        norms and biases take Adam. See `apollo_mini` for one factor in all.

        Bytes for an (m, n) weight, l = max(m, n), fp32 states: 8 r l + 8.
        """,
        paper="2412.05270",
        recommended=(Advice("pre-training", "paper, C4", {"lr": 0.01, "update_proj_gap": 200}),),
        projector="gaussian",
        rule="adam",
        residual="scaled_gradient",
    )
)

register(
    Method(
        "apollo_mini",
        """The gradient with one factor for all of it, from Adam's statistics of a single random row.

            R = p'G with p drawn from a normal distribution,  N = Adam(R),  phi = |N| / |R|
            W <- (1 - lr wd) W - lr residual_scale phi G,  growing by 1 % a step at most

        The paper's scale is 128 under a root, hence 11.3137 here. The row p is never held. Embeddings,
        head, norms and biases take Adam.

        Bytes for an (m, n) weight, l = max(m, n), fp32 states: 8 l + 8.
        """,
        paper="2412.05270",
        recommended=(Advice("pre-training", "paper, C4", {"lr": 0.02, "update_proj_gap": 200}),),
        projector="gaussian",
        rule="adam",
        residual="scaled_gradient",
        rank=1,
        per="tensor",
        residual_scale=11.3137,
    )
)

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
