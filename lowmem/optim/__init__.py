"""The optimizer and its parts; needs torch alone."""
