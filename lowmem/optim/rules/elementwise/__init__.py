"""Rules that go element by element, as a paper writes them."""
