"""Decide what a training step keeps from forward to backward, where it is kept, and what is computed again instead."""
