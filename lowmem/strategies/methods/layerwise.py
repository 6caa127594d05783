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

register(
    Method(
        "gravity",
        """Momentum of gradients whose large elements are pulled back.

            V <- b V + (1 - b) G / (1 + (G max|G|)^2),  b = (beta1 t + 1) / (t + 2)
            W <- (1 - lr wd) W - lr V

        V starts at zero, where the paper moves every weight at random. With the small gradients of
        language models this is momentum: it wants the lr of SGD.

        Bytes for an (m, n) weight: 4 m n + 4 with fp32 states.
        """,
        paper="2101.09192",
        rule="gravity",
    )
)

register(
    Method(
        "tam",
        """Momentum to which a gradient adds as far as it points the same way.

            s <- gamma s + (1 - gamma) cos(M, G),  c = eps + (1 + s) / 2
            M <- beta1 M + c G,  W <- (1 - lr wd) W - lr M

        With adaptive=true M is an average over the root of a second moment, corrected as Adam's: take
        twice AdamW's lr. Without, it wants the lr of SGD.

        Bytes for an (m, n) weight: 4 m n + 4 with fp32 states, 8 m n + 8 where it is adaptive.
        """,
        paper="2412.18790",
        rule="tam",
    )
)

register(
    Method(
        "dog",
        """Descent at a rate of distance over gradients, tensor by tensor.

            H = G + wd W;  r <- max(r, |W - W_0|),  reps_rel (1 + |W_0|) at first;  s <- s + |H|^2
            W <- W - lr r / sqrt(s) H

        The layer-wise form of the paper, its better one for fine-tuning. Leave lr at 1, without a
        schedule. The paper evaluates an average of iterates, which is not held here.

        Bytes for an (m, n) weight: 4 m n + 16, or 2 m n + 16 where it has 16 bits.
        """,
        paper="2302.12022",
        rule="dog",
    )
)
