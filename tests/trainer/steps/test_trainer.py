"""LowMemTrainer and stock trainers: groups, schedules, resume, accumulation, clipping, adapters."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import tiny
from tiny_runs import BASE, Rows, assert_equal, keep_only, logged, stock, trainer, weights

from lowmem import create, hf_optimizer
from lowmem.config import build
from lowmem.errors import CheckpointError, ConfigError, UserError
from lowmem.memory.count import model_state_bytes
from lowmem.strategies import parse_options
from lowmem.training import tasks
from lowmem.training.arguments import LowMemArguments
from lowmem.training.searched import engine_problems
from tests.enrolled import FIRST, STAND_FOR_OTHERS, by_turns, unlike

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft

RESUMED = {
    "adamw": "",
    "galore": "rank=4,update_proj_gap=5",  # refreshes before and after the resume, staggered by name
}
IN_BF16 = [
    *RESUMED.items(),
    ("adafactor", "beta1=0.9"),
    ("adamw_8bit", ""),
    ("frugal", "update_proj_gap=5,projector=randk"),
    ("frugal", "projector=none,schedule=blocks,switch_gap=5"),
    ("galore", "rank=4,update_proj_gap=5,states=int8"),
    ("microadam", ""),
]
OTHERS = [  # those without gradients have tests of their own
    name for name in unlike() if name not in dict(IN_BF16) and create(name).source.needs_autograd
]
IN_BF16 += [(name, "") for name in OTHERS if name in STAND_FOR_OTHERS]
THOROUGH = [
    pytest.param(name, "", "bfloat16", marks=pytest.mark.thorough)
    for name in OTHERS
    if name not in STAND_FOR_OTHERS
]


def dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


@pytest.fixture
def coded(monkeypatch):
    """Codecs hold the tensors of a tiny model too."""
    monkeypatch.setattr("lowmem.optim.strategy.SMALL", 512)


def test_elements_that_are_not_stepped_are_logged(tmp_path):
    model = tiny()
    made = trainer(tmp_path, model=model, optim="adamw", max_steps=3, clip="none")
    bad = next(p for p in model.parameters() if p.dim() == 2)
    bad.register_hook(lambda g: torch.full_like(g, float("nan")))
    made.train()
    assert logged(made, "nonfinite_elements") == [bad.numel(), 2 * bad.numel(), 3 * bad.numel()]


@pytest.mark.parametrize(
    ("optim", "text", "weights_in"),
    [*((*run, "float32") for run in RESUMED.items()), *((*run, "bfloat16") for run in IN_BF16), *THOROUGH],
)
def test_resume_is_bit_exact(tmp_path, optim, text, weights_in, coded):
    def run(folder, resume=None, seed=0):
        made = trainer(
            folder,
            model=tiny(dtype=dtype(weights_in), seed=seed),
            rows=Rows(36),  # 18 steps an epoch: the resume falls inside the first, the end inside the second
            optim=optim,
            optim_args=text,
            max_steps=24,
            save_strategy="steps",
            save_steps=8,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(tmp_path)
    keep_only(tmp_path, 16)
    resumed = run(tmp_path, resume=True, seed=99)  # everything that counts comes from the checkpoint
    assert_equal(weights(whole), weights(resumed))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert (
        resumed.lowmem_optimizer.state_dict()["param_groups"]
        == whole.lowmem_optimizer.state_dict()["param_groups"]
    )


@pytest.mark.parametrize(("optim", "text"), [run for run in IN_BF16 if run[0] in FIRST])
def test_stock_trainer_resumes_bit_exactly(tmp_path, optim, text, coded):
    def run(resume=None, seed=0):
        made = stock(
            tmp_path,
            hf_optimizer(optim, lr=1e-2, weight_decay=0.1, **parse_options(optim, text)),
            model=tiny(dtype=torch.bfloat16, seed=seed),
            max_steps=24,
            save_strategy="steps",
            save_steps=8,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    keep_only(tmp_path, 16)
    assert_equal(weights(whole), weights(run(resume=True, seed=99)))


def test_stock_trainer_and_ours_take_the_same_steps(tmp_path):
    ours = trainer(tmp_path / "a", optim="galore", optim_args="rank=4,update_proj_gap=3", max_steps=5)
    ours.train()
    choice = hf_optimizer("galore", lr=1e-2, weight_decay=0.1, seed=ours.args.seed, rank=4, update_proj_gap=3)
    theirs = stock(tmp_path / "b", choice, max_steps=5)
    theirs.train()
    assert_equal(weights(ours), weights(theirs))


def test_adamw_is_torchs_adamw_through_the_trainer(tmp_path):
    """lr, betas, eps, weight decay, decay groups, schedule and clipping all arrive."""
    values = {
        "max_steps": 6,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "max_grad_norm": 0.5,
    }
    ours = trainer(tmp_path / "a", optim="adamw", **values)
    ours.train()
    reference = stock(tmp_path / "b", None, optim="adamw_torch", **values)
    reference.train()
    for name, weight in weights(reference).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=0, atol=2e-6, msg=name)
    assert logged(ours, "learning_rate") == logged(reference, "learning_rate")
    torch.testing.assert_close(logged(ours, "grad_norm"), logged(reference, "grad_norm"), rtol=1e-4, atol=0)


def test_groups_carry_the_arguments_and_the_decay_rule(tmp_path):
    made = trainer(
        tmp_path,
        model=tiny("gpt2"),  # biases, LayerNorm and Conv1D
        optim="galore",
        optim_args="rank=4",
        learning_rate=3e-3,
        weight_decay=0.3,
        adam_beta1=0.7,
        adam_epsilon=1e-6,
    )
    optimizer = made.create_optimizer()
    decay = {}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"][0], group["eps"]) == (3e-3, 0.7, 1e-6)
        decay |= dict.fromkeys(group["param_names"], group["weight_decay"])
    assert set(decay) == {name for name, _ in made.model.named_parameters()}
    spared = {name for name, rate in decay.items() if rate == 0}
    assert spared == {name for name in decay if "bias" in name or "ln_" in name}
    assert {decay[name] for name in decay.keys() - spared} == {0.3}


def test_learning_rate_of_the_schedule_is_logged_and_reaches_the_groups(tmp_path):
    made = trainer(tmp_path, optim="adamw", max_steps=6, learning_rate=1.0e-2)
    made.train()
    expected = [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]  # the lr each step was taken with
    assert logged(made, "learning_rate") == pytest.approx(expected)
    assert {group["lr"] for group in made.lowmem_optimizer.param_groups} == {0.0}


def test_state_bytes_are_logged_once_and_are_what_is_held(tmp_path):
    made = trainer(tmp_path, optim="galore", optim_args="rank=4", max_steps=3)
    made.train()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state_tensors(made)}
    assert logged(made, "optimizer_state_bytes") == [sum(held.values())]


def state_tensors(made):
    return [t for state in made.lowmem_optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("optim", RESUMED)
def test_accumulated_micro_batches_are_one_large_batch(tmp_path, optim):
    def run(name, rows, micro):
        made = trainer(
            tmp_path / name,
            optim=optim,
            optim_args=RESUMED[optim],
            max_steps=4,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro,
            adam_epsilon=1e-3,  # else the sign of a gradient near 0 decides a whole step
        )
        made.train()
        return made

    one, four = run("one", 8, 1), run("four", 2, 4)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(four)[name], weight, rtol=0, atol=2e-5, msg=name)
    torch.testing.assert_close(logged(four, "loss"), logged(one, "loss"), rtol=1e-5, atol=0)


def true_norms(tmp_path, steps):
    """Gradient norms of AdamW without clipping, from the stock trainer."""
    made = stock(tmp_path / "norms", None, optim="adamw_torch", max_steps=steps, max_grad_norm=0.0)
    made.train()
    return logged(made, "grad_norm")


@pytest.mark.parametrize("clip", ["none", "global"])
def test_grad_norm_is_the_norm_before_clipping(tmp_path, clip):
    made = trainer(tmp_path / "ours", optim="adamw", max_steps=1, clip=clip, max_grad_norm=1e-3)
    made.train()
    assert logged(made, "grad_norm") == pytest.approx(true_norms(tmp_path, 1), rel=1e-5)


def test_clip_none_leaves_gradients_alone(tmp_path):
    """SGD-like steps show it: with eps large, AdamW's step is proportional to the gradient."""
    steps = {}
    for clip in ("none", "global"):
        made = trainer(
            tmp_path / clip, optim="adamw", max_steps=1, clip=clip, max_grad_norm=1e-3, adam_epsilon=1e3,
            warmup_steps=0, weight_decay=0.0, learning_rate=1e3,
        )  # fmt: skip
        before = weights(made)
        made.train()
        steps[clip] = sum(float((w - before[n]).norm()) for n, w in weights(made).items())
    assert steps["none"] > 100 * steps["global"]


def lora(**values):
    import peft

    config = peft.LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM", **values
    )
    return peft.get_peft_model(tiny(dtype=torch.bfloat16), config)


@pytest.mark.parametrize("optim", RESUMED)
def test_lora_holds_state_for_adapters_only_and_resumes(tmp_path, optim):
    def run(resume=None):
        made = trainer(
            tmp_path,
            model=lora(),
            optim=optim,
            optim_args=RESUMED[optim],
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
        )
        frozen = {n: p.detach().clone() for n, p in made.model.named_parameters() if not p.requires_grad}
        made.train(resume_from_checkpoint=resume)
        assert_equal(frozen, {n: p for n, p in made.model.named_parameters() if not p.requires_grad})
        return made

    torch.manual_seed(0)
    whole = run()
    names = {n for group in whole.lowmem_optimizer.param_groups for n in group["param_names"]}
    assert names == set(weights(whole))
    assert all("lora_" in n for n in names)
    assert len(whole.lowmem_optimizer.state) == len(names)
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-8" / "model.safetensors").exists()
    keep_only(tmp_path, 4)
    assert_equal(weights(whole), weights(run(resume=True)))


@pytest.mark.parametrize("optim", by_turns(unlike()))
def test_every_kind_of_strategy_trains_lora_with_adapters_alone_in_its_state(tmp_path, optim):
    made = trainer(tmp_path, model=lora(), optim=optim, max_steps=2, warmup_steps=0)
    before = weights(made)
    made.train()
    held = {name for name, p in made.model.named_parameters() if made.lowmem_optimizer.state.get(p)}
    assert held <= set(before)
    after = weights(made)
    assert all(torch.isfinite(w).all() for w in after.values())
    assert any(not torch.equal(before[name], w) for name, w in after.items())
    optimizer = made.lowmem_optimizer  # the seed says whose turn it is
    planned = model_state_bytes(optimizer.strategy, made.model, seed=optimizer.param_groups[0]["seed"])
    assert optimizer.state_bytes() == planned


def test_foreign_checkpoints_are_refused_in_one_line(tmp_path):
    def made(**values):
        values = {"optim": "galore", "optim_args": "rank=4", **values}
        return trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, **values)

    made().train()
    for values, words in [
        ({"optim": "adamw", "optim_args": ""}, "strategy is 'galore', this run's is 'adamw'"),
        ({"optim_args": "rank=8"}, "options 'rank' is 4, this run's is 8"),
        ({"optim_args": "rank=4,writer=kahan"}, "options 'writer' is not set, this run's is 'kahan'"),
        ({"model": tiny("qwen3")}, "parameters"),
        ({"model": tiny(dtype=torch.bfloat16)}, "float32"),
    ]:
        with pytest.raises(CheckpointError, match=words) as caught:
            made(**values).train(resume_from_checkpoint=True)
        assert "\n" not in str(caught.value)


def test_resume_takes_the_newest_whole_checkpoint_and_says_what_it_skipped(tmp_path, caplog):
    def made():
        return trainer(tmp_path, optim="adamw", max_steps=12, save_strategy="steps", save_steps=4)

    whole = made()
    whole.train()
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()
    path = tmp_path / "checkpoint-8" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    resumed = made()
    with caplog.at_level("WARNING", logger="lowmem"):
        resumed.train(resume_from_checkpoint=True)
    assert [r.getMessage().split(":")[0] for r in caplog.records if r.name.startswith("lowmem")] == [
        "skipped checkpoint-12",
        "skipped checkpoint-8",
    ]
    assert_equal(weights(whole), weights(resumed))
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        made().train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint in .*; skipped checkpoint-12: it has no manifest"
    ):
        made().train(resume_from_checkpoint=True)


def test_resuming_a_finished_run_takes_no_step_more(tmp_path):
    def made():
        return trainer(
            tmp_path,
            optim="adamw",
            max_steps=4,
            save_strategy="steps",
            save_steps=4,
            lr_scheduler_type="constant",
        )

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_equal(weights(whole), weights(again))


def test_best_checkpoint_is_named_by_its_final_place_and_kept(tmp_path):
    made = trainer(
        tmp_path,
        held=Rows(4),
        optim="adamw",
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one is best, so that it must be spared
    )
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_weight_decay_applies_to_what_a_trainer_of_ones_own_says(tmp_path):
    from lowmem.training.trainer import LowMemTrainer

    class OfNorms(LowMemTrainer):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if "norm" in name]

    values = BASE | {"optim": "adamw", "max_steps": 1}
    args = LowMemArguments(output_dir=str(tmp_path), **values)
    own = OfNorms(tiny(), args, train_dataset=Rows())
    names = own.get_decay_parameter_names(own.model)
    factory, kwargs = hf_optimizer("adamw", lr=1e-2, weight_decay=0.1, decay_names=names)
    for optimizer in (own.create_optimizer(), factory()(tiny(), **kwargs)):
        decays = {n for g in optimizer.param_groups if g["weight_decay"] for n in g["param_names"]}
        assert decays == set(names)


def test_a_copy_made_while_layers_rest_can_be_trained_whole(tmp_path):
    copies = []

    class Copying(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            copies.append(copy.deepcopy(model))

    made = trainer(tmp_path, optim="lisa", optim_args="count=1,switch_gap=2", max_steps=2)
    made.add_callback(Copying())
    made.train()
    assert all(p.requires_grad for p in made.model.parameters())
    assert not [key for key in vars(made.model) if "lowmem" in key]
    for one in copies:
        assert not all(p.requires_grad for p in one.parameters())
        trainer(tmp_path, model=one, optim="adamw").create_optimizer()
        assert all(p.requires_grad for p in one.parameters())


def test_an_optimizer_beside_the_strategy_is_refused(tmp_path):
    from lowmem.training.trainer import LowMemTrainer

    args = LowMemArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match=r"args\.optim names the strategy"):
        LowMemTrainer(tiny(), args, optimizer_cls_and_kwargs=hf_optimizer("adamw", lr=1e-3))
    model = tiny()
    with pytest.raises(UserError, match=r"args\.optim names the strategy"):
        LowMemTrainer(model, args, optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(UserError, match="takes LowMemArguments"):
        LowMemTrainer(tiny(), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


def test_hf_optimizer_refuses_what_a_stock_trainer_cannot_do():
    with pytest.raises(UserError, match="did you mean 'rank'"):
        hf_optimizer("galore", lr=1e-3, rnk=3)
    with pytest.raises(UserError, match=r"lowmem\.LowMemTrainer"):
        hf_optimizer("mezo", lr=1e-6)


def test_a_job_that_would_shard_nothing_is_refused_before_a_model_loads(monkeypatch):
    asked = {"model": "none", "optim": "adamw", "fsdp": True}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"between cards only, and there is none here; .* copies"):
        tasks.refuse(build(asked), cuda=False)
    with pytest.raises(ConfigError, match=r"quantised weights .* one device.*dpo computes its reference"):
        build({**asked, "quantize": "nf4", "lora_rank": 2, "task": "dpo"})


def test_engines_that_only_the_run_knows_of_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"fsdp: there is one process.*torchrun"):
        trainer(tmp_path, fsdp=True)
    args = SimpleNamespace(
        gradient_release=False, offload_state=False, gradient_sync="whole", fsdp=True, world_size=2, n_gpu=1
    )
    state = SimpleNamespace(distributed_type="MULTI_CPU", fsdp_plugin=SimpleNamespace(fsdp_version=1))
    run = SimpleNamespace(
        _strategy=create("mezo"),
        args=args,
        accelerator=SimpleNamespace(state=state),
        is_deepspeed_enabled=True,
        is_fsdp_enabled=True,
    )
    assert [problem.split(":")[0] for problem in engine_problems(run)] == ["deepspeed", "fsdp_version"]
    run.is_deepspeed_enabled = run.is_fsdp_enabled = False
    (ignored,) = engine_problems(run)  # accelerate shards nothing between processes on CPUs
    assert ignored.startswith("fsdp: accelerate shards between cards only, here it made MULTI_CPU of 2,")
    args.fsdp = False
    assert engine_problems(run) == []  # several processes exchange their losses
    args.world_size, args.n_gpu = 1, 2  # one process that would spread a batch over its devices
    assert [problem.split(";")[0] for problem in engine_problems(run)] == [
        "mezo: runs on one device for now, found 2"
    ]
    args.world_size, args.n_gpu = 2, 1
    run._strategy = create("galore")
    assert engine_problems(run) == []  # plain data parallelism
    run._strategy = create("badam")  # it knows what is trained once, and tensors take turns
    assert engine_problems(run)[0].startswith("badam: runs on one device for now, found 2")
    run._strategy = create("galore")
    args.gradient_release = True
    assert "runs on one device for now, found 2" in engine_problems(run)[0]
