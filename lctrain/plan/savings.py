"""`memory=auto`: of all savings the cheapest that fits."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from lctrain.memory.savings import NOTHING, Savings
from lctrain.plan.memory import Memory

MLP_TILE = 8192  # tokens fill a card's matrix units
MAX_TILES = 16  # of a row: more would save little, and each costs launches
GROUPS = (2, 3, 4)  # layers between two kept inputs; the more, the more inputs a group needs while it is computed


def choose_savings(
    num_layers: int, length: int, plan: Callable[[Savings], Memory], *, device: float, host: float, dropout: bool
) -> tuple[Savings, Memory]:
    """The first of `ladder` that fits into `device` and `host` bytes, or else the smallest; and its plan."""
    known = cache(plan)
    tile = max(MLP_TILE, length // MAX_TILES)
    recomputed = replace(NOTHING, checkpoint_layers=num_layers, save_attention=num_layers, mlp_tile=tile)
    num_hosted = min(num_layers, int(host // known(replace(recomputed, offload=1)).host)) if host else 0
    rungs = list(ladder(recomputed, num_hosted=num_hosted, groups=() if dropout else GROUPS))
    for rung in rungs:
        if known(rung[-1]).peak <= device:
            chosen = rung[bisect_left(rung, True, key=lambda savings: known(savings).peak <= device)]
            return chosen, known(chosen)
    smallest = min((rung[-1] for rung in rungs), key=lambda savings: known(savings).peak)
    return smallest, known(smallest)


def ladder(recomputed: Savings, *, num_hosted: int, groups: Sequence[int]) -> Iterator[Sequence[Savings]]:
    """Rungs by rising cost; on each, savings by rising cost and shrinking memory.

    `recomputed` recomputes all layers but their attention. Recomputing a layer without its attention costs less than a
    third of its step; a copy to the host runs beside the computation, yet slows what shares its memory; recomputing
    attention costs most where rows are long. At most `num_hosted` inputs fit on the host.
    """
    num_layers = int(recomputed.checkpoint_layers)
    yield [NOTHING]
    yield [replace(recomputed, checkpoint_layers=n, save_attention=n) for n in range(1, num_layers + 1)]
    if num_hosted:
        yield [replace(recomputed, offload=n) for n in range(1, num_hosted + 1)]
    yield [replace(recomputed, offload=num_hosted, save_attention=n) for n in range(num_layers - 1, -1, -1)]
    for every in groups:
        if every <= num_layers:
            inputs = min(num_hosted, -(-num_layers // every))
            yield [replace(recomputed, checkpoint_every=every, save_attention=0, offload=n) for n in range(inputs + 1)]
