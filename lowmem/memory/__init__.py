"""What a run takes: counted, traced, simulated, measured."""
