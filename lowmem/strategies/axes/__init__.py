"""The parts that lowmem brings, a file for each kind; they register themselves when they are imported."""
