"""Attention methods, a file each: patterns over positions. A new one needs no edit here; its yaml names its class."""
