"""Sparse: few entries of a gradient, or of a weight."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "microadam",
        """Adam from a window of sparse gradients with 4-bit error feedback.

            a = g + e,  V = the largest 1 % of a,  e = 4 bits of the rest
            m, v from the last 10 V, weighted by age;  W <- (1 - lr wd) W - lr m / (sqrt(v) + eps)

        No moment is stored. All tensors are treated alike, in blocks of 4096 elements;
        a step moves at most a tenth of the elements. Weights and gradients may have any
        dtype and live anywhere.

        Bytes for d elements, b = ceil(d / 4096):
        2048 b + 4 b 4096 / bucket + 4 window ceil(4096 density) b + 4, which is 0.9 d for the defaults.
        """,
        paper="2405.15593",
        recommended=(Advice("fine-tuning", "authors' script for Llama-2-7B on GSM8K", {"lr": 4e-05}),),
        rule="microadam",
    )
)

register(
    Method(
        "fish_mask",
        """Adam on the few elements that the loss depends on most; all others keep their bits.

            F = G^2 at the first gradient,  mask = the largest `rank` of F in each tensor, for good
            W[mask] <- (1 - lr wd) W[mask] - lr Adam(G[mask])

        Matrices, embeddings, head, norms and biases alike. The paper averages F over samples and compares
        all tensors; here the first batch decides, so let it be a large one (accumulation counts), and each
        tensor has its share. The released code holds moments for all elements, and decays them all.

        Bytes for an (m, n) weight, k = floor(rank m n), fp32 states: 12 k + 4, 0.06 m n by default.
        """,
        paper="2111.09839",
        recommended=(Advice("fine-tuning", "paper, GLUE", {"rank": 0.005}),),
        projector="fisher",
        rule="adam",
    )
)
