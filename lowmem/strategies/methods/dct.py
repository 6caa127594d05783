"""DCT-AdamW: moments for the cosines of which the gradient has most."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "dct",
        """Adam on chosen columns of one cosine basis.

            S = G C',  R = S[:, index] with the r largest columns,  W <- (1 - lr wd) W - lr Adam(R) C[index]

        C is the orthonormal DCT-II of the side, the same for all tensors that have it. A
        cosine that stays keeps its moments, a new one starts with age 0 (on_refresh=rotate).
        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 8 r l + 8 r; and 4 s^2
        once for each s.
        """,
        paper="2505.17967",
        projector="dct",
        rule="adam",
        on_refresh="rotate",
    )
)
