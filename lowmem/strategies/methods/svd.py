"""Leading subspaces: moments where the gradient's singular vectors see it, and what is done with the rest."""

from lowmem.strategies.method import Advice, Method, register

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
        recommended=(
            Advice(
                "pre-training",
                "paper, C4 from 60M to 1B; 5e-3 at 7B",
                {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "scale": 0.25},
            ),
            Advice(
                "fine-tuning",
                "authors' scripts, GLUE",
                {"lr": 3e-05, "rank": 4, "update_proj_gap": 500, "scale": 4.0},
            ),
            Advice(
                "fine-tuning",
                "measured here, SmolLM2-135M on the demo data: 100 MiB of state where fp32 takes 467",
                {"lr": 5e-04, "states": "int8", "embedding": "adafactor"},
            ),
        ),
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
        recommended=(
            Advice(
                "fine-tuning",
                "authors' scripts, GLUE",
                {"lr": 3e-05, "rank": 4, "update_proj_gap": 500, "scale": 4.0},
            ),
        ),
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
            q = |P_old'P_new|^2 / r,  (q - r / s) / (1 - r / s) >= `threshold` on average of 5 (r < s):
            the time to the next P doubles

        The paper's 8-bit weights are an option of the run, of every method: `weights: int8`. The released
        code takes for q, which is r / s of unrelated subspaces, the cosine of two singular vectors, whose
        sign is open; it holds a byte for each 4-bit code, and loses the range of numbers of one sign.
        Embeddings, head, norms and biases take 8-bit Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), 8-bit states, blocks of 256:
        s r / 2 + 8 s r / 256 + 28 (basis) + 2 (r l + 4 r l / 256) + 4.
        """,
        paper="2407.08296",
        recommended=(
            Advice(
                "pre-training",
                "authors' scripts, 60M to 350M; 0.01 at 1B, 4e-3 at 7B",
                {"lr": 0.015, "update_proj_gap": 200, "scale": 0.25},
            ),
            Advice(
                "fine-tuning",
                "measured here, SmolLM2-135M on the demo data: 58 MiB of state",
                {"lr": 5e-04, "embedding": "adafactor"},
            ),
        ),
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
        recommended=(
            Advice("pre-training", "authors' scripts", {"lr": 0.01, "eps": 1e-06, "scale": 0.25}),
            Advice("fine-tuning", "authors' scripts, commonsense tasks", {"lr": 0.0001, "rank": 32}),
        ),
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
        recommended=(
            Advice(
                "pre-training",
                "authors' scripts, 60M to 350M; 1e-4 from 1B",
                {"lr": 0.001, "eps": 1e-06, "scale": 0.25, "update_proj_gap": 200},
            ),
            Advice(
                "fine-tuning",
                "authors' scripts, GLUE",
                {"lr": 1e-05, "eps": 1e-06, "scale": 4.0, "update_proj_gap": 500},
            ),
        ),
        projector="track",
        rule="adam",
        residual="scaled_rest",
        on_refresh="rotate",
        scale=0.25,
    )
)

register(
    Method(
        "subspace_momentum",
        """A momentum in the leading subspace, the gradient itself beside it, over norms of rows or columns.

            M <- beta1 M + (1 - beta1) P'G,  v_i <- beta2 v_i + (1 - beta2) |G_i|^2
            W <- (1 - lr wd) W - lr (P M + G - P P'G)_i / (1 - beta1^t) / (sqrt(v_i / (1 - beta2^t)) + eps)

        i counts the rows of a tall matrix and the columns of a wide one (see `subset_norm`), with another
        proj_type the channels of the projection: what P spreads an element over. The momentum starts afresh
        with each subspace; in the released code a refresh uses the old one once more and then forgets the
        new. There one may choose subsets that cut through channels (`subset_size`); here not: a large
        element would be divided by norms that have not seen it. Take about ten times Adam's lr.
        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 4 r l + 4 l + 8.
        """,
        paper="2411.07120",
        recommended=(
            Advice(
                "pre-training",
                "authors, 60M",
                {"lr": 0.05, "eps": 1e-06, "rank": 128, "update_proj_gap": 100},
            ),
        ),
        projector="power",
        rule="average",
        bias_correction=False,
        residual="subset_norm",
        on_refresh="reset",
        other="adam",
    )
)

register(
    Method(
        "ldadam",
        """Adam in a subspace that moves at every step, and nothing of the gradient is lost.

            A = G + E,  P <- orth(B B'P),  B = rho P M^ + (1 - rho) A,  R = P'A,  N = Adam(R)
            W <- (1 - lr wd) W - lr scale P N
            E <- A - P R + beta1 / (1 - beta1) (P_old M_old - P M)

        The moments follow the basis; what neither of the two sees is owed to the next gradient. The paper
        takes betas (0.908, 0.99). It keeps E in the gradient, which a trainer clears; here E is state,
        and holds a byte for each weight with error_states=int8. Embeddings, head, norms and biases
        take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states: 4 s r + 8 r l + 4 m n + 4.
        """,
        paper="2410.16103",
        recommended=(
            Advice("pre-training", "authors' code", {"lr": 0.001, "betas": (0.908, 0.99), "rank": 16}),
            Advice("fine-tuning", "authors' scripts, GLUE", {"lr": 1e-05, "betas": (0.908, 0.99), "rank": 8}),
        ),
        projector="blend",
        rule="adam",
        residual="feedback",
        error_states="fp32",
        momentum=True,
        on_refresh="rotate",
    )
)

register(
    Method(
        "lotus",
        """Adam in the leading subspace of the gradient, replaced once gradients have drifted out of it.

            R = P'G,  N = Adam(R),  W <- (1 - lr wd) W - lr scale P N
            A = sum of G / |G| since the last look;  |P'A| < threshold |A|: P anew, by randomized iterations

        Looked at every `update_proj_gap` steps. A has the weight's size: its norms are those of `probes`
        random combinations of its columns. The threshold is not the paper's, which measures A itself.
        Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), fp32 states:
        4 s r + 4 s probes + 8 r l + 4.
        """,
        paper="2602.01233",
        projector="drift",
        rule="adam",
        scale=0.25,
    )
)
