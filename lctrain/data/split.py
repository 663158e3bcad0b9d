"""Decide which documents are held out, by name alone, so that every machine and every run decides alike."""

import hashlib


def unit_hash(name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone, uniform over names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
