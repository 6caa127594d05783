"""The tensors that an optimizer was given: their roles, groups, seats and saved state."""
