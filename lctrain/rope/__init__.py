"""Rotary position schemes, one file each: entries of the transformers config that stretch the positions."""
