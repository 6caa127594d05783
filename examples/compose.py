"""Points of the space that nobody has named, and what they hold for one weight of a 7B model.

python examples/compose.py
"""

import lowmem

SHAPE = (4096, 11008)
CHOICES = [
    {},
    {"states": "int8"},
    {"projector": "dct", "rule": "lion", "states": "int8"},
    {"projector": "columns", "residual": "sign", "modifiers": "cautious"},
    {"projector": "power", "rule": "adafactor"},
]
for options in CHOICES:
    strategy = lowmem.create("galore", **options)
    print(f"{lowmem.state_bytes(strategy, SHAPE) / (SHAPE[0] * SHAPE[1]):6.3f} bytes per element: {options}")
try:
    lowmem.create("galore", projector="none", residual="sign")
except lowmem.UserError as refusal:
    print(refusal)
