"""Zeroth order: the loss alone is read, no gradient is made."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "mezo",
        """Two forward passes instead of a gradient, and no state.

            c = (L(W + eps z) - L(W - eps z)) / (2 eps)
            W <- (1 - lr wd) W - lr c z

        z is new in every step and is drawn again from its name when the step is taken.
        Probes leave the weights bit for bit as they are, and 16-bit weights are rounded
        at random, so that steps far below their spacing are taken with the right mean.
        Weights are trained by the memory of inference; it takes ten to a hundred times
        the steps of AdamW, and a learning rate around 1e-6 (1e-4 for adapters).

        Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights
        once more.
        """,
        paper="2305.17333",
        recommended=(
            Advice("fine-tuning", "authors, models from 1B; up to 1e-6", {"lr": 1e-07, "eps_perturb": 0.001}),
        ),
        rule="sgd",
        source="spsa",
    )
)

register(
    Method(
        "fzoo",
        """Many one-sided slopes, divided by the spread of their losses.

            d = sum_i (L(W + eps z_i) - L(W)) / (N std_i L(W + eps z_i)) z_i
            W <- (1 - lr wd) W - lr d

        with N directions of signs. The radius cancels, and so does the scale of the loss: lr
        is a length (5e-5 for a model of 13 billion weights); the paper's radius of 1e-4 is below
        the spacing of most bf16 weights, ours is not. N + 1 forward passes for N directions;
        several may run at once, at the cost of as many copies of a module.

        Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights
        once more for each point `at_once`.
        """,
        paper="2506.09034",
        recommended=(
            Advice("fine-tuning", "authors, OPT-13B", {"lr": 5e-05, "eps_perturb": 0.0001, "queries": 8}),
        ),
        rule="sgd",
        source="spread_spsa",
    )
)

register(
    Method(
        "lozo",
        """Zeroth-order steps along low-rank directions that share a side for a while.

            Z = U V' / sqrt(rank),    c = (L(W + eps Z) - L(W - eps Z)) / (2 eps)
            W <- (1 - lr wd) W - lr c Z

        U is new in every step, V stays for `update_gap` of them, so that the steps of a window
        lie in one subspace. Z has unit variance: eps and lr mean what they mean for MeZO (the
        paper displaces by U V' itself: its eps is ours / sqrt(rank), its lr ours, with 1 / rank
        in the estimate; its code leaves that out). Vectors have free directions.

        Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights once
        more and 4 n rank bytes of V.
        """,
        paper="2410.07698",
        recommended=(
            Advice(
                "fine-tuning",
                "authors, OPT-13B; up to 1e-6",
                {"lr": 1e-07, "eps_perturb": 0.001, "rank": 2, "update_gap": 50},
            ),
        ),
        rule="sgd",
        source="low_rank_spsa",
    )
)

register(
    Method(
        "sparse_mezo",
        """MeZO on the smallest weights of each tensor.

            z_i = 0 where |w_i| > h,    h the `share` quantile of the sizes of its tensor
            c = (L(W + eps z) - L(W - eps z)) / (2 eps),    W <- (1 - lr wd) W - lr c z

        The bound is read off the weights as they are, at each step, from a sample of the
        tensor: no mask is held. (The paper takes it once, from the weights it starts with.)

        Bytes for an (m, n) weight: 0, and no gradient; while a module runs, its weights once
        more.
        """,
        paper="2402.15751",
        rule="sgd",
        source="sparse_spsa",
    )
)

register(
    Method(
        "zo_adamu",
        """MeZO along directions with momentum, normalised element by element.

            n1 = sqrt(a) z1,    n2 = m + sqrt(1 - a) z2,    d = b1 n1 + (1 - b1) n2
            c = (L(W + eps d) - L(W - eps d)) / (2 eps),    m <- sign(c) d
            W <- (1 - lr wd) W - lr c d / sqrt(b2 n1^2 + (1 - b2) n2^2 + 1e-8)

        a, b1 and b2 are 1 for the first twentieth of `total_steps`, at most 1024, where the
        step is c sign(z), and fall by a cosine each until four fifths of them. This is the
        paper's text, its code probes one direction and steps along another. The estimate
        is biased; what the paper reports has not been found again by others.

        Bytes for an (m, n) weight of b bytes each: b m n of m, and no gradient; while a
        module runs, its weights once more.
        """,
        paper="2312.15184",
        rule="sgd",
        source="momentum_spsa",
    )
)

register(
    Method(
        "qzo",
        """Zeroth-order steps of the scales of 4-bit weights; their codes stay.

            c = (L(s exp(eps z)) - L(s exp(-eps z))) / (2 eps),  |c| <= clip_slope
            s <- max(s - lr s c z, 0)

        The paper displaces scales by a fixed length, which suits one quantizer; here steps
        are in proportion to the scale. Its settings for int4 (eps 1e-3, lr 1e-7, clip 100,
        scales near 0.007) are eps 0.14, lr 2e-3, clip 0.7 in these units. Codes are never
        touched, and the result is an ordinary quantized checkpoint. Where a backward pass
        fits, LoRA on the same 4-bit weights learns more.

        Bytes for an (m, n) weight in NF4: m n / 2 of codes and 4 m n / 64 of scales, no state
        and no gradient; while a module runs, its scales once more.
        """,
        paper="2505.13430",
        rule="sgd",
        source="quantized_spsa",
    )
)

register(
    Method(
        "forward_gradient",
        """The loss's exact slope along a random direction, by forward differentiation.

            c = d/dt L(W + t z) at t = 0
            W <- (1 - lr wd) W - lr c z

        MeZO with eps going to 0: no bias, and no difference of two nearly equal losses. One pass
        with tangents takes the place of two passes, and costs about as much. Operations without a
        rule for tangents are refused (4-bit weights, objectives that are no arithmetic); mezo is for those.

        Bytes for an (m, n) weight of b bytes each: 0, and no gradient; while the loss is evaluated, b m n
        of z, and each activation twice.
        """,
        paper="2202.08587",
        rule="sgd",
        source="tangents",
    )
)
