"""Other subspaces: a fixed basis, one learned online, and coordinates."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "dct",
        """Adam on chosen columns of one cosine basis.

            S = G C',  R = S[:, index] with the r largest columns,  W <- (1 - lr wd) W - lr Adam(R) C[index]

        C is the orthonormal DCT-II of the side, the same for all tensors that have it. A
        cosine that stays keeps its moments, a new one starts with age 0 (on_refresh=rotate). With
        residual=feedback,error_states=int4 what is not seen is owed to the next gradient.
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

register(
    Method(
        "online_subspace",
        """Adam in a subspace that descends on what it misses of each gradient.

            R = P'G,  W <- (1 - lr wd) W - lr scale P Adam(R)
            P <- P - rate lr d/dP (|P P'A - A|^2 + penalty |P'P - I|^2),  A = G / |G|

        No factorization after the first step. The paper finds 8-bit Adam for P a little better than
        descent: basis_rule=adam,basis_states=int8. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 4; with
        basis_rule=adam 8 s r + 4 more.
        """,
        paper="2408.12857",
        recommended=(
            Advice("pre-training", "authors, 60M; 1e-3 from 350M", {"lr": 0.01, "rank": 128, "scale": 0.25}),
        ),
        projector="online",
        rule="adam",
        scale=0.25,
    )
)

register(
    Method(
        "frugal",
        """Adam on a share of the gradient that changes over time, signSGD on the rest.

            R = down(G),  N = Adam(R)
            W <- (1 - lr wd) W - lr (up(N) + residual_scale sign(G - up(R)))

        The share is one of the columns, of single elements (projector=randk), of the singular
        directions (projector=svd), or of whole matrices (projector=none,schedule=blocks). It changes
        every `update_proj_gap` steps, and the moments start afresh. Updates stay full rank. A rank that
        takes in everything is AdamW within a window; projector=none,schedule=blocks,density=0 sees nothing,
        is signSGD, and holds nothing. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, fp32 states: columns, k = floor(rank n): 8 m k + 4 k + 4;
        randk, g = ceil(m n / 256) groups of k = round(256 rank): 9 g k + 4;
        svd, r = round(rank s): 4 s r + 8 r l + 4; blocks: 8 m n + 4 while active, else 0.
        """,
        paper="2411.07837",
        recommended=(
            Advice(
                "pre-training",
                "authors' scripts; 5e-4 at 7B",
                {"lr": 0.001, "rank": 0.25, "update_proj_gap": 200},
            ),
            Advice(
                "fine-tuning",
                "authors' scripts, GLUE; up to 5e-4",
                {"lr": 5e-05, "weight_decay": 0.1, "residual_scale": 0.1, "update_proj_gap": 500},
            ),
        ),
        projector="columns",
        rule="adam",
        residual="sign",
        rank=0.25,
        on_refresh="reset",
    )
)
