"""Packaged configuration: models, GPUs, runs and the demo data."""
