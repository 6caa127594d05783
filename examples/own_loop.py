"""Your own loop: an ordinary optimizer over a Hugging Face model, saved and resumed.

python examples/own_loop.py [MODEL]
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import lowmem

name = sys.argv[1] if sys.argv[1:] else "HuggingFaceTB/SmolLM2-135M"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
optimizer = lowmem.optimizer(model, "galore", lr=1e-3, rank=16, states="int8", embedding="adafactor")
ids = torch.arange(64).remainder(50).view(2, 32)
for step in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")

again = lowmem.optimizer(model, "galore", lr=1e-3, rank=16, states="int8", embedding="adafactor")
again.load_state_dict(torch.load("checkpoint.pt", weights_only=True)["optimizer"])
print(f"resumed with {again.state_bytes():,} bytes of state")
