"""How a model computes: attention in packed rows, the loss over labels, products on a processor."""
