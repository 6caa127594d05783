"""Named methods, a file each; they register themselves when this package is searched."""
