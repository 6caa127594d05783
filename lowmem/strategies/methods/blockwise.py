"""Block by block: some tensors step at a time, the others rest without gradient and without state."""

from lowmem.strategies.method import Advice, Method, register

register(
    Method(
        "badam",
        """Adam on one layer at a time, all others at rest.

            every `switch_gap` steps the next layer, in an order that is random in every sweep:
            W <- (1 - lr wd) W - lr Adam(G) for its tensors, moments and ages new; else W stays

        A resting tensor neither decays nor has a gradient: the backward pass ends at the active layer.
        Embedding, head and last norm rest throughout (ends=true takes them in). A layer is what shares
        the first number in a name. The order follows from the seed, so that a run resumes with it, where
        the released code forgets order and place and gives its first layer one step less. With n steps
        in an epoch and D layers, n / D is a usual gap.

        Bytes for an (m, n) weight, fp32 states: 8 m n + 4 while its layer is active, else 0.
        """,
        paper="2404.02827",
        recommended=(Advice("fine-tuning", "authors, models of 7B and 8B; down to 1e-6", {"lr": 1e-05}),),
        rule="adam",
        schedule="layers",
    )
)

register(
    Method(
        "lisa",
        """Adam on embedding, head, last norm, and a few layers that are drawn anew now and then.

            every `switch_gap` steps: `count` layers, drawn evenly
            W <- (1 - lr wd) W - lr Adam(G) for their tensors and those of no layer; else W stays

        A layer that rests holds no state and begins afresh at its next turn, as the paper counts; the
        released code keeps what it held, and grows towards AdamW. What is drawn follows from the seed. The
        paper takes lr 2e-5, and one or two layers.

        Bytes for an (m, n) weight, fp32 states: 8 m n + 4 while its layer is active, else 0; always for
        embedding and head.
        """,
        paper="2403.17919",
        recommended=(Advice("fine-tuning", "authors' script, Llama-2-7B", {"lr": 2e-05}),),
        rule="adam",
        schedule="layers",
        switch_gap=20,
        order="drawn",
        count=2,
        ends=True,
    )
)

register(
    Method(
        "misa",
        """Adam on a few matrices at a time, those more often whose gradients are larger.

            every `switch_gap` steps: first those that never had a turn, then by lot,
            with chances in proportion to exp(min(5, eta g^2)), g the smoothed norm of their gradients
            W <- (1 - lr wd) W - lr Adam(G) while it is its turn; else W stays

        A matrix that is drawn again keeps its moments. Embedding, head, norms and biases rest (ends=true
        takes them in). The share is one of the number of matrices, where the paper's is of parameters. The
        paper takes lr 5e-5 for fine-tuning, and a share of 0.25 from scratch.

        Bytes for an (m, n) weight, fp32 states: 8 m n + 20 while it is its turn, else 0.
        """,
        paper="2511.00056",
        recommended=(Advice("fine-tuning", "authors, Llama-2-7B", {"lr": 5e-05}),),
        rule="adam",
        schedule="importance",
    )
)

register(
    Method(
        "grades",
        """Adam on each matrix until its gradients have settled; then it is frozen for good.

            s_w = mean over `switch_gap` steps of mean |G|
            frozen after `grace` steps where |s_w - s_(w-1)| < threshold (by=size: where s_w < threshold)

        A frozen matrix frees its state, and no gradient is made for it: the backward pass becomes cheaper
        while the run goes on. Means are over elements, so that one threshold suits every size; the released
        code sums over elements, and keeps a copy of all weights to see how they change. Set grace to about
        half of the run.

        Bytes for an (m, n) weight, fp32 states: 8 m n + 20 until it is frozen, then 0.
        """,
        paper="2509.01842",
        rule="adam",
        schedule="convergence",
    )
)
