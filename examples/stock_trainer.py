"""A strategy in the stock Trainer of transformers.

python examples/stock_trainer.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lowmem

name = sys.argv[1] if sys.argv[1:] else "HuggingFaceTB/SmolLM2-135M"
ids = torch.arange(32).remainder(50)
rows = [{"input_ids": ids, "labels": ids} for _ in range(16)]
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16),
    args=TrainingArguments(
        output_dir="stock", max_steps=4, report_to="none", logging_steps=1, save_strategy="no"
    ),
    train_dataset=rows,
    optimizer_cls_and_kwargs=lowmem.hf_optimizer("lion", lr=1e-4, states="int8"),
)
trainer.train()
print(f"{trainer.optimizer.optimizer.state_bytes():,} bytes of state")
