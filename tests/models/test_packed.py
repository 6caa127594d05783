"""Models that mix the examples of a packed row are told from those that keep them apart."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from datasets import Dataset

from lowmem.errors import UserError
from lowmem.memory.plan import plan
from lowmem.models.computing.packed import pack
from lowmem.models.peft_methods import attaching
from lowmem.training.arguments import LowMemSFTConfig
from lowmem.training.trainer import LowMemSFTTrainer
from tests.trainer.tiny_folder import tokenizer

IDS = {"vocab_size": 260, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "intermediate_size": 48}
MIXING = {
    "bloom": lambda: transformers.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(**IDS, **SHAPE),
    "mamba": lambda: transformers.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "minimax": lambda: transformers.MiniMaxConfig(**IDS, **SHAPE, **HEADS, num_local_experts=4, head_dim=8),
    "mpt": lambda: transformers.MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
}
APART = {
    "gpt2": lambda: transformers.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4),
    "llama": lambda: transformers.LlamaConfig(**IDS, **SHAPE, **HEADS),
    "mixtral": lambda: transformers.MixtralConfig(**IDS, **SHAPE, **HEADS, num_local_experts=4),
    "gemma2": lambda: transformers.Gemma2Config(**IDS, **SHAPE, **HEADS, head_dim=8),
    "gptj": lambda: transformers.GPTJConfig(**IDS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}


def trainer(folder, config, dtype=torch.float32, peft=None, **values):
    values = {"optim": "adamw", "packing": True, "max_length": 48, "use_cpu": True, "bf16": False} | values
    args = LowMemSFTConfig(output_dir=str(folder), report_to="none", disable_tqdm=True, max_steps=1, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    rows = Dataset.from_list([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(12)])
    return LowMemSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer(), peft_config=peft)


@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_mixes_packed_examples_is_refused_before_training(tmp_path, kind):
    with pytest.raises(UserError, match=r"lets each example see those before it; give --no-packing"):
        trainer(tmp_path, MIXING[kind]())
    trainer(tmp_path, MIXING[kind](), packing=False)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "mpt"])
def test_it_is_not_planned_with_packed_rows_either(kind):
    options = {"seq_len": 32, "device": "cpu", "advise": False}
    with pytest.raises(UserError, match="give --rows padded, and train with --no-packing"):
        plan(MIXING[kind](), "adamw", rows="packed", **options)
    plan(MIXING[kind](), "adamw", rows="padded", **options)


@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="there some keep them apart")
@pytest.mark.parametrize(
    ("kind", "said"), [("lfm2", "refuses packed rows"), ("recurrent_gemma", "see those before")]
)
def test_a_hybrid_is_not_planned_with_packed_rows(kind, said):
    config = {
        "lfm2": lambda: transformers.Lfm2Config(
            **IDS, **SHAPE, **HEADS, layer_types=["conv", "full_attention"]
        ),
        "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
            **IDS, **SHAPE | {"num_hidden_layers": 3}, **HEADS
        ),
    }[kind]()
    with pytest.raises(UserError, match=f"{said}.*give --rows padded, and train with --no-packing"):
        plan(config, "adamw", rows="packed", seq_len=32, device="cpu", advise=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", APART)
def test_a_model_that_keeps_them_apart_is_not(tmp_path, kind, dtype):
    made = trainer(tmp_path, APART[kind](), dtype)
    assert made.model.training
    assert all(p.grad is None for p in made.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gptj"])
def test_these_are_planned_with_packed_rows(kind):
    plan(APART[kind](), "adamw", rows="packed", seq_len=32, device="cpu", advise=False)


def test_the_question_leaves_generators_and_modes_as_they_were(tmp_path):
    made = trainer(tmp_path, APART["llama"](), activation_checkpointing=True)
    before, made.model.lm_head.training = torch.get_rng_state(), False
    pack(made.model, made.compute_loss_context_manager)
    assert torch.equal(before, torch.get_rng_state())
    assert made.model.training
    assert not made.model.lm_head.training
    made.train()


@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="there Lfm2 keeps them apart")
def test_what_the_model_itself_refuses_is_said_with_the_remedy(tmp_path):
    config = transformers.Lfm2Config(**IDS, **SHAPE, **HEADS, layer_types=["conv", "full_attention"])
    with pytest.raises(UserError, match=r"Lfm2ForCausalLM refuses packed rows .* give --no-packing"):
        trainer(tmp_path, config)


@pytest.mark.filterwarnings("ignore")  # PEFT reads an old name, and says that it leaves positions out
def test_prompts_of_peft_lose_the_beginnings(tmp_path):
    peft = pytest.importorskip("peft")
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with attaching(), pytest.raises(UserError, match="--no-packing"):
        trainer(tmp_path, APART["llama"](), peft=virtual)
