"""APOLLO: the gradient itself, scaled by what a sketch of it tells."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "apollo",
        """The gradient with channels scaled by Adam's statistics of a random sketch.

            R = P'G with P drawn from a normal distribution,  N = Adam(R),  phi_j = |N_j| / |R_j|
            W <- (1 - lr wd) W - lr residual_scale G phi,  growing by 1 % a step at most

        The sketch P is never held, and drawn again from its name in every step. Embeddings, head,
        norms and biases take Adam. rank=1, per=tensor and residual_scale=128 are APOLLO-Mini.

        Bytes for an (m, n) weight, l = max(m, n), fp32 states: 8 r l + 8.
        """,
        paper="2412.05270",
        projector="gaussian",
        rule="adam",
        residual="scaled_gradient",
    )
)
