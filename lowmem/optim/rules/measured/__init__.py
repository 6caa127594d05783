"""Rules that need a few numbers of the whole tensor first."""
