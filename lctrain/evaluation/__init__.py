"""Does the model use its context: perplexity by length and position, passkey recall by length and depth."""
