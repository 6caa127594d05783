"""How a step runs on a device: chunks, kernels, sizes, random numbers."""
