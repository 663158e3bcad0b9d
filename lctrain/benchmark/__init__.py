"""Timed comparisons of lctrain with plain alternatives."""
