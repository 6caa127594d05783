"""Where gradients come from: backpropagation, or two values of the loss."""
