"""Sparse: few entries of a gradient, or of a weight."""

from lowmem.strategies.method import Method, register

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
        rule="microadam",
    )
)
