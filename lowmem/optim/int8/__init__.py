"""Weights of one byte that train: the tensor, what layers do with it, and how it takes a step."""

from lowmem.optim.int8 import products as products  # layers find their products by it
