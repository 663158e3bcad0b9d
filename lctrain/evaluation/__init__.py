"""Measurements of how well a model uses its context: perplexity by length and position, recall by length and depth."""
