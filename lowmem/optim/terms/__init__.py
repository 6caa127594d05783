"""The terms of the contract: what is held between steps, what a part knows of a step, and what it reports."""
