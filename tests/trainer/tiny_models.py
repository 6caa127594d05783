"""Tiny random models of the real architectures."""

from __future__ import annotations

import torch
import transformers

COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False),
    "gemma2": lambda: transformers.Gemma2Config(
        **LLAMA, head_dim=8, final_logit_softcapping=3.0, sliding_window=16, query_pre_attn_scalar=8
    ),
    "granite": lambda: transformers.GraniteConfig(**LLAMA, logits_scaling=4.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "opt": lambda: transformers.OPTConfig(
        **COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0
    ),
}


def tiny(
    kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0
) -> transformers.PreTrainedModel:
    """A two-layer model; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CONFIGS[kind]()
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        config._attn_implementation = "sdpa" if kind != "gemma2" else "eager"
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
