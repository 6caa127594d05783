"""Your own: a recipe or configuration to edit, a strategy to check."""
