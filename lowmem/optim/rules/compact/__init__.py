"""Rules that hold their moments in fewer numbers than the weight has."""
