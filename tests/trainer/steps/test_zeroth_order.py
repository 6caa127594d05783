"""Strategies without gradients through the Trainer loop: the right slope, no graph, exact resume."""

import pytest
import torch
import transformers
from tiny_folder import tokenizer
from tiny_models import tiny
from tiny_runs import BASE, Rows, assert_equal, keep_only, logged, trainer, weights

from lowmem.training.arguments import LowMemSFTConfig
from lowmem.training.trainer import LowMemSFTTrainer
from lowmem.training.zeroth.log import NAME, ReplayLog

MEZO = {"optim": "mezo", "optim_args": "eps_perturb=0.001", "learning_rate": 1e-4}


def sft(folder, model, **values):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(12)])
    settings = {**BASE, **MEZO, "bf16": False, "max_length": 32, **values}
    args = LowMemSFTConfig(output_dir=str(folder), **settings)
    words = tokenizer()
    made = LowMemSFTTrainer(model, args, train_dataset=rows, processing_class=words)
    made.remove_callback(transformers.PrinterCallback)
    return made


def slope_and_truth(made, batches, loss):
    """(c of the source, z . gradient of the true loss) for the first step of a run."""
    seen = {}
    original = made.create_optimizer

    def create(model=None):
        optimizer = original(model)

        def step(*args, **kwargs):
            evidence = optimizer._evidence
            named = [(n, p) for n, p in optimizer.named_parameters()]
            seen["c"] = sum(s.c for group in evidence for s in group)
            found = optimizer.strategy.source.gradients(named, evidence)
            seen["z"] = {id(p): g.rows(0, g.shape[0]).reshape(p.shape) / seen["c"] for p, g in found}

        optimizer.step = step
        return optimizer

    made.create_optimizer = create
    made.train()
    model = made.model.eval()
    model.zero_grad()
    loss(model, batches).backward()
    truth = sum(float((seen["z"][id(p)] * p.grad).sum()) for p in model.parameters())
    assert set(seen["z"]) == {id(p) for p in model.parameters()}
    return seen["c"], truth


def taken(made, count):
    """The micro-batches of the first window, as the run will see them."""
    loader = iter(made.get_train_dataloader())
    return [next(loader) for _ in range(count)]


def token_mean(model, batches):
    """Mean over the label tokens of all batches, in plain terms."""
    total, items = torch.zeros(()), 0
    for batch in batches:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
        ).logits
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        items += int((labels != -100).sum())
    return total / items


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("micro", [1, 3])
def test_slope_is_the_gradient_along_the_direction(tmp_path, kind, micro):
    """Tied weights, the head included; several micro-batches are one large batch."""

    def made():
        model = tiny(kind)
        return trainer(
            tmp_path,
            model=model,
            max_steps=1,
            gradient_accumulation_steps=micro,
            **MEZO | {"optim_args": "eps_perturb=0.0002"},
        )

    torch.manual_seed(0)
    batches = taken(made(), micro)
    torch.manual_seed(0)
    c, truth = slope_and_truth(made(), batches, token_mean)
    assert c == pytest.approx(truth, rel=2e-2, abs=2e-3)


def test_sft_slope_sees_the_head_too(tmp_path):
    """TRL's own head reads its weight past the module: the probe must not go through it."""
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def model():
        torch.manual_seed(3)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    for label_loss in (True, False):
        first = sft(tmp_path, model(), max_steps=1)
        torch.manual_seed(0)
        batches = taken(first, 1)
        made = sft(tmp_path, model(), max_steps=1, label_loss=label_loss)
        torch.manual_seed(0)
        c, truth = slope_and_truth(made, batches, token_mean)
        assert c == pytest.approx(truth, rel=2e-2, abs=2e-3), label_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_without_graph_state_or_gradient_and_resumes_bit_exactly(tmp_path, dtype):
    graphs = []

    def run(resume=None):
        made = trainer(
            tmp_path,
            model=tiny(dtype=dtype),
            max_steps=8,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=4,
            **MEZO,
        )
        original = made.compute_loss

        def compute_loss(*args, **kwargs):
            loss = original(*args, **kwargs)
            graphs.append(loss.requires_grad)
            return loss

        made.compute_loss = compute_loss
        made.train(resume_from_checkpoint=resume)
        assert all(p.grad is None for p in made.model.parameters())
        return made

    start = weights(trainer(tmp_path, model=tiny(dtype=dtype), **MEZO))
    whole = run()
    assert not any(graphs)
    assert len(graphs) == 8 * 2 * 2  # steps x micro-batches x sides
    assert any(not torch.equal(start[n], w) for n, w in weights(whole).items())
    assert logged(whole, "optimizer_state_bytes") == [0]
    assert logged(whole, "grad_norm") == []
    assert len(logged(whole, "learning_rate")) == 8
    keep_only(tmp_path, 4)
    resumed = run(resume=True)
    assert_equal(weights(whole), weights(resumed))
    assert logged(resumed, "loss") == logged(whole, "loss")


@pytest.mark.parametrize(
    ("optim", "options", "lr"),
    [("mezo", "eps_perturb=0.001", 1e-3), ("lozo", "queries=2", 1e-3), ("fzoo", "", 2e-3)],
)
def test_loss_falls_on_a_small_problem(tmp_path, optim, options, lr):
    values = {"optim": optim, "optim_args": options, "learning_rate": lr, "lr_scheduler_type": "constant"}
    steps = 60 if optim == "mezo" else 30
    made = trainer(tmp_path, rows=Rows(4, 6), max_steps=steps, per_device_train_batch_size=4, **values)
    made.train()
    losses = logged(made, "loss")
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.3


def test_each_step_takes_the_rate_of_the_schedule_and_the_run_says_how_long_it_is(tmp_path):
    """Warm-up over two steps, then a straight line to 0 at the sixth."""
    made = trainer(tmp_path, max_steps=6, **MEZO)
    said = []
    made.tell = said.append
    made.train()
    taken = [numbers[0][0] for _, _, numbers in made.replay_log.steps]
    assert taken == pytest.approx([1e-4 * factor for factor in (0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4)])
    assert len(said) == 1
    assert "this one takes 6 of 2, lr 0.0001" in said[0]


SAVED = {"save_strategy": "steps", "save_steps": 2}


class Freeze(transformers.TrainerCallback):
    """Gradual freezing, as users write it."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            next(model.parameters()).requires_grad_(False)


def test_a_run_that_its_log_cannot_tell_goes_on_and_says_so(tmp_path, monkeypatch):
    """Frozen on the way, or resumed under another torch."""
    frozen, said = trainer(tmp_path / "frozen", max_steps=4, **SAVED, **MEZO), []
    frozen.add_callback(Freeze())
    frozen.tell = said.append
    frozen.train()
    assert ["was frozen on the way" in line for line in said] == [False, True]
    assert not (tmp_path / "frozen" / "checkpoint-4" / NAME).exists()
    log = ReplayLog.load(tmp_path / "frozen" / "checkpoint-2" / NAME)
    assert len(log.steps) == 2
    log.header["torch"] = "0.9"
    monkeypatch.setattr(ReplayLog, "load", lambda path: log)
    keep_only(tmp_path / "frozen", 2)
    resumed = trainer(tmp_path / "frozen", max_steps=4, **SAVED, **MEZO)
    resumed.tell = said.append
    resumed.train(resume_from_checkpoint=True)
    assert "torch 0.9, here" in said[-1]
    assert resumed.replay_log is None
