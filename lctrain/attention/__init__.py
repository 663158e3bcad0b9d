"""Attention methods: one file each, a pattern over positions. A new one needs no edit here: its yaml names its class."""
