"""Which documents are held out: decided by name alone, so that every machine and every run agrees."""

import hashlib


def unit_hash(name: str) -> float:
    """`name` mapped to [0, 1), uniformly and for ever the same."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
