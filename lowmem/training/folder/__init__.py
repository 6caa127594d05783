"""The folder of a run: who holds it, what is whole in it, what goes on from it."""
