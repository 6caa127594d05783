"""Fine-tune a language model: the main job, top to bottom.

    config -> checks -> data -> model -> trainer -> loss and answers before -> training -> after -> results

Copy it (`lowmem cp finetune my.py`) and change what you like. It prints nothing: it reports to a
`Console` and returns a plain dictionary. In `config.output_dir` it leaves the model (safetensors) and
tokenizer, a model card, `memory_report.json` and `.html`, `loss.png` and `loss-dark.png`, `config.yaml`,
checkpoints that `resume` goes on from, and `zo_log.safetensors` of a run without gradients.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig, dump
from lowmem.console import Console
from lowmem.errors import UserError

MEASURED = ("held_out", "general", "benchmarks")
SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def finetune(config: RunConfig, progress: Console | None = None) -> dict[str, Any]:
    """Run one fine-tuning job.

    Args:
        config: every setting.
        progress: told what happens; silent when None.

    Returns:
        Plain values: held-out loss before and after, state bytes, peak, seconds, sample answers, ...

    Raises:
        UserError: whatever the user can mend, said before anything is written.
        KeyboardInterrupt: Ctrl-C; during training its checkpoint is saved first.
    """
    from lowmem.models.quiet import quiet, threads
    from lowmem.training.evaluation import refuse_ruined
    from lowmem.training.folder.output import begin, check_model_stays
    from lowmem.training.ranks.processes import claimed
    from lowmem.training.zeroth.usual import settled

    console = progress or Console()
    folder = config.output_path
    with quiet(), threads(config.threads), _closing(console):
        args = arguments(config)
        config = settled(config)
        console = console if args.should_save else Console()  # of several processes the first one speaks
        check_model_stays(folder, config.model, config.overwrite)
        with claimed(args, resume=config.resume, overwrite=config.overwrite) as (start, notes):
            for note in notes:
                console.say(note)
            trainer = prepare(config, args, console)
            trainer.resume_path(str(start) if start else None)  # refuses another run's before it is touched
            before = _measure(trainer, config, console, "before")
            refuse_ruined(trainer.model, config.model, before["loss"])
            resolved = dataclasses.replace(config, output_dir=str(folder), resume=False, overwrite=False)
            if args.should_save:
                begin(folder, dump(resolved), overwrite=config.overwrite)
            measured = _train(config, trainer, start, console)
            after = _measure(trainer, config, console, "after")
            result = _result(config, trainer, measured, before, after, start)
            _write(config, trainer, result, measured["profile"], console)
    return result


def arguments(config: RunConfig) -> Any:
    """The trainer's arguments; every problem of the strategy and its options shows here.

    Raises:
        ConfigError: naming each setting that is wrong or would be ignored.
    """
    import torch

    from lowmem.outside import bring
    from lowmem.training.arguments import trl_config
    from lowmem.training.folder.settings import checkpointing
    from lowmem.training.tasks import options, refuse
    from lowmem.training.zeroth.usual import settled

    bring(config.plugin)
    cuda = torch.cuda.is_available()
    refuse(config, cuda=cuda)
    common = {
        "output_dir": str(config.output_path),
        "optim": config.optim,
        "optim_args": config.optim_args or None,
        "learning_rate": settled(config).lr,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.eps,
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": SCHEDULES.get(config.schedule, config.schedule),
        "warmup_steps": config.warmup,
        "max_grad_norm": config.max_grad_norm,
        "clip": config.clip,
        "compile": config.compile,
        "gradient_release": config.gradient_release,
        "offload_state": config.offload_state,
        checkpointing(): config.gradient_checkpointing,
        "max_steps": config.steps or -1,
        "num_train_epochs": config.epochs or 1.0,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "seed": config.seed,
        "nonfinite_limit": config.nonfinite_limit,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "include_num_input_tokens_seen": "no" if config.task in ("orpo", "grpo") else "all",
        "neftune_noise_alpha": config.neftune,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "bf16": config.autocast == "bfloat16",  # by default weights are in `dtype` and nothing is cast
        "fp16": config.autocast == "float16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "fsdp": config.fsdp or None,
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"} if config.fsdp else None,
        "report_to": config.report_to,
        "disable_tqdm": True,
    }
    return trl_config(config.task)(**{**common, **options(config)})


def prepare(config: RunConfig, args: Any, console: Console) -> Any:
    """Load data and model and put the trainer together; nothing has been trained or written yet."""
    from lowmem.data.mix import mixed
    from lowmem.data.rows.template import check_template
    from lowmem.models.adapters import published_name
    from lowmem.models.peft_methods import adapter_config, attaching
    from lowmem.training import tasks
    from lowmem.training.callbacks import Peak, Report, replace_printers
    from lowmem.training.folder.settings import content, origin

    console.start("load")
    given: dict[str, Any] = {"data_format": config.data_format, "columns": config.column_names}
    parts = mixed(
        config.data, config.eval_data, rows=config.eval_rows, seed=config.seed, task=config.task, **given
    )
    for part in parts:
        console.say(part.summary())
    model, tokenizer = _model(config)
    if any(part.conversational for part in parts):
        check_template(model, tokenizer, console)
    rest = {"peft_config": adapter_config(config), "callbacks": [Report(console), Peak()]}
    with attaching():
        if config.task == "sft" and not config.objective:
            trainer = tasks.supervised(args, model, parts, tokenizer, console, **rest)
        else:
            trainer = tasks.make(config, args, model, parts, tokenizer, console, **rest)
    replace_printers(trainer)
    trainer.tell, trainer.origin = console.say, origin(config) | content(*(part.rows for part in parts))
    trainer.base, trainer.keep_int8 = published_name(config.model), config.keep_int8
    if config.schedule == "wsd":
        args.lr_scheduler_kwargs = {"num_decay_steps": config.decay or max(1, trainer.planned_steps() // 10)}
    console.finish()
    return trainer


def _model(config: RunConfig) -> tuple[Any, Any]:
    """Model and tokenizer, the weights quantised where the configuration says so."""
    from lowmem.models.few_bit import keep_few_bits_
    from lowmem.models.int8.loading import load_int8
    from lowmem.models.loading import load_model, nf4

    if config.weights:
        model, tokenizer = load_int8(config.model, config.dtype, embeddings=config.int8_embeddings)
    else:  # scales that are trained are not quantized themselves
        config_of = nf4(config.dtype, double=config.adapts) if config.quantize else None
        quantized = {"quantization_config": config_of} if config_of else {}
        model, tokenizer = load_model(config.model, config.dtype, **quantized)
    if config.few_bit:
        keep_few_bits_(model, config.few_bit)
    return model, tokenizer


def _measure(trainer: Any, config: RunConfig, console: Console, when: str) -> dict[str, Any]:
    """What the held-out rows say, the answers to the prompts; where asked, general text and benchmarks."""
    from lowmem.training.evaluation import answers, held_out, measuring
    from lowmem.training.general import general_loss, scores

    console.start(f"evaluate {when}", len(trainer.get_eval_dataloader()))
    found = held_out(trainer, console)
    console.finish()
    with measuring(trainer):
        said = answers(trainer.model, trainer.processing_class, config.prompt, tell=console.say)
    general = general_loss(trainer) if config.forgetting else None
    benchmarks = scores(trainer, config.eval)
    return {
        "loss": found.get("loss"), "held_out": found, "answers": said, "general": general,
        "benchmarks": benchmarks,
    }  # fmt: skip


def _train(config: RunConfig, trainer: Any, start: Path | None, console: Console) -> dict[str, Any]:
    """Train under the profiler; Ctrl-C leaves a checkpoint."""
    from lowmem.memory.measure.profile import Profiler
    from lowmem.memory.predict import of_run
    from lowmem.training.callbacks import Peak
    from lowmem.training.evaluation import HeldOut, go_back_to_best

    if config.eval_steps:
        trainer.add_callback(HeldOut(trainer, config.eval_steps, config.early_stopping, config.keep_best))
    profiler = Profiler(of_run(config), config.model, _run(config), folder=config.output_path)
    measured = config.report and trainer.args.world_size == 1
    if config.report and not measured:
        console.say("several processes: memory is not measured, `lowmem plan` says what one holds")
    console.start("train", config.steps)
    began = time.perf_counter()
    try:
        with ExitStack() as stack:
            if measured:
                stack.enter_context(profiler.on(trainer))
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except KeyboardInterrupt as stopped:
        said = str(stopped) or "stopped at once, nothing more was saved"
        console.say(f"{said}; `lowmem finetune --resume --output-dir {config.output_path}` goes on")
        raise
    seconds = time.perf_counter() - began
    console.finish()
    if config.keep_best and (best := go_back_to_best(trainer)):
        console.say(f"the weights are those of {best}, the best evaluation")
    (peak,) = (c.bytes for c in trainer.callback_handler.callbacks if isinstance(c, Peak))
    return {
        "seconds": seconds,
        "peak": peak,
        "profile": _profile(profiler, console) if measured else None,
    }


def _run(config: RunConfig) -> dict[str, Any]:
    """The settings that memory depends on, for the report."""
    names = ("batch_size", "seq_len", "dtype", "packing", "gradient_checkpointing", "gradient_release")
    more = ("accumulation", "lora_rank", "quantize", "weights")
    return {name: getattr(config, name) for name in (*names, *more)}


def _profile(profiler: Any, console: Console) -> dict[str, Any] | None:
    """The profile as plain values; None where no step was left to measure."""
    from lowmem.report.document import plain

    try:
        found: dict[str, Any] = plain(profiler.result().to_dict())
    except UserError:
        return None
    except Exception as error:  # the model is trained: a report that fails must not lose it
        console.say(f"no memory report, please tell us: {type(error).__name__}: {error}")
        return None
    return found


def _result(
    config: RunConfig,
    trainer: Any,
    measured: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    start: Path | None,
) -> dict[str, Any]:
    """Everything worth knowing about the run, as plain values."""
    from lowmem.memory.count import model_state_bytes
    from lowmem.strategies import create
    from lowmem.training.folder.saving import nonfinite_weights

    with trainer.evaluated():
        ruined = nonfinite_weights(trainer.model)
    answered = zip(config.prompt, before["answers"], after["answers"], strict=True)
    ranks = trainer.args.world_size if trainer.is_fsdp_enabled else 1
    adamw = {
        dtype: model_state_bytes(create("adamw", states=dtype), trainer.model, ranks=ranks)
        for dtype in ("fp32", "bf16")
    }
    return {
        "model": config.model,
        "strategy": config.optim,
        "options": dict(trainer.args.strategy().options),
        "data": trainer.data_summary,
        "task": config.task,
        "loss": {"before": before["loss"], "after": after["loss"]},
        **{name: {"before": before[name], "after": after[name]} for name in MEASURED},
        "steps": trainer.state.global_step,
        "resumed_from": start.name if start else None,
        "seconds": measured["seconds"],
        "state_bytes": trainer.lowmem_optimizer.state_bytes(),
        "nonfinite_elements": trainer.nonfinite(),
        "nonfinite_weights": ruined,
        "adamw_state_bytes": adamw,
        "peak_bytes": measured["peak"],
        "samples": [{"prompt": p, "before": b, "after": a} for p, b, a in answered],
        "output_dir": str(config.output_path),
    }


def _write(
    config: RunConfig, trainer: Any, result: dict[str, Any], profile: dict[str, Any] | None, console: Console
) -> None:
    """Model, tokenizer, card, picture and reports: made beside, and there when all of them are."""
    from lowmem import report
    from lowmem.training.card import card
    from lowmem.training.folder.document import document, history
    from lowmem.training.folder.output import earlier_report, results
    from lowmem.training.plot import DARK, loss_curve

    console.start("write")
    if not trainer.args.should_save:
        trainer.save_model()  # its rows, which the first process writes
        return
    folder = config.output_path
    profile = profile or earlier_report(folder, result["steps"])  # a finished run has no step left to measure
    of_results = {key: result[key] for key in ("strategy", "steps", "nonfinite_weights")}
    with results(folder, of_results) as made:
        trainer.save_model(str(made))
        trainer.save_log(made)
        text = card(config, result, profile, trainer.base)
        (made / "README.md").write_text(text, encoding="utf-8")
        losses = history(result, trainer.state.log_history)
        title = f"{result['model']}, {result['strategy']}"
        loss_curve(losses, title, made / "loss.png")
        loss_curve(losses, title, made / "loss-dark.png", DARK)
        found = document(config, trainer, result, profile)
        text = json.dumps(found, indent=1, allow_nan=False)
        (made / "memory_report.json").write_text(text, encoding="utf-8")
        report.write(found, made / "memory_report.html")
    console.finish()


@contextmanager
def _closing(console: Console) -> Iterator[None]:
    """Close the open stage whatever happens."""
    try:
        yield
    finally:
        console.finish()


if __name__ == "__main__":
    import importlib

    importlib.import_module("lowmem.recipes").main(finetune)
