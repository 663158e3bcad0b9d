"""Rotary position schemes: one file each, the transformers config that stretches the positions."""
