"""Kernels that compute attention: each prepares a mask once per forward and attends with it in every layer.

The sums of linear attention, which has no mask, are in `linear_attention`.
"""
