"""Few numbers: norms of a tensor, sums over the model, the loss, or a probe of the curvature."""

from lowmem.strategies.method import Advice, Method, register

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
        recommended=(Advice("pre-training", "authors' package", {"lr": 0.01, "weight_decay": 0.01}),),
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
        recommended=(
            Advice(
                "pre-training",
                "paper; lr depends on the task",
                {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.001},
            ),
        ),
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
        """Descent at a rate of distance over gradients, of the model as one.

            H = G + wd W;  r <- max(r, |w - w_0|),  reps_rel (1 + |w_0|) at first;  s <- s + |h|^2
            W <- W - lr r / sqrt(s) H,  w and h of all tensors

        Leave lr at 1, without a schedule. The paper evaluates an average of iterates, which is not held
        here. All gradients must be there before the first tensor steps: no gradient release.

        Bytes for an (m, n) weight: 4 m n + 16, or 2 m n + 16 where it has 16 bits.
        """,
        paper="2302.12022",
        recommended=(Advice("fine-tuning", "paper: do not tune it", {"lr": 1.0}),),
        rule="dog",
    )
)

register(
    Method(
        "ldog",
        """Descent at a rate of distance over gradients, tensor by tensor.

            H = G + wd W;  r <- max(r, |W - W_0|),  reps_rel (1 + |W_0|) at first;  s <- s + |H|^2
            W <- W - lr r / sqrt(s) H

        The layer-wise form of the paper. Leave lr at 1, without a schedule. The paper evaluates an average
        of iterates, which is not held here.

        Bytes for an (m, n) weight: 4 m n + 16, or 2 m n + 16 where it has 16 bits.
        """,
        paper="2302.12022",
        recommended=(Advice("fine-tuning", "paper: do not tune it", {"lr": 1.0}),),
        rule="ldog",
    )
)

register(
    Method(
        "momo",
        """Momentum no farther than to where a model of the loss is at its least.

            M <- M + c (G - M),  f <- f + c (loss - f),  p <- p + c (<g, w> - p),  c = 1 - beta1, 1 at first
            t = min(lr, max(S (f - least) + <m, w> - S p, 0) / |m|^2),  S = 1 + lr wd
            W <- (W - t M) / S,  products and norm over all tensors

        lr is the most there is. It goes by the value of the loss: the Trainer tells it, a loop of your own
        by step(closure) or add_loss(loss). No gradient release.

        Bytes for an (m, n) weight: 4 m n + 24 with fp32 states.
        """,
        paper="2305.07583",
        recommended=(Advice("pre-training", "authors' package; the most there is", {"lr": 1.0}),),
        rule="momo",
    )
)

register(
    Method(
        "momo_adam",
        """Adam no farther than to where a model of the loss is at its least.

            M, v, f, p as averages from zero,  b = 1 - beta1^t,  D = sqrt(v_hat) + eps,  S = 1 + lr wd
            t = min(lr / b, max(S (f - b least) + <m, w> - S p, 0) / <m, m / D>)
            W <- (W - t M / D) / S,  products over all tensors

        lr is the most there is: far above the least loss these are Adam's own steps. It goes by the value
        of the loss: the Trainer tells it, a loop of your own by step(closure) or add_loss(loss). No
        gradient release.

        Bytes for an (m, n) weight: 8 m n + 28 with fp32 states.
        """,
        paper="2305.07583",
        recommended=(Advice("pre-training", "authors' package; the most there is", {"lr": 0.01}),),
        rule="momo",
        adaptive=True,
    )
)

register(
    Method(
        "sophia",
        """Momentum over the curvature, no element farther than lr.

            M <- M + (1 - beta1)(G - M);  at every k-th step  H <- H + (1 - beta2)(B P^2 - H)
            W <- (1 - lr wd) W - lr clip(M / (rho H), 1)

        P is the gradient of a mean loss over B labels that the model draws itself: one more forward and
        backward pass each `every` steps. The Trainer makes it, a loop of your own by `probe(logits)` where
        `probe_due` says so; no gradient release. The paper takes betas (0.965, 0.99).

        Bytes for an (m, n) weight: 8 m n with fp32 states, 2 (m n + 4 ceil(m n / 256)) with int8.
        """,
        paper="2305.14342",
        recommended=(
            Advice(
                "pre-training",
                "authors, GPT-2; lr a little below AdamW's",
                {"betas": (0.965, 0.99), "weight_decay": 0.2, "rho": 0.05},
            ),
        ),
        rule="sophia",
    )
)
