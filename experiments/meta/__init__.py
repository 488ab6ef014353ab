"""Meta-learning experiments."""
