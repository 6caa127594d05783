"""A model as it will be trained, built without weights under a fake-tensor mode.

Full fine-tuning, LoRA by peft's own code, and 4-bit bases by a stand-in for the quantized linear layer; see
`quantized`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.memory.trace import kernels, mixture, quantized
from lowmem.memory.trace.given import Given
from lowmem.memory.trace.quantized import Linear4bit
from lowmem.memory.trace.tasks import kinds
from lowmem.models.computing import attention
from lowmem.models.entries import skeleton
from lowmem.models.few_bit import keep_few_bits_
from lowmem.models.int8.convert import quantize_weights_
from lowmem.models.peft_methods import adapter_config, attaching
from lowmem.models.scoring import with_score


def build(config: Any, run: Run, mode: FakeTensorMode) -> nn.Module:
    """The trainable model, on fake tensors of `mode`.

    Args:
        config: a transformers configuration; copied.
        run: dtype, attention, adapters, checkpointing and loss.
        mode: an active fake-tensor mode.

    Raises:
        UserError: an architecture that cannot be planned, or options that exclude each other.
    """
    if isinstance(config, Given):
        return _as_it_is(config, run)
    config = copy.deepcopy(config)
    config.use_cache = False
    base: Any = skeleton(config, run.dtype, "fake", attention=attention_name(config, run), mode=mode)
    if run.rows == "packed":
        _attend_as_packed(base, run)
    if run.loss == "chunked":
        _chunk_loss(base, run)
    if run.quantize is not None:
        quantized.quantize(base, double=run.double_quant and run.adapts)
        if not run.adapts:  # scales that are trained are not quantized themselves
            quantized.train_scales(base)
    if run.weights is not None:
        quantize_weights_(base, run.weights, embeddings=run.int8_embeddings)
    base = _headed(base, run)
    if run.kbit_prepare:
        quantized.prepare_for_kbit_training(base)
    if run.few_bit:
        keep_few_bits_(base, run.few_bit)
    model = adapt(base, run) if run.adapts else base
    if run.gradient_checkpointing:
        _recompute(base)
        if run.adapts:
            base.enable_input_require_grads()
    return _stilled(model, run).train()


def _as_it_is(given: Given, run: Run) -> nn.Module:
    model = given.fake()
    if run.task == "reward":
        raise UserError("task reward makes a scoring model of a language model: plan it by the model's name")
    base = attention.base(model)
    if base.config._attn_implementation != "eager":
        base.set_attn_implementation("sdpa")
    if run.rows == "packed":
        _attend_as_packed(base, run)
    if run.loss == "chunked":
        _chunk_loss(base, run)
    if run.few_bit:
        keep_few_bits_(base, run.few_bit)
    if run.gradient_checkpointing and not given.options()["gradient_checkpointing"]:
        _recompute(base)
        if base is not model:
            base.enable_input_require_grads()
    return _stilled(model, run).train()


def _stilled(model: nn.Module, run: Run) -> nn.Module:
    """The model without dropout, where the task's trainer takes it out."""
    task = kinds.PLANNED.get(run.task)
    for module in model.modules():
        if task and task.stilled and isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _headed(model: Any, run: Run) -> Any:
    """The model with the head that its task trains."""
    if run.task != "reward":
        return model
    return with_score(model, SimpleNamespace(pad_token_id=0))


def _recompute(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def _chunk_loss(model: Any, run: Run) -> None:
    from trl.trainer.utils import add_fused_lm_head

    task = kinds.PLANNED.get(run.task)
    add_fused_lm_head(model, outputs=task.outputs if task else ("log_probs", "entropy", "is_top1"))


def attention_name(config: Any, run: Run) -> str | None:
    """The attention implementation to ask transformers for; None for its own choice: sdpa where it exists."""
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if run.attention == "eager" or softcapped else None  # no fused kernel takes a soft cap


def _attend_as_packed(model: Any, run: Run) -> None:
    """Choose the attention that training would choose for packed rows; refuse what it would refuse."""
    if problem := mixture.unpackable(model, "rows packed", "give --rows padded, and train with --no-packing"):
        raise UserError(problem)
    if attention.applies(model) and attention.reaches(model, run.longest or run.seq_len):
        model.set_attn_implementation(kernels.EXAMPLES)


def packing_problem(config: Any, run: Run) -> str:
    """Why `lowmem finetune` would not pack the rows of a planned model; "" where it does.

    Args:
        config: as for `build`; run: the options.
    """
    with warnings.catch_warnings(), FakeTensorMode() as mode:
        warnings.simplefilter("ignore")
        name = attention_name(config, run)
        model = skeleton(copy.deepcopy(config), run.dtype, "fake", attention=name, mode=mode)
        return mixture.unpackable(model, "packing", "plan with --rows padded")


def adapt(model: nn.Module, run: Run) -> nn.Module:
    """Attach adapters by peft's own code; methods other than LoRA keep the dtypes that it gives them."""
    from peft import get_peft_model

    method = adapter_config(run)
    if run.quantize:
        method._register_custom_module(quantized.adapter_layers())
    with _conversion_on_fake_tensors(), attaching():
        dtype: torch.dtype = getattr(torch, run.dtype_of_adapters)
        adapted: nn.Module = get_peft_model(model, method, autocast_adapter_dtype=dtype == torch.float32)
        if not run.lora_rank and run.adapter_dtype is None:
            return adapted
        for module in adapted.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad and p.dtype != dtype:
                    setattr(module, name, nn.Parameter(p.detach().to(dtype)))
    return adapted


@contextmanager
def _conversion_on_fake_tensors() -> Iterator[None]:
    """Modules are converted and copied without leaving their fake mode.

    `Module.to` swaps tensors under one and fails now and then: parameters are rebuilt instead. A copy of a
    module, which peft trains beside the adapters, would bring a copy of the mode along.
    """

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, fn)
        for name, p in list(module._parameters.items()):
            new: Tensor | None = None if p is None else fn(p.detach())
            if p is not None and new is not None and (new.dtype != p.dtype or new.device != p.device):
                module._parameters[name] = nn.Parameter(new, requires_grad=p.requires_grad)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = fn(b)
        return module

    one_mode = patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True)
    with patch.object(nn.Module, "_apply", apply), one_mode:
        yield


def count_parameters(model: nn.Module) -> int:
    """Logical elements: a packed 4-bit weight counts what it stands for."""
    four_bit = [m for m in model.modules() if isinstance(m, Linear4bit)]
    packed = {id(m.weight): m.in_features * m.out_features for m in four_bit}
    packed |= {id(m.absmax): 0 for m in four_bit}  # scales are of the same elements
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def depth(config: Any) -> int:
    """Number of decoder layers."""
    return int(config.num_hidden_layers)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, in order: the module list as long as the model is deep, or the longest."""
    config: Any = model.config
    lists: list[Any] = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [m for m in lists if len(m) == depth(config)]
    if not lists:
        raise UserError("its decoder layers were not found in the module tree")
    deepest: Any = max(found or lists, key=len)  # a model that was cut is shorter than it says
    return list(deepest)


def backbone(model: nn.Module) -> nn.Module:
    """The model below the head."""
    found: nn.Module = attention.base(model).base_model
    return found
