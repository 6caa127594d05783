"""Step each tensor during the backward pass, so that no gradient is kept.

python examples/released.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.optim.release import release

name = sys.argv[1] if sys.argv[1:] else "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
optimizer = lowmem.optimizer(model, "adafactor", lr=1e-4)
handle = release(optimizer)
ids = torch.arange(64).remainder(50).view(2, 32)
for step in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    kept = sum(p.grad is not None for p in model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, {kept} gradients kept")
handle.remove()
