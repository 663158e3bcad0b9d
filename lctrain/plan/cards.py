"""The rates of known cards (GPUs), from their vendor's datasheets."""

from dataclasses import dataclass

from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU's rates per second: dense bf16 operations, bytes of its memory, bytes to GPUs of its node (one way)."""

    flops: float
    bandwidth: float
    link: float


CARDS = {
    "H200": Card(flops=989e12, bandwidth=4.8e12, link=450e9),
    "H100": Card(flops=989e12, bandwidth=3.35e12, link=450e9),
    "A100": Card(flops=312e12, bandwidth=2.0e12, link=300e9),
    "B200": Card(flops=2250e12, bandwidth=8.0e12, link=900e9),
    "L40S": Card(flops=362e12, bandwidth=0.864e12, link=32e9),
}


def card(name: str) -> Card:
    """Return the card called `name`; raise an InputError that lists the known ones if there is none."""
    if name not in CARDS:
        raise InputError(f"device={name} is none of {', '.join(CARDS)}")
    return CARDS[name]
