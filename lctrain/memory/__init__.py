"""What a training step keeps from forward to backward, where, and what it computes again instead."""
