"""Does the model use its context: perplexity by length and position, recall by length and depth."""
