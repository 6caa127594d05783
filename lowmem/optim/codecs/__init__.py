"""How one moment is held between steps."""
