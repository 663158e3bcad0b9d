"""Divide a budget of tokens among the layers of a model."""

from fractions import Fraction


def pyramid(mean: int, beta: float, num_layers: int) -> list[int]:
    """Return how many tokens each layer keeps: an arithmetic sequence from the first layer down to the last.

    PyramidKV (Cai et al., arXiv:2406.02069): the last layer keeps mean / beta, the first as much above `mean`. With
    `beta` 1 all layers keep `mean`. The numbers are whole, descend, and sum to `mean` · `num_layers`.
    """
    fall, steps = 1 - 1 / Fraction(beta), max(1, num_layers - 1)
    heights = (Fraction(steps - 2 * layer, steps) if num_layers > 1 else 0 for layer in range(num_layers))  # 1 to -1
    exact = [mean * (1 + fall * height) for height in heights]
    tokens = [int(number) for number in exact]
    left = mean * num_layers - sum(tokens)
    for layer in sorted(range(num_layers), key=lambda layer: tokens[layer] - exact[layer])[:left]:
        tokens[layer] += 1  # where rounding down took the most
    return tokens
