"""What every strategy promises, asked of one: `lowmem check`, and the contract suite."""
