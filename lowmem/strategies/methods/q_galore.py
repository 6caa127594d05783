"""Q-GaLore: GaLore in 8 and 4 bits."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "q_galore",
        """8-bit Adam in the leading subspace of the gradient, with a basis of 4 bits that is replaced lazily.

            R = P'G,  N = Adam(R),  W <- (1 - lr wd) W - lr scale P N
            |P_old'P_new|^2 / r at least `threshold` on average of 5: the time to the next P doubles

        Weights stay as they are: the paper's 8-bit weights are not part of it. The released code takes the
        cosine of two singular vectors, whose sign is open, holds a byte for each 4-bit code, and loses the
        range of numbers of one sign. Embeddings, head, norms and biases take 8-bit Adam.

        Bytes for an (m, n) weight, s = min(m, n), l = max(m, n), 8-bit states, blocks of 256:
        s r / 2 + 8 s r / 256 + 28 (basis) + 2 (r l + 4 r l / 256) + 4.
        """,
        paper="2407.08296",
        projector="lazy",
        rule="adam",
        states="int8",
        scale=0.25,
    )
)
