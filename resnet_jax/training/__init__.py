"""Training: the loop from top to bottom."""
