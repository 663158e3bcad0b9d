"""Attention of one decoded token over what a cache keeps: in torch, and as one Triton kernel on a card."""
