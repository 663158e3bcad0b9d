"""Keep the best keys of each head within a budget: the base of policies that evict.

Shape legend: B batch, H query heads, K key-value heads, L new tokens, S kept and new tokens, N kept tokens, D head dim.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from lctrain.cache.allocation import pyramid
from lctrain.cache.base import CachePolicy, Forward, Store
from lctrain.cache.full import bytes_per_key
from lctrain.cache.layer import CacheLayer, Part, require_full_layers, require_installed
from lctrain.cache.seen import Seen
from lctrain.errors import InputError
from lctrain.kernels.few_queries import attend_few
from lctrain.kernels.mask import Local, Mask


class BudgetStore(Store):
    """A store of at most `budget` tokens in each key-value head: the last `recent_size`, and the best of `score`.

    The queries of a forward see all tokens kept before it and, causally, the forward's own. After it, the tokens that
    are not among the best are dropped, and the others are gathered into new tensors in the order of the text. So the
    output depends on how a text is divided into forwards.

    Beside `keys` and `values`, it holds `positions` and `scores` [B, K, N], as in `Seen`. Padding takes slots only
    where a row has fewer tokens than there are slots; slots of padding come first, alike in all heads.
    """

    def __init__(self, score: Callable[[Seen], Tensor], budget: int, recent_size: int) -> None:
        super().__init__()
        self._score, self._budget, self._recent_size = score, budget, recent_size
        self.positions: Tensor | None = None
        self.scores: Tensor | None = None

    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        seen = self._seen(q_BHLD, k_BKLD, v_BKLD, start, forward)
        self._keep_the_best(seen)
        return _attention(seen, forward)

    def _seen(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Seen:
        positions_BKL = _positions(start, k_BKLD, forward)
        scores_BKL = torch.zeros_like(positions_BKL, dtype=torch.promote_types(k_BKLD.dtype, torch.float32))
        kept = self.keys, self.values, self.positions, self.scores
        keys, values, positions, scores = (
            new if old is None else torch.cat((old, new), dim=2)
            for old, new in zip(kept, (k_BKLD, v_BKLD, positions_BKL, scores_BKL), strict=True)
        )
        return Seen(
            queries=q_BHLD, keys=keys, values=values, positions=positions, scores=scores, scaling=forward.scaling
        )

    @torch.no_grad()
    def _keep_the_best(self, seen: Seen) -> None:
        scores_BKS, positions_BKS = self._score(seen).to(seen.scores.dtype), seen.positions
        is_recent = positions_BKS > positions_BKS.amax(-1, keepdim=True) - self._recent_size
        rank_BKS = scores_BKS.masked_fill(is_recent, inf).masked_fill(positions_BKS < 0, -inf)
        best_BKN = rank_BKS.topk(min(self._budget, rank_BKS.shape[-1])).indices
        best_BKN = best_BKN.gather(-1, positions_BKS.gather(-1, best_BKN).argsort(-1))
        self.positions, self.scores = positions_BKS.gather(-1, best_BKN), scores_BKS.gather(-1, best_BKN)
        index_BKND = best_BKN[..., None].expand(-1, -1, -1, seen.keys.shape[-1])
        self.keys, self.values = seen.keys.gather(2, index_BKND), seen.values.gather(2, index_BKND)


def _positions(start: int, k_BKLD: Tensor, forward: Forward) -> Tensor:
    """Return the position of each new token in its row, [B, K, L]; -1 for padding."""
    num_rows, num_heads, length, _ = k_BKLD.shape
    positions = torch.arange(start, start + length, device=k_BKLD.device)
    if forward.tokens_BS is not None:
        tokens_BS = forward.tokens_BS[:, : start + length]
        positions = (tokens_BS.cumsum(1) - 1).where(tokens_BS, -1)[:, None, start:]
    return positions.int().expand(num_rows, num_heads, length)


def _attention(seen: Seen, forward: Forward) -> Tensor:
    """Return the output [B, H, L, D] of the queries over all they see."""
    qkv = seen.queries, seen.keys, seen.values
    if forward.tokens_BS is None and seen.queries.shape[2] == 1:
        return attend_few(*qkv, None, seen.scaling)
    key = BudgetStore, seen.keys.shape[2]  # layers that see as many keys have padding in the same slots
    if key not in forward.shared:
        forward.shared[key] = forward.kernel.prepare(_mask(seen, forward))
    return forward.kernel.attend(*qkv, forward.shared[key], scaling=seen.scaling, softcap=None)


def _mask(seen: Seen, forward: Forward) -> Mask:
    (num_rows, num_heads, length, head_dim), (_, num_kv_heads, num_keys, _) = seen.queries.shape, seen.keys.shape
    sides: Any = None
    if forward.tokens_BS is not None:  # padding is a document of its own, so that no softmax is over nothing
        is_token_BS = (seen.positions[:, 0] >= 0).int()
        sides = is_token_BS[:, num_keys - length :], is_token_BS
    return Mask(
        q_length=length,
        kv_length=num_keys,
        num_heads=1,
        num_key_value_groups=num_heads // num_kv_heads,
        head_dim=head_dim,
        device=seen.queries.device,
        dtype=seen.queries.dtype,
        allowed=causal_mask_function,  # kept keys come before new ones
        visible=causal_mask_function,
        q_offset=num_keys - length,
        documents=sides,
        num_rows=num_rows,
        local=(Local(),) if sides is None else None,
    )


@dataclass(frozen=True, kw_only=True)
class BudgetCache(CachePolicy):
    """A policy that evicts tokens: each key-value head keeps those with the best `score`, and the last ones.

    budget: tokens that a head keeps, averaged over layers. recent_size: how many of these are the row's last tokens.
    pyramid_beta: how the others are divided among layers, see `allocation.pyramid`; 1 gives each layer the same.
    `BudgetStore` says what queries see and when tokens are dropped; `prefill` in chunks bounds the memory of a prompt.
    Tokens stay at their positions in the text. Raises InputError for sizes that leave a score nothing to choose.
    """

    forgets_between_forwards: ClassVar[bool] = True

    budget: int
    recent_size: int
    pyramid_beta: float

    @abstractmethod
    def score(self, seen: Seen) -> Tensor:
        """Return the score [B, K, S] of each key after a forward; those with the highest stay, with their scores."""

    def __post_init__(self) -> None:
        if not 0 <= self.recent_size < self.budget:
            raise InputError(
                f"cache.recent_size={self.recent_size} must be at least 0 and less than cache.budget={self.budget}"
            )
        if self.pyramid_beta < 1:
            raise InputError(f"cache.pyramid_beta={self.pyramid_beta} must be at least 1, which treats layers alike")

    def budgets(self, config: PreTrainedConfig) -> list[int]:
        """Return the number of tokens that each head keeps, layer by layer."""
        num_layers = config.get_text_config().num_hidden_layers
        scored = pyramid(self.budget - self.recent_size, self.pyramid_beta, num_layers)
        return [self.recent_size + number for number in scored]

    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        self.check(model.config, length)
        require_installed(model)
        stores = [BudgetStore(self.score, budget, self.recent_size) for budget in self.budgets(model.config)]
        return Cache([CacheLayer([Part(store, None)]) for store in stores])

    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        beside = torch.int32.itemsize + torch.promote_types(dtype, torch.float32).itemsize  # position and score
        per_token = bytes_per_key(config, batch_size, dtype) + batch_size * beside
        num_tokens = sum(min(budget, length) for budget in self.budgets(config))
        return int(num_tokens * config.get_text_config().num_key_value_heads * per_token)

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:
        require_full_layers(config)
        if min(self.budgets(config)) <= self.recent_size:
            raise InputError(
                f"cache.pyramid_beta={self.pyramid_beta} leaves the last layers of cache.budget={self.budget} nothing "
                "beside recent tokens; give a larger budget or a smaller pyramid_beta"
            )
        if length is not None and (least := min(self.budgets(config))) >= length:
            raise InputError(
                f"with cache.budget={self.budget} every layer keeps {least} tokens or more, which is all of {length}; "
                "use cache=full"
            )
