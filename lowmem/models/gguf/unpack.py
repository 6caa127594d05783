"""From a GGUF file to a folder of safetensors, through transformers.

What is slow there is the vocabulary: its hundred thousand words are sliced out of the
mapped file one by one, and turned into text each time that transformers reads the file for
its configuration or its tensors, three times in all. Here the file is read once, as plain
memory, and the words are given to the tokenizer alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from lowmem.models.quiet import quiet

WORDS = {f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")}


def unpack(source: Path, out: Path) -> None:
    """Save the model of a GGUF file in bf16, and its tokenizer.

    Args:
        source: the file; out: the folder to write.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger(__name__).info("unpacking %s once", source.name)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    with quiet(), _no_bar(), _read_once(), torch.random.fork_rng(devices=[]):
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # packed weights, the default, cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        vars(model.config).pop("_model_name_or_path", None)  # the file's own name for it misleads
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    for path in (out, *out.iterdir()):  # safetensors come out readable by their owner only
        path.chmod(0o755 if path.is_dir() else 0o644)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Parse a file once, without the words; transformers lists the names of tensors for every module."""
    import gguf

    class Reader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            super().__init__(path)
            for name in WORDS & self.fields.keys():
                del self.fields[name]

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)  # ten times as quick to slice as numpy's map of a file

    reader, names = functools.cache(Reader), functools.cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", reader), patch.object(gguf, "get_tensor_name_map", names):
        yield


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Hide the one bar that no switch of transformers turns off."""
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with patch.object(module, "tqdm", lambda items, **_: items):
        yield
