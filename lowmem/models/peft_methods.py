"""Which small weights are trained in the place of all: LoRA by default, any method of PEFT by its name.

    --lora-rank 16                                    LoRA on every linear layer but the head
    --lora-rank 16 --adapter-args use_dora=true       with PEFT's own options (DoRA, rsLoRA, ...)
    --adapter ia3                                     another method, its options as PEFT names them
    --adapter vectorfit --adapter-args rank=0.5       our own, in PEFT's form: see `lowmem.models.vectorfit`

Values are read as YAML would; several of one option are joined by +, as in target_modules=q_proj+v_proj.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lowmem.errors import UserError, first_line, nearest

DECIDED = ("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


class Wanted(Protocol):
    """What a run says of its adapters; see `lowmem.config.RunConfig`."""

    @property
    def lora_rank(self) -> int | None: ...
    @property
    def lora_alpha(self) -> float | None: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def lora_targets(self) -> str: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def adapter_args(self) -> str: ...
    @property
    def task(self) -> str: ...


def adapter_config(config: Wanted) -> Any:
    """The PEFT configuration of a run, None where all weights are trained.

    Args:
        config: of the run.

    Raises:
        UserError: a method, an option or a value that PEFT does not know.
    """
    if not (config.lora_rank or config.adapter):
        return None
    kind = _method(config.adapter or "lora")
    known = {f.name for f in dataclasses.fields(kind) if f.init and f.name not in DECIDED}
    given = _lora(config) | parse_args(config.adapter_args)
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"adapter_args: {kind.__name__} has no {unknown[0]!r}; {nearest(unknown[0], known)}")
    kinds = typing.get_type_hints(kind)
    given |= {
        name: _typed(name, value, kinds[name]) for name, value in parse_args(config.adapter_args).items()
    }
    try:
        return kind(task_type="SEQ_CLS" if config.task == "reward" else "CAUSAL_LM", **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter_args: {kind.__name__} refuses {given}: {first_line(error)}") from error


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value as its option takes it: PEFT looks at none, and a text is true, and a list of its letters.

    Raises:
        UserError: it is of another kind.
    """
    if kind in (bool, int) and (
        isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float)
    ):
        word = "true or false" if kind is bool else "a number"
        raise UserError(f"adapter_args: {name} is {word}, got {value!r}")
    if isinstance(value, str) and _lists_alone(kind):
        return [value]
    return value


def _lists_alone(kind: Any) -> bool:
    """Whether an option takes a list and no text."""
    kinds = typing.get_args(kind) or (kind,)
    return str not in kinds and any(typing.get_origin(one) is list for one in (kind, *kinds))


@contextmanager
def attaching() -> Iterator[None]:
    """Within it, what PEFT has against putting adapters into a model is the user's to mend.

    Raises:
        UserError: targets that the model does not have, values that its layers do not take.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it has classes of its own, and reads values as it comes to them
        if not _is_of_peft(error):
            raise
        raise UserError(
            f"the adapter cannot be attached: {first_line(error)}; see lora_targets, adapter, adapter_args"
        ) from error


def _is_of_peft(error: BaseException) -> bool:
    """Whether an error was raised by PEFT or by what it called."""
    frame = error.__traceback__
    while frame is not None:
        if str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0] == "peft":
            return True
        frame = frame.tb_next
    return False


def parse_args(text: str) -> dict[str, Any]:
    """Options from one line.

    Raises:
        UserError: a part that is not name=value.

    Example:
        >>> parse_args("use_dora=true,target_modules=q_proj+v_proj,lora_alpha=16")
        {'use_dora': True, 'target_modules': ['q_proj', 'v_proj'], 'lora_alpha': 16}
    """
    import yaml

    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not (sign and name.strip() and value.strip()):
            raise UserError(f"adapter_args: {part!r} is not name=value")
        try:
            read = [yaml.safe_load(one) for one in value.split("+")]
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # no such day, thousands of digits
            raise UserError(f"adapter_args: {part!r} cannot be read: {first_line(error)}") from error
        found[name.strip()] = read if len(read) > 1 else read[0]
    return found


def _lora(config: Wanted) -> dict[str, Any]:
    """What the settings of LoRA say."""
    if not config.lora_rank:
        return {}
    targets = config.lora_targets
    return {
        "r": config.lora_rank,
        "lora_alpha": 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets if targets == "all-linear" else targets.split(","),
    }


def _method(name: str) -> type[Any]:
    """The configuration class of a method."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    from lowmem.models.vectorfit import register

    register()
    known = {str(kind.value).lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.lower() not in known:
        raise UserError(f"adapter: PEFT has no method {name!r}; {nearest(name.lower(), known)}")
    return known[name.lower()]
