"""The card: what of it is usable, what its allocator does, what it reads."""
