"""GoLore: GaLore that ends with random subspaces."""

from lowmem.strategies.method import Method, register

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
        projector="switch",
        rule="adam",
        on_refresh="rotate",
        scale=0.25,
    )
)
