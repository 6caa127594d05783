"""AdamW: in every precision, and made safe from spikes."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "adamw",
        """AdamW with plain moments.

            W <- (1 - lr wd) W - lr m_hat / (sqrt(v_hat) + eps)

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 moments, 4 m n + 4 with bf16 ones, which are
        rounded at random.
        """,
        paper="1711.05101",
        recommended=(
            Advice("fine-tuning", "Llama-2-7B on GSM8K, as the baseline of arXiv 2405.15593", {"lr": 5e-05}),
        ),
        rule="adam",
    )
)

register(
    Method(
        "adamw_8bit",
        """AdamW with moments of 8 or 4 bits.

        The arithmetic is AdamW's, in fp32; both moments are decoded before it and encoded after it. int8
        is the dynamic map, companded8 a curve without a table (faster), int4 half of it. Tensors below
        4096 elements keep fp32 moments. See also arXiv 2309.01507 and 2602.23349.

        Bytes for an (m, n) weight, d = m n: 2 d + 8 ceil(d / 256) + 4 (int8),
        2 d + 4 ceil(d / 32) + 4 (companded8), 2 ceil(d / 2) + 8 ceil(d / 128) + 4 (int4).
        """,
        paper="2110.02861",
        recommended=(
            Advice("fine-tuning", "Llama-2-7B on GSM8K, as the baseline of arXiv 2405.15593", {"lr": 5e-05}),
        ),
        rule="adam",
        states="int8",
    )
)

register(
    Method(
        "spam",
        """Adam whose gradients are clipped at spikes and whose moments are forgotten now and then.

            where g^2 > threshold v: g <- sign(g) sqrt(threshold v),  v before the step
            every `gap` steps: m = v = 0;  W <- (1 - lr wd) W - lr phi Adam(G)

        phi leads steps up from a hundredth over `warmup` steps after each time. Tensors take turns, and the
        bias corrections start afresh with the moments; the released code keeps them. Sparse momentum, that
        steps a share of the elements and holds moments for them alone, is projector=randk, rank=0.25,
        update_proj_gap=500, on_refresh=reset.

        Bytes for an (m, n) weight: 8 m n + 8 with fp32 states; sparse, g = ceil(m n / 256) groups of
        k = round(256 rank): 9 g k + 8.
        """,
        paper="2501.06842",
        recommended=(Advice("pre-training", "authors' code", {"lr": 0.001, "eps": 1e-06}),),
        rule="adam",
        modifiers="spike_clip+momentum_reset",
    )
)

register(
    Method(
        "stable_spam",
        """Adam on gradients clipped and normalised by their own history, with moments that are forgotten.

            X averages max|G|, N averages |G|, S averages |G|^2, each without bias
            where |g| > X: g <- g X / max|G|;  G <- G N / (|G| sqrt(S))
            every `gap` steps: m = v = 0;  W <- (1 - lr wd) W - lr Adam(G)

        Made for 4-bit training; a trajectory does not depend on the scale of the gradients. At a reset
        the moments are zero before the step, where the released code takes one step more by the old ones.

        Bytes for an (m, n) weight: 8 m n + 32 with fp32 states.
        """,
        paper="2502.17055",
        rule="stable_spam",
        modifiers="momentum_reset",
        momentum_reset_gap=1000,
        momentum_reset_warmup=0,
    )
)
