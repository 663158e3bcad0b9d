"""Choose the savings for `memory=auto`: the cheapest that fit."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

from lctrain.memory.savings import NOTHING, Savings
from lctrain.plan.memory import Memory

MLP_TILE = 8192  # tokens that fill a GPU's matrix units
MAX_TILES = 16  # tiles of a row: more would save little, and each costs kernel launches
MAX_SHARES = 4  # shares of the heads: with more, attention takes less memory than the MLP, and nothing is saved
GROUPS = (2, 3, 4)  # layers from one kept input to the next; larger groups hold more inputs while they are computed


def choose_savings(
    num_layers: int,
    length: int,
    plan: Callable[[Savings], Memory],
    *,
    device: float,
    host: float,
    dropout: bool,
    heads: Sequence[int] = (),
) -> tuple[Savings, Memory]:
    """Return the first savings of `ladder` that fit into `device` and `host` bytes, or else the smallest, and their
    memory.

    `heads` are the numbers of key-value heads that attention may compute at a time, descending.
    """
    known = cache(plan)
    tile = max(MLP_TILE, length // MAX_TILES)
    recomputed = replace(NOTHING, checkpoint_layers=num_layers, save_attention=num_layers, mlp_tile=tile)

    def num_hosted() -> int:
        return min(num_layers, int(host // known(replace(recomputed, offload=1)).host)) if host else 0

    ends = []
    for rung in ladder(recomputed, num_hosted=num_hosted, heads=heads, groups=() if dropout else GROUPS):
        ends.append(rung[-1])
        if known(rung[-1]).peak <= device:
            chosen = rung[bisect_left(rung, True, key=lambda savings: known(savings).peak <= device)]
            return chosen, known(chosen)
    smallest = min(ends, key=lambda savings: known(savings).peak)
    return smallest, known(smallest)


def ladder(
    recomputed: Savings, *, num_hosted: Callable[[], int], heads: Sequence[int], groups: Sequence[int]
) -> Iterator[Sequence[Savings]]:
    """Yield lists of savings by rising cost; within a list, cost rises and memory shrinks.

    `recomputed` recomputes all layers but their attention. Recomputing a layer without its attention costs less than a
    third of the layer's step; a copy to the host runs during the computation, but slows it by using its memory
    bandwidth; attention by parts runs its projections once more; recomputing attention costs most on long rows. At most
    `num_hosted` inputs fit on the host.
    """
    num_layers = int(recomputed.checkpoint_layers)
    yield [NOTHING]
    yield [replace(recomputed, checkpoint_layers=n, save_attention=n) for n in range(1, num_layers + 1)]
    limit = num_hosted()
    if limit:
        yield [replace(recomputed, offload=n) for n in range(1, limit + 1)]
    hosted = replace(recomputed, offload=limit)
    if heads:
        yield [replace(hosted, kv_heads_at_a_time=n) for n in heads]
        hosted = replace(hosted, kv_heads_at_a_time=heads[-1])
    yield [replace(hosted, save_attention=n) for n in range(num_layers - 1, -1, -1)]
    for every in groups:
        if every <= num_layers:
            inputs = min(limit, -(-num_layers // every))
            yield [replace(hosted, checkpoint_every=every, save_attention=0, offload=n) for n in range(inputs + 1)]
