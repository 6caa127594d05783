"""A tensor is what it is, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, LlamaConfig

import lowmem
from lowmem.optim.tensors import heads, roles

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch.compile imports it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
]


class Head(nn.Module):
    """A model that says what its head is."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.wte(ids)))


def found(model: nn.Module) -> dict[str, str]:
    """The role of each trainable parameter in an optimizer."""
    optimizer = lowmem.optimizer(model, "galore", rank=2)
    return {place.name: place.role for place in optimizer.roster.places.values()}


PLAIN = {"wte.weight": "embedding", "out.weight": "head", "out.bias": "vector", "hidden.weight": "matrix"}


def test_a_model_says_what_its_head_is() -> None:
    assert found(Head()) == PLAIN | {"hidden.bias": "vector"}
    places = lowmem.optimizer(Head(), "galore").roster.places.values()
    assert {place.rule for place in places if place.name.endswith("bias")} == {"other"}


@pytest.mark.parametrize("name", roles.HEADS)
def test_heads_are_known_by_name_where_the_model_says_nothing(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 3, bias=False))
    assert found(model) == {f"{name}.weight": "head"}


def test_tied_weights_are_embeddings() -> None:
    model = Head()
    model.out.weight = model.wte.weight
    assert roles.find(model) == {"wte.weight": "embedding", "out.weight": "embedding"}


def test_compiled_models() -> None:
    assert found(torch.compile(Head())) == {f"_orig_mod.{k}": v for k, v in found(Head()).items()}
    model = Head()
    model.out = torch.compile(model.out)
    assert found(model)["out._orig_mod.weight"] == "head"


@pytest.fixture
def alone(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_wrapped_for_data_parallel_training(alone: None) -> None:
    model = nn.parallel.DistributedDataParallel(Head())
    assert found(model) == {f"module.{k}": v for k, v in found(Head()).items()}


def test_checkpoint_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Head()
    model.out = checkpoint_wrapper(model.out)
    assert sorted(found(model).values()) == sorted(found(Head()).values())


def test_parametrized_weights() -> None:
    model = Head()
    parametrizations.orthogonal(model.out)
    parametrizations.orthogonal(model.wte)
    seen = found(model)
    assert seen["out.parametrizations.weight.original"] == "head"
    assert seen["wte.parametrizations.weight.original"] == "embedding"


def llama(**more: object) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def test_adapters_and_what_they_save_whole() -> None:
    """A trained copy of the embedding and the head is still that; adapters are matrices."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    seen = found(peft.get_peft_model(llama(), config))
    assert seen["base_model.model.lm_head.modules_to_save.default.weight"] == "head"
    assert seen["base_model.model.model.embed_tokens.modules_to_save.default.weight"] == "embedding"
    assert {role for name, role in seen.items() if "lora" in name} == {"matrix"}


def test_adapters_on_the_head_are_matrices_and_what_they_wrap_is_the_head() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"])
    model = peft.get_peft_model(llama(), config)
    assert set(found(model).values()) == {"matrix"}
    told = roles.find(model)
    assert told["base_model.model.lm_head.base_layer.weight"] == "head"
    assert told["base_model.model.model.embed_tokens.base_layer.weight"] == "embedding"


def test_the_head_of_a_classifier() -> None:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForSequenceClassification(config)
    assert found(model)["score.weight"] == "head"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert found(adapted)["base_model.model.score.modules_to_save.default.weight"] == "head"


def test_kernels_of_one_dimension_are_not_stacks() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 2, 3), nn.Conv2d(1, 2, 3))
    seen = found(model)
    assert (seen["0.weight"], seen["1.weight"], seen["2.weight"]) == ("convolution", "convolution", "matrix")
    assert roles.is_stack("matrix", (8, 4, 4))
    assert not roles.is_stack(seen["0.weight"], (4, 2, 3))


def test_heads_are_told_by_the_attention_or_the_configuration() -> None:
    """Heads of another size than hidden / heads, fewer keys than queries; under a wrapper too."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 20}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    at = "model.layers.0.self_attn"
    expected = {f"{at}.q_proj.weight": "4", f"{at}.k_proj.weight": "2"}
    assert heads.find(model) == expected
    del model.model.layers[0].self_attn.head_dim
    assert heads.find(model) == expected
    wrapped = torch.nn.ModuleDict({"module": model})
    assert heads.find(wrapped) == {f"module.{name}": count for name, count in expected.items()}
    assert heads.find(nn.Linear(4, 4)) == {}
