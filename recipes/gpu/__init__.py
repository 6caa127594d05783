"""Measure lowmem on a GPU: one command, one JSON document, rewritten after every row.

    python recipes/gpu --output gpu.json                       # on a bare machine: torch, transformers, this
    python recipes/gpu --output gpu.json --parts steps,plan    # some parts; a second run replaces them
    python recipes/gpu --output gpu.json --device cpu --small  # the same program anywhere, in a minute

tests       the tests that need a GPU
methods     every method, compiled beside eager, and what a step asks of the card; beside the tests
calibrate   what CUDA and its libraries take for themselves
steps       one optimizer step of every method and every peer that is installed, on 1.1B Llama-shaped weights
plan        predicted beside measured memory; every second cell is marked as held out
train       the demo job where --model names a folder or GGUF file, else a random model: tokens per second
fit         the largest model that the plan lets into 8, 12, 16, 24 GiB, run so, and one notch above

Each part is a process of its own with its own share of nine minutes; what there was no time or no package
for is named under "left_out". A part that fails leaves its last lines under "error", and the others go on.
"""
