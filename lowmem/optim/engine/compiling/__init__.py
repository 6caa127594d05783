"""How kernels are compiled, and called without what `torch.compile` puts around them."""
