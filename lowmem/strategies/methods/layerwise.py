"""One number a tensor: momentum with a norm in the place of a second moment."""

from lowmem.strategies.method import Method, register

register(
    Method(
        "sgd_sai",
        """Momentum, scaled for good by what the first gradient says of its tensor.

            k = |G| / (std(G) + eps) at the first gradient,  M = G at first, then M + (1 - momentum)(G - M)
            W <- (1 - lr wd) W - lr k M

        k, about the root of the number of elements, is held: a resume is exact. All tensors
        are treated alike. The paper's lr is 1e-2 from scratch.

        Bytes for an (m, n) weight: 4 m n + 4 with fp32 states, m n + 4 ceil(m n / 256) + 4 with int8.
        """,
        paper="2412.11768",
        rule="sgd_sai",
    )
)

register(
    Method(
        "novograd",
        """Momentum of gradients, each over an average norm of its tensor.

            v <- beta2 v + (1 - beta2) |G|^2,  M <- beta1 M + G / (sqrt(v) + eps)
            W <- (1 - lr wd) W - lr M

        The paper takes betas (0.95, 0.98). A step is up to 1 / (1 - beta1) normalised gradients
        long, unless `averaging`; its norm is that of the tensor. The decay is decoupled.

        Bytes for an (m, n) weight: 4 m n + 4 with fp32 states, m n + 4 ceil(m n / 256) + 4 with int8.
        """,
        paper="1905.11286",
        rule="novograd",
    )
)
