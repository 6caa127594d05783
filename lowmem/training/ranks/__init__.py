"""Several processes that do one run: who writes, how weights are spread, what gradients are exchanged."""
