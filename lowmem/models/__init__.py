"""Models: names and shapes, weights and tokenizers, what their forward pass is made to do."""
