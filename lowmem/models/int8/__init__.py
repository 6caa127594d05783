"""Models whose matrices are int8 codes: made, loaded and saved without a second copy of their weights."""
