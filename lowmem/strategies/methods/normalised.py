"""Normalised steps: of rows, columns or singular values."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "sinkgd",
        """The gradient with rows and columns of one size.

            X = G;  5 times: rows of X to norm sqrt(n), columns to norm sqrt(m)
            W <- (1 - lr wd) W - lr alpha X

        Embeddings, head, norms and biases take Adam. Without a momentum the noise of a small
        batch goes straight into the weights: accumulate.

        Bytes for an (m, n) weight: 0.
        """,
        paper="2502.06742",
        recommended=(Advice("pre-training", "paper", {"lr": 0.02}),),
        rule="sinkgd",
        other="adam",
    )
)

register(
    Method(
        "scale",
        """The gradient with rows of one size, and a momentum for the head alone.

            matrices:    D = rows of G over their rms
            embeddings:  D = columns of G over their rms
            head:        M <- M + (1 - momentum)(G - M),  D = rows of M over their rms

        Norms and biases take Adam. Every element moves by about lr, five times as far as
        with AdamW. A tied head is an embedding, and holds no momentum. The paper trains from
        scratch; it publishes no values for fine-tuning.

        Bytes for an (m, n) weight: 0; for the head 4 m n with fp32 states.
        """,
        paper="2506.16659",
        recommended=(Advice("pre-training", "authors' scripts, 60M to 350M; 2e-4 at 1B", {"lr": 0.001}),),
        rule="row_norm",
        embedding="column_norm",
        head="row_norm_momentum",
        vector="adam",
    )
)

register(
    Method(
        "muon",
        """Momentum with equal singular values.

            M <- M + (1 - momentum)(G - M),  X = orthogonal factor of M by five steps of Newton and Schulz
            W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) X

        One moment instead of two. Embeddings, head, norms and biases take Adam. Products are fp32, which
        leaves 1e-5 of a step to rounding; `products=bf16` are those of published programs: faster, many
        times so on a card, and 1 to 2 % of a step off, or 15 % where singular values fall as 1 / k^2.
        Meant for (continued) pre-training and for the factors of LoRA: full fine-tuning of models that Adam
        trained is reported to hurt, the more the stronger the steps (arXiv 2605.10468).

        Bytes for an (m, n) weight: 4 m n with fp32 states, m n + 4 ceil(m n / 256) with int8.
        """,
        paper="2502.16982",
        recommended=(Advice("pre-training", "Moonlight; lr as for AdamW", {"weight_decay": 0.1}),),
        rule="muon",
        other="adam",
    )
)

register(
    Method(
        "muon_8bit",
        """Muon with its momentum in 8 bits, on a linear scale.

            M <- M + (1 - momentum)(G - M),  X = orthogonal factor of M before it is encoded
            W <- (1 - lr wd) W - lr 0.2 sqrt(max(m, n)) X,  M <- its codes, 2048 to a scale

        Only large elements of M count once it is orthogonal, which a linear map holds best. Where M is
        nearly of low rank, its small directions are those of the codes. Embeddings, head, norms
        and biases take Adam with moments of 8 bits (the dynamic map). As `muon`, meant for (continued)
        pre-training and for the factors of LoRA, not for full fine-tuning of models that Adam trained.

        Bytes for an (m, n) weight: m n + 4 ceil(m n / 2048).
        """,
        paper="2509.23106",
        recommended=(Advice("pre-training", "Moonlight; lr as for AdamW", {"weight_decay": 0.1}),),
        rule="muon",
        other="adam",
        states="int8",
        codes="linear",
    )
)

register(
    Method(
        "swan",
        """The gradient with standardised rows and equal singular values.

            X = (G - row means) / row deviations
            W <- (1 - lr wd) W - lr D,  D = orthogonal factor of X, with the rms of X, by Newton and Schulz

        Embeddings, head, norms and biases take Adam. Every element moves by about lr, five times as
        far as with AdamW. Without a momentum the noise of a small batch goes straight into the
        weights: accumulate. The paper trains from scratch.

        Bytes for an (m, n) weight: 0.
        """,
        paper="2412.13148",
        rule="swan",
        other="adam",
    )
)

register(
    Method(
        "ada_muon",
        """Muon's step over the root of the average of its squares.

            O = orthogonal factor of the signs of the momentum,  V <- beta2 V + (1 - beta2) O^2
            W <- (1 - lr wd) W - lr N,  N = O / (sqrt(v_hat) + eps) with an rms of 0.2

        Two moments, as in AdamW: it saves no memory with fp32 states. Embeddings, head, norms and biases
        take Adam. `sign=false` is the published code.

        Bytes for an (m, n) weight: 8 m n + 4 with fp32 states, 2 m n + 8 ceil(m n / 256) + 4 with int8.
        """,
        paper="2507.11005",
        rule="ada_muon",
        other="adam",
    )
)

register(
    Method(
        "dion",
        """The orthogonal factor of a low-rank part of the momentum.

            B = M + G,  P = orth(B Q),  R = B' P
            M <- B - (1 - momentum) P R',  Q <- R with columns of norm 1
            W <- (1 - lr wd) W - lr sqrt(m / n) P Q'

        What a step does not see stays in M. A step has the spectral norm sqrt(m / n): take lr 0.01 from
        scratch. Embeddings, head, norms and biases take Adam.

        Bytes for an (m, n) weight, rank r: 4 m n + 4 n r with fp32 states.
        """,
        paper="2504.05295",
        recommended=(Advice("pre-training", "authors' code", {"lr": 0.01}),),
        rule="dion",
        other="adam",
    )
)

register(
    Method(
        "auon",
        """The momentum over its norm.

            M <- M + (1 - momentum)(G - M),  U = (1 - momentum) G + momentum M,  X = U / |U|
            W <- (1 - lr wd) W - lr sqrt(max(1, m / n)) X / rms(cosh(gamma X))

        A step is as long as lr, whatever the size of the matrix: take `scaling=rms` for steps as long as
        AdamW's. `scaling=released` is the published code, which steps by U itself. Embeddings, head,
        norms and biases take Adam.

        Bytes for an (m, n) weight: 4 m n with fp32 states, m n + 4 ceil(m n / 256) with int8.
        """,
        paper="2509.24320",
        rule="auon",
        other="adam",
    )
)

register(
    Method(
        "sumo",
        """Momentum with equal singular values in the leading subspace of the gradient.

            R = P' G,  M <- M + (1 - momentum)(R - M),  O = orthogonal factor of M, by eigenvectors
            W <- (1 - lr wd) W - lr 0.2 sqrt(longest side of M) P O

        Every update_proj_gap steps P is found anew, and M turns with it. The factor is that of an SVD: in a
        few directions it costs little, and small singular values, which Newton and Schulz leave behind,
        are many. The paper's limiter never acts: O always has norm sqrt(r). Embeddings, head, norms
        and biases take Adam.

        Bytes for an (m, n) weight, short side s, long side l, rank r: 4 r (s + l).
        """,
        paper="2505.24749",
        projector="power",
        rule="muon",
        other="adam",
        on_refresh="rotate",
        rank=128,
        update_proj_gap=200,
        nesterov=False,
        iterations=0,
    )
)
