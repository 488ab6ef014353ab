"""Published protocols, one file a benchmark: ``python -m experiments`` lists them."""
