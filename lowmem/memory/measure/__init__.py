"""A real run, watched: measured beside predicted."""
