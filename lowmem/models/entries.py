"""Which model is meant, and its shape without its weights.

A name of `configs/models/*.yaml` carries the published architecture, so planning it
needs no network; a folder is read from its config.json; `owner/name` is asked of the
Hub. All three become the same `ModelEntry`, and `skeleton` builds the very module
that training will use, on meta or as fake tensors: what is counted is what runs.

Left out, with the reason said: mixtures of experts but those whose experts are known to
lie in stacks (`MIXTURES`), vision and audio towers, encoder-decoders, code that lives on
the Hub, and weights that are already quantized.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem.errors import UserError, first_line, nearest
from lowmem.models import hub
from lowmem.texts import read_json

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import PretrainedConfig, PreTrainedModel

Source = Literal["yaml", "path", "hub"]

_TOWERS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "speech_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_attention_heads", "n_head"), 10_000),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "vocab_size"), 2**24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31),
}  # field -> what is far beyond the largest models
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
"""Mixtures whose experts are (E, m, n) tensors, one product for each stack: counted and stepped as such."""

_CAUSAL = ("gpt_neox", "gpt_neox_japanese", "trocr")  # whatever their is_decoder says
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be planned and trained.

    Attributes:
        name: what to call it in reports.
        source: where its architecture comes from.
        location: Hub id (yaml, hub) or folder (path): where its weights come from.
        parameters: published count, tied weights once; None where nobody stated it.
        architecture: fields of config.json for a yaml entry, else None.
    """

    name: str
    source: Source
    location: str
    parameters: int | None = None
    architecture: Mapping[str, Any] | None = None

    @property
    def hub_id(self) -> str | None:
        """The Hub id, None for a folder."""
        return None if self.source == "path" else self.location

    def config(self) -> PretrainedConfig:
        """Build the model's configuration; a Hub id is fetched now, not before.

        Raises:
            UserError: unreadable, unreachable, or an architecture that lowmem does not train.
        """
        if self.source == "yaml":
            fields = dict(self.architecture or {})
        elif self.source == "path":
            fields = _read_config(Path(self.location))
        else:
            fields = hub.config_dict(self.location)
        return build_config(fields, self.name)


@functools.cache
def available_models() -> Mapping[str, ModelEntry]:
    """Every model of `configs/models/*.yaml` by name, in alphabetical order.

    Example:
        >>> available_models()["gpt2"].parameters
        124439808
    """
    import yaml

    entries: dict[str, ModelEntry] = {}
    for file in resources.files("lowmem.configs").joinpath("models").iterdir():
        if file.name.endswith(".yaml"):
            for name, fields in yaml.safe_load(file.read_text(encoding="utf-8")).items():
                entries[name] = ModelEntry(
                    name, "yaml", fields["hub_id"], fields["parameters"], fields["config"]
                )
    return dict(sorted(entries.items()))


def resolve(name_or_path: str) -> ModelEntry:
    """Find a model by name, folder or Hub id; nothing is downloaded.

    A name of the list wins over a folder of the same name: `./gpt2` is the folder.

    Args:
        name_or_path: `smollm2-135m`, `./my-model`, `Qwen/Qwen2.5-0.5B`.

    Raises:
        UserError: nothing of the three; the message has the nearest name and the ways out.

    Example:
        >>> resolve("Qwen/Qwen2.5-0.5B").name
        'qwen2.5-0.5b'
    """
    text = str(name_or_path)
    entries = available_models()
    if text.lower() in entries:
        return entries[text.lower()]
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelEntry(path.resolve().name, "path", str(path))
    if path.is_file():
        raise UserError(f"{text} is a file: give the folder that holds config.json and the weights")
    for entry in entries.values():
        if entry.location.lower() == text.lower():
            return entry
    if _HUB_ID.fullmatch(text):
        return ModelEntry(text, "hub", text)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"no such folder: {text}; give a folder with config.json, a Hub id or a listed name")
    raise UserError(
        f"no model {text!r}: give a listed name, a folder or a Hub id (owner/name); {nearest(text, entries)}"
    )


def build_config(fields: Mapping[str, Any], name: str = "this model") -> PretrainedConfig:
    """Turn the fields of a config.json into a configuration of a class that transformers ships.

    Raises:
        UserError: an architecture that lowmem does not train, with the reason.
    """
    from transformers import CONFIG_MAPPING

    model_type = str(fields.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        raise UserError(_unknown_type(fields, model_type, name))
    _check_sizes(fields, name)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(fields))
        check_supported(config, name)
    except UserError:
        raise
    except Exception as error:  # each architecture checks its fields in its own way, or trips over them
        raise UserError(f"{name}: its config.json does not describe a model: {first_line(error)}") from error
    return config


def _check_sizes(fields: Mapping[str, Any], name: str) -> None:
    """Refuse sizes that no model has, before somebody counts to them.

    Raises:
        UserError: a size that is no whole number, below 1, or far beyond the largest models.
    """
    for key, most in _SIZES.items():
        size = fields.get(key)
        if size is None or isinstance(size, list):  # some architectures have one for each layer
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= most:
            shown = str(size)[:40] if not isinstance(size, str) else repr(size[:40])
            raise UserError(
                f"{name}: its config.json says {key} {shown}; it must be a number from 1 to {most:,}"
            )


def check_supported(config: PretrainedConfig, name: str = "this model") -> None:
    """Refuse what lowmem neither plans nor trains.

    Raises:
        UserError: another mixture of experts, a tower, an encoder, no causal head, quantized weights.
    """
    reason = _refusal(config)
    if reason:
        raise UserError(
            f"{name} ({config.model_type}) {reason}; lowmem plans and trains text-only causal language "
            f"models, dense ones and mixtures of the kinds {', '.join(MIXTURES)}: `lowmem models` lists some"
        )


def skeleton(
    entry_or_config: ModelEntry | PretrainedConfig,
    dtype: torch.dtype | str = "bfloat16",
    device: Literal["meta", "fake"] = "meta",
    *,
    attention: str | None = None,
    mode: FakeTensorMode | None = None,
) -> PreTrainedModel:
    """Build the causal language model without its weights: a 70B model in a second and no memory.

    Args:
        entry_or_config: what `resolve` returned, or a configuration.
        dtype: of the weights.
        device: "meta" (shapes only) or "fake" (CPU tensors of a FakeTensorMode, for tracing).
        attention: implementation of transformers; default: the one it would train with (sdpa where the
            architecture has it, eager for Gemma 2, whose soft-capping sdpa cannot do).
        mode: the FakeTensorMode to build in; default: a new one, found at `parameter.fake_mode`.

    Raises:
        UserError: an architecture that lowmem does not train.

    Example:
        >>> parameter_count(skeleton(resolve("llama-2-70b")))
        68976648192
    """
    from transformers import AutoModelForCausalLM

    given = entry_or_config.config() if isinstance(entry_or_config, ModelEntry) else entry_or_config
    check_supported(given)
    config = copy.deepcopy(given)  # transformers notes the dtype in it
    weights = to_dtype(dtype)
    try:
        with _without_storage(device, mode):
            # dtype at construction: Module.to() swaps tensors, which fake tensors do not survive
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=weights, attn_implementation=attention
            )
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        kind = config.model_type
        raise UserError(f"no {kind} model can be built of this configuration: {first_line(e)}") from e
    return model


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters; tied weights count once."""
    return sum(p.numel() for p in model.parameters())


def trainable_count(model: torch.nn.Module) -> int:
    """Number of parameters that are trained; tied weights count once."""
    from lowmem.optim.tensors.marks import trains

    return sum(p.numel() for p in model.parameters() if trains(p))


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from its name: bfloat16, float16, float32 (or bf16, fp16, fp32).

    Raises:
        UserError: any other name.
    """
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    short = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if isinstance(dtype, torch.dtype):
        return dtype
    known = names | short
    if dtype not in known:
        raise UserError(f"no dtype {dtype!r}: {nearest(dtype, known)}")
    return known[dtype]


@contextlib.contextmanager
def _without_storage(device: str, mode: FakeTensorMode | None) -> Iterator[None]:
    """Within it, new tensors have shapes and no memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if device == "meta":
        with torch.device("meta"):
            yield
    elif device == "fake":
        with mode or FakeTensorMode():
            yield
    else:
        raise UserError(f"no device {device!r} for a skeleton: {nearest(device, ['meta', 'fake'])}")


def _read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a local model."""
    file = folder / "config.json"
    if not file.is_file():
        adapter = " (it holds an adapter: `lowmem merge` makes a model of it)" if _is_adapter(folder) else ""
        raise UserError(f"{folder} has no config.json{adapter}: give a folder made by save_pretrained")
    return read_json(file)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _unknown_type(fields: Mapping[str, Any], model_type: str, name: str) -> str:
    """Why a config.json names no architecture of the installed transformers."""
    from transformers import __version__

    if "auto_map" in fields:
        return f"{name} needs code from its repository (auto_map), which lowmem does not run"
    if not model_type:
        return f"{name}: its config.json has no model_type; give a model saved by transformers"
    return f"{name}: transformers {__version__} has no architecture {model_type!r}; a newer one may"


def _refusal(config: PretrainedConfig) -> str | None:
    """The reason why a configuration is refused, None if it is not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    tower = next((key for key in _TOWERS if getattr(config, key, None) is not None), None)
    dense = getattr(config, "is_moe", None) is False
    experts = 0 if dense else max(_number(getattr(config, key, None)) for key in _EXPERTS)
    if tower:
        return f"has a tower beside its language model ({tower})"
    mixed = experts > 1 or "moe" in config.model_type or hasattr(config, "ffn_config")
    if mixed and config.model_type not in MIXTURES:
        return f"is a mixture of {experts if experts > 1 else 'several'} experts"
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if config.get_text_config() is not config:
        return "is a language model inside a larger one (text_config)"
    both_ways = getattr(config, "is_decoder", None) is False and config.model_type not in _CAUSAL
    if both_ways or getattr(config, "causal", None) is False:
        return "reads in both directions (is_decoder is false in its configuration)"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "has no causal language model head in transformers"
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else "some format"
        return f"has weights already quantized ({kind}), which full fine-tuning cannot update"
    return None


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
