"""What to do about a plan: levers, the largest that fits, what fits a card, the run, and the words for it."""
