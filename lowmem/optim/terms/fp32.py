"""The ends of fp32, and how near to them rules and codecs go."""

from __future__ import annotations

import torch

TINY = torch.finfo(torch.float32).tiny
LARGEST = torch.finfo(torch.float32).max
LARGEST_MEAN = LARGEST / 2
"""Of squares: means of rows and columns may be rounded up."""
LARGEST_MOMENT = 1e36
"""Of what is decoded or owed: room is left for scales that are rounded up and for bias corrections."""
LEAST_EPS = 1e-18
"""A smaller eps counts as this: 0 / 0 is no step, and squares of smaller gradients have no fp32."""
