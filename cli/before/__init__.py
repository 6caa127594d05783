"""Before the run: what it will take, and whether it is written correctly."""
