"""Fused backward: rules light enough to step inside the backward pass, one gradient at a time."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "lomo",
        """Gradient descent inside the backward pass.

            W <- (1 - lr wd) W - lr G,  G freed at once

        The rule is that of `sgd`; what makes it LOMO is `gradient_release`, with which each tensor is
        stepped as soon as its gradient is there. The norm of all gradients is not known then: clip=tensor
        takes each tensor's own, clip=previous that of the step before, where the paper runs the backward
        pass twice. Accumulation has no place in it: take larger batches.

        Bytes for an (m, n) weight: 0.
        """,
        paper="2306.09782",
        rule="sgd",
    )
)

register(
    Method(
        "ada_lomo",
        """A factored second moment and steps in units of the weight, inside the backward pass.

            V = r c' / mean(r),  U = G / sqrt(V),  U <- U / max(1, rms(U))
            W <- (1 - alpha wd) W - alpha U,   alpha = lr max(eps2, rms(W)),  G freed at once

        Each tensor is normalised by itself (grouped update normalisation), so that none has to wait for
        another: `gradient_release` frees each gradient as soon as it is there. The published code keeps its
        moments out of checkpoints; here a run resumes with them. betas and eps are not used.

        Bytes for an (m, n) weight: 4 (m + n) + 4; for a vector of d elements 4 d + 4.
        """,
        paper="2310.10195",
        rule="adafactor",
        scale_parameter=True,
    )
)
