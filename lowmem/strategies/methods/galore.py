"""GaLore: moments where the gradient's leading subspace is seen."""

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
