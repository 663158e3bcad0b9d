"""Kernels that compute attention: each prepares a mask once per forward and attends with it in every layer."""
