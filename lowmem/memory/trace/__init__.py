"""One step of training on fake tensors: what lives when."""
