"""Losses that compute the logits of the output head in tiles, and never hold all of them."""
