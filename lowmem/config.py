"""One fine-tuning run as data: RunConfig <-> YAML <-> command-line flags.

A knob is declared once, as a field of `RunConfig` with its help, allowed values and
range; YAML keys, flags, checks and the commented dump are derived from that declaration,
so they cannot drift apart. `--lr 1e-4` and `lr: 1e-4` go through the same parser.

Every problem of a configuration is reported at once, in one `ConfigError`, before
anything heavy is imported. What needs the registry of strategies is checked by a function
that the caller passes in, since this module imports nothing but the errors.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowmem import combinations
from lowmem.errors import ConfigError, UserError, nearest
from lowmem.texts import parse_yaml
from lowmem.values import bracketed, convert

__all__ = ["Check", "RunConfig", "build", "dump", "from_flags", "load", "read"]

Check = Callable[[Mapping[str, Any]], Iterable[str]]  # values by name -> problems


def _knob(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    several: str = "",
) -> Any:
    """A field with what its flag, its YAML key and its check need to know."""
    limits = {"least": least, "above": above, "below": below, "several": several}
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, **limits})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one fine-tuning run; the fields are the flags of `lowmem finetune`.

    Raises:
        ConfigError: naming every value out of range and every impossible combination.

    Example:
        >>> RunConfig(model="smollm2-135m", optim="galore", optim_args="rank=128", lr=5e-4).lr
        0.0005
    """

    task: str = _knob(
        "sft",
        "Task",
        "learn answers (sft), the right candidate (classify), preferences (dpo, orpo), judgements (kto), "
        "scores (reward), by reward (grpo)",
        choices=("sft", "classify", "dpo", "kto", "orpo", "reward", "grpo"),
    )
    beta: float | None = _knob(
        None, "Task", "pull towards the reference (dpo, kto, grpo), weight of the odds (orpo)", least=0
    )
    reward: str | None = _knob(None, "Task", "what grpo rewards: module:function or file.py:function")
    objective: str | None = _knob(
        None,
        "Task",
        "what a strategy without gradients raises of answers (sft, classify): accuracy, f1, or "
        "module:function or file.py:function",
    )
    num_generations: int | None = _knob(None, "Task", "answers per prompt of grpo (8)", least=2)
    max_completion: int | None = _knob(
        None, "Task", "tokens of an answer of grpo (256) or of an objective (32)", least=1
    )

    model: str = _knob(MISSING, "Model", "name (see `lowmem models`), local path or Hub id")
    dtype: str = _knob("bfloat16", "Model", "of the weights", choices=("bfloat16", "float16", "float32"))
    autocast: str = _knob(
        "none",
        "Model",
        "compute in it over float32 weights or under adapters; float16 scales the loss",
        choices=("none", "bfloat16", "float16"),
    )
    lora_rank: int | None = _knob(
        None, "Model", "train LoRA adapters of this rank only", least=1, below=2**16
    )
    lora_alpha: float | None = _knob(None, "Model", "scale of LoRA; twice the rank when not given", above=0)
    lora_dropout: float = _knob(0.0, "Model", "share of the adapters' inputs left out", least=0, below=1)
    lora_targets: str = _knob("all-linear", "Model", "layers that get LoRA, as in q_proj,v_proj")
    adapter: str | None = _knob(None, "Model", "another method: vectorfit, or PEFT's, such as ia3")
    adapter_args: str = _knob("", "Model", "options of PEFT's method, as in use_dora=true")
    quantize: str | None = _knob(
        None, "Model", "quantise the frozen weights under LoRA adapters", choices=("nf4",)
    )
    weights: str | None = _knob(
        None, "Model", "hold the weights that train as codes of one byte", choices=("int8",)
    )
    int8_embeddings: bool = _knob(False, "Model", "embedding and head as int8 codes too")

    data: str = _knob(
        "factbook",
        "Data",
        "file, folder, Hub id, or the demo data 'factbook'; can be repeated, NAME=2 is seen twice as often",
        several=" + ",
    )
    data_format: str | None = _knob(None, "Data", "format of the rows; recognised when not given")
    columns: str = _knob("", "Data", "what fields are called in the rows: prompt=question,completion=answer")
    eval_data: str | None = _knob(None, "Data", "held-out rows; a part of the data when not given")
    eval_rows: int = _knob(80, "Data", "most held-out rows to evaluate on", least=1)
    seq_len: int = _knob(512, "Data", "tokens per row, longer ones are cut", least=2, below=2**24)
    packing: bool = _knob(True, "Data", "fill each row of seq_len tokens with several examples (sft)")

    optim: str = _knob(
        MISSING, "Optimizer", "strategy (see `lowmem strategies`), or module:factory of your own"
    )
    plugin: str = _knob(
        "",
        "Optimizer",
        "module or file of your own that brings strategies or parts; can be repeated",
        several=",",
    )
    optim_args: str = _knob("", "Optimizer", "options of the strategy, as in rank=128,states=int8")
    lr: float | None = _knob(
        None,
        "Optimizer",
        "peak learning rate; when not given 1e-4, or what suits the model's size without gradients",
        least=0,
    )
    betas: tuple[float, float] = _knob(
        (0.9, 0.999), "Optimizer", "decay rates of the moments", least=0, below=1
    )
    eps: float = _knob(1e-8, "Optimizer", "added to the denominator of the step", above=0)
    weight_decay: float = _knob(0.0, "Optimizer", "decoupled weight decay", least=0)
    schedule: str = _knob(
        "linear",
        "Optimizer",
        "how lr falls after the warm-up",
        choices=("linear", "cosine", "constant", "wsd"),
    )
    decay: int | None = _knob(
        None, "Optimizer", "steps over which lr falls at the end of wsd; a tenth when not given", least=1
    )
    warmup: int = _knob(0, "Optimizer", "steps over which lr rises from 0", least=0)
    max_grad_norm: float = _knob(1.0, "Optimizer", "norm to clip gradients to", above=0)
    clip: str = _knob(
        "auto",
        "Optimizer",
        "clip all gradients together, each tensor, or by the norm of the step before; "
        "auto is global, previous with gradient_release, none without gradients",
        choices=("auto", "none", "global", "tensor", "previous"),
    )
    compile: str = _knob(
        "auto", "Optimizer", "compile the step; auto where it pays", choices=("auto", "on", "off")
    )

    neftune: float | None = _knob(None, "Optimizer", "noise on the embeddings (NEFTune's alpha)", above=0)

    gradient_checkpointing: bool = _knob(False, "Memory", "recompute activations in the backward pass")
    activation_offload: bool = _knob(
        False, "Memory", "move activations to host memory until the backward pass (GPU)"
    )
    few_bit: int | None = _knob(
        None, "Memory", "bits that activation functions keep for the backward pass (1 to 4)", least=1, below=5
    )
    gradient_release: bool = _knob(False, "Memory", "step each tensor inside backward and free its gradient")
    offload_state: bool = _knob(False, "Memory", "keep optimizer state in host memory between steps (GPU)")
    fsdp: bool = _knob(False, "Memory", "spread weights over the processes of torchrun (FSDP2)")

    steps: int | None = _knob(None, "Run", "optimizer steps; one epoch when neither is given", least=1)
    epochs: float | None = _knob(None, "Run", "passes over the data, instead of steps", above=0, below=1e6)
    batch_size: int = _knob(1, "Run", "rows per forward pass", least=1, below=2**20)
    accumulation: int = _knob(1, "Run", "forward passes per optimizer step", least=1)
    seed: int = _knob(0, "Run", "seed of everything random", least=0, below=2**32)
    nonfinite_limit: int = _knob(5, "Run", "end after so many losses that are not finite; 0 never", least=0)
    threads: int | None = _knob(None, "Run", "CPU threads; torch decides when not given", least=1, below=1025)

    output_dir: str | None = _knob(None, "Output", "folder to write; outputs/MODEL-OPTIM when not given")
    resume: bool = _knob(False, "Output", "go on from the newest whole checkpoint in output_dir")
    overwrite: bool = _knob(False, "Output", "replace what an earlier run left in output_dir")
    save_steps: int = _knob(100, "Output", "steps between checkpoints", least=1)
    save_total_limit: int = _knob(2, "Output", "checkpoints to keep", least=1)
    eval_steps: int | None = _knob(
        None, "Output", "steps between evaluations; before and after only when not given", least=1
    )
    forgetting: bool = _knob(False, "Output", "also measure the loss on general text, before and after")
    eval: str = _knob(
        "", "Output", "benchmarks before and after, as in lm_eval:arc_easy (lm-evaluation-harness)"
    )
    keep_best: bool = _knob(False, "Output", "end with the weights of the best evaluation")
    early_stopping: int | None = _knob(
        None, "Output", "end after so many evaluations without a better one", least=1
    )
    report_to: str = _knob(
        "none",
        "Output",
        "where losses are logged",
        choices=("none", "tensorboard", "wandb", "mlflow", "trackio"),
    )
    logging_steps: int = _knob(5, "Output", "steps between logged losses", least=1)
    prompt: tuple[str, ...] = _knob(
        (), "Output", "answer this before and after; can be repeated, '' for none"
    )
    keep_int8: bool = _knob(False, "Output", "write int8 codes at the end instead of weights in dtype")
    report: bool = _knob(True, "Output", "measure memory during the run, for its page memory_report.*")

    def __post_init__(self) -> None:
        """Check values and combinations; keep each in its declared type."""
        values, problems = _parse({f.name: getattr(self, f.name) for f in fields(self)})
        problems += combinations.problems(values)
        if problems:
            raise ConfigError(problems)
        values["prompt"] = tuple(text for text in values["prompt"] if text.strip())  # "" asks nothing
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained and the model's own weights stay."""
        return bool(self.lora_rank or self.adapter)

    @property
    def column_names(self) -> dict[str, str]:
        """`columns` as a mapping, field of a format to column of the rows."""
        return dict(pair.split("=", 1) for pair in self.columns.split(",") if pair)

    @property
    def output_path(self) -> Path:
        """Folder of the run's results."""
        return Path(self.output_dir) if self.output_dir else default_output(self.model, self.optim)


def default_output(model: str, optim: str) -> Path:
    """Where a run leaves its results when no folder is named."""
    plain = re.sub(r"[^-.+\w]+", "-", optim)  # module:factory, or a file's path
    return Path("outputs") / f"{Path(model).name}-{plain}".lower()


def read(path: str | Path) -> dict[str, Any]:
    """Values of a YAML file by key, not yet checked.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key or is not a mapping.
    """
    try:
        values, keys = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read config {str(path)!r}: {reason}") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{path} sets {', '.join(repeated)} more than once; keep one line of each")
    return values


def load(path: str | Path, check: Check | None = None) -> RunConfig:
    """The run that a YAML file describes.

    Args:
        path: file with a mapping of field names to values.
        check: further problems of the values, such as options unknown to the strategy.
    """
    return build(read(path), check)


def from_flags(
    flags: Mapping[str, Any], base: str | Path | Mapping[str, Any] | None = None, check: Check | None = None
) -> RunConfig:
    """The run that command-line flags describe.

    Args:
        flags: value by field name; None means not given.
        base: YAML file, or values read from one, that hold where no flag is given.
        check: as in `load`.
    """
    under = dict(base) if isinstance(base, Mapping) else read(base) if base is not None else {}
    given = bracketed({name: value for name, value in flags.items() if value is not None})[0]
    for one, other in (("steps", "epochs"), ("epochs", "steps")):  # --epochs replaces the file's steps
        if one in given:
            under.pop(other, None)
    return build({**under, **given}, check)


def build(values: Mapping[str, Any], check: Check | None = None) -> RunConfig:
    """A run from values by field name, each as YAML or a flag gives it.

    Raises:
        ConfigError: with every problem of every value.

    Example:
        >>> build({"model": "gpt2", "optim": "adamw", "lr": "3e-5"}).lr
        3e-05
    """
    parsed, problems = _parse(values)
    problems += combinations.problems(parsed)
    if check is not None:
        problems += check(parsed)
    if problems:
        raise ConfigError(problems)
    return RunConfig(**parsed)


def dump(config: RunConfig) -> str:
    """YAML text of a run, with a comment at each knob; `load` gives the same run back."""
    import yaml

    lines = ["# lowmem finetune --config THIS_FILE"]
    group = ""
    for f in fields(config):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"]
        value = getattr(config, f.name)
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump([plain], default_flow_style=True, allow_unicode=True, width=10**6).strip()
        lines.append(f"{f.name}: {text[1:-1]}  # {_hint(f)}")
    return "\n".join(lines) + "\n"


def _hint(f: dataclasses.Field[Any]) -> str:
    choices = f.metadata["choices"]
    return f"{f.metadata['help']}: {' | '.join(choices)}" if choices else str(f.metadata["help"])


def _parse(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Typed values of all fields (the default where one is missing or wrong) and the problems."""
    known = {f.name: f for f in fields(RunConfig)}
    hints = typing.get_type_hints(RunConfig)
    problems = [f"unknown setting {k!r}; {nearest(k, known)}" for k in values if k not in known]
    parsed: dict[str, Any] = {}
    values, more = bracketed(values)
    problems += more
    for name, f in known.items():
        parsed[name] = "" if f.default is MISSING else f.default
        if name not in values and f.default is MISSING:
            problems.append(f"{name} is missing: {f.metadata['help']}; give --{name} or '{name}:' in YAML")
        elif name in values:
            try:
                parsed[name] = convert(values[name], hints[name], f.metadata)
            except ValueError as error:
                problems.append(f"{name}: {error}")
    return parsed, problems
