"""What fits, before anything is downloaded or run.

python examples/plan.py [MODEL]
"""

import sys

import lowmem

name = sys.argv[1] if sys.argv[1:] else "smollm2-135m"
found = lowmem.plan(
    name, "adamw,adamw_8bit,galore(states=int8),adafactor", seq_len=128, batch_size=4, budget="2GiB"
)
for row in found.plans:
    verdict = "fits" if row.fits else "does not fit"
    print(
        f"{row.strategy:12} {row.state_bytes:>13,} bytes held, peak {row.peak['allocated']:>13,}: {verdict}"
    )
