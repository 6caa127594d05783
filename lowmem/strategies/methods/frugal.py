"""FRUGAL: moments for a share of the gradient that changes over time."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "frugal",
        """Adam on a share of the gradient that changes over time, signSGD on the rest.

            R = down(G),  N = Adam(R)
            W <- (1 - lr wd) W - lr (up(N) + residual_scale sign(G - up(R)))

        The share is one of the columns, of single elements (projector=randk), of the singular
        directions (projector=svd), or of whole matrices (projector=none,schedule=blocks). It changes
        every `update_proj_gap` steps, and the moments start afresh. Updates stay full rank. A rank that
        takes in everything is AdamW within a window. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, fp32 states: columns, k = floor(rank n): 8 m k + 4 k + 4;
        randk, g = ceil(m n / 256) groups of k = round(256 rank): 9 g k + 4;
        svd, r = round(rank s): 4 s r + 8 r l + 4; blocks: 8 m n + 4 while active, else 0.
        """,
        paper="2411.07837",
        projector="columns",
        rule="adam",
        residual="sign",
        rank=0.25,
        on_refresh="reset",
    )
)
