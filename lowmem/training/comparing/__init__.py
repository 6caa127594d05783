"""Several strategies on one model and one set of rows: who runs, and what came of it."""
