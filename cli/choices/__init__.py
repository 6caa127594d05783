"""What there is: strategies, models, cards, and this machine."""
