"""A model that gives a text one number, made of a language model: its head gives way to a score.

score = w . h(last token),   w ~ N(0, initializer_range), drawn from the seed
"""

from __future__ import annotations

from typing import Any


def with_score(model: Any, tokenizer: Any, seed: int = 0) -> Any:
    """The sequence classifier of a causal language model; its layers are shared, not copied.

    Args:
        model: as loaded, whole or quantised.
        tokenizer: says which token pads; the last that does not is scored.
        seed: of the score's weights.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = model.config
    config.num_labels = 1
    config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    with torch.device("meta"):
        scoring: Any = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype
        )
    setattr(scoring, scoring.base_model_prefix, model.base_model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, scoring.score.in_features, generator=generator)
    weight = (weight * getattr(config, "initializer_range", 0.02)).to(model.dtype).to(model.device)
    scoring.score.weight = torch.nn.Parameter(weight)
    return scoring
