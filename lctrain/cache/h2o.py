"""Keep recent tokens, and those that have received the most attention."""

from dataclasses import dataclass

from torch import Tensor

from lctrain.cache.budget import BudgetCache
from lctrain.cache.seen import Seen


@dataclass(frozen=True, kw_only=True)
class H2OCache(BudgetCache):
    """The Heavy-Hitter Oracle (Zhang et al., arXiv:2306.14048, §4): heavy hitters beside recent tokens.

    The score of a key is the sum of the attention weights that all queries since its token have given it, per key-value
    head: over the query heads that share it, where the paper's models have one. The paper gives half of the budget to
    recent tokens.
    """

    def score(self, seen: Seen) -> Tensor:
        return seen.scores + seen.received()
