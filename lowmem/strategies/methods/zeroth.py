"""Zeroth order: the loss alone is read, no gradient is made."""

from lowmem.strategies.method import Method, register

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
        rule="sgd",
        source="spsa",
    )
)
