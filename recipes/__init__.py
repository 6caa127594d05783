"""Programs that read top to bottom and are meant to be copied."""
