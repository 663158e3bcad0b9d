"""Timed comparisons of lctrain with something plain."""
