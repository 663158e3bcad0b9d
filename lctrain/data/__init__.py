"""Corpora, their tokens, and the batches cut from them."""
