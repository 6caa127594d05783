"""Named methods, a file for each family; they register themselves when this package is searched."""
