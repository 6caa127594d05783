"""Runs without gradients: their steps, the log that they leave, and how it gives the weights back."""
