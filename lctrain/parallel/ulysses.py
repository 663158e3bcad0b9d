"""Share a row between ranks by exchanging tokens for heads (DeepSpeed Ulysses, Jacobs et al., arXiv:2309.14509).

Every rank holds L = S / n tokens of a row, with all heads. For attention only, ranks exchange: each gets all S tokens
of its own share of the heads, runs any attention on them, and sends the outputs back.

Shape legend: B batch, H query heads, K key-value heads, h heads of a rank, S tokens of the row, L = S / n tokens here,
D head dim, n ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.errors import InputError


@dataclass(frozen=True)
class Ulysses:
    """The exchange over one process group, in which consecutive ranks hold consecutive tokens.

    Deviation from the paper: key-value heads are repeated until n divides their number, so that n may exceed it.
    DeepSpeed's own wrapper is not used because it drops the masks that patterns and packed documents need.
    """

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def attend(
        self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor
    ) -> Tensor:
        """Return the output of all heads for this rank's tokens, [B, H, L, D].

        `attention` gets all tokens of this rank's heads. Tensors are exchanged in the layout in which projections
        write them and fused kernels read them (token by token), which takes one copy each way.
        """
        repeats = num_repeats(k_BKLD.shape[1], self.size)
        k_BKLD, v_BKLD = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k_BKLD, v_BKLD))
        shares = [x.unflatten(1, (self.size, -1)).permute(1, 0, 3, 2, 4) for x in (q_BHLD, k_BKLD, v_BKLD)]
        got_nBLhD = self._exchange(torch.cat(shares, dim=3))  # one exchange for all three
        parts = got_nBLhD.transpose(0, 1).flatten(1, 2).split([share.shape[3] for share in shares], dim=2)
        out_BhSD = attention(*(part_BShD.transpose(1, 2) for part_BShD in parts))
        out_nBLhD = out_BhSD.transpose(1, 2).unflatten(1, (self.size, -1)).transpose(0, 1)
        return self._exchange(out_nBLhD.contiguous()).permute(1, 2, 0, 3, 4).flatten(2, 3).transpose(1, 2)

    def gather(self, x_BL: Tensor) -> Tensor:
        """Return the whole row [B, S] from the part [B, L] of each rank, without a gradient."""
        parts = [torch.empty_like(x_BL) for _ in range(self.size)]
        dist.all_gather(parts, x_BL.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def _exchange(self, x_n: Tensor) -> Tensor:
        out: Tensor = _AllToAll.apply(x_n, self.group)  # type: ignore[no-untyped-call]
        return out


class _AllToAll(torch.autograd.Function):
    """The exchange that sends entry i to rank i. It is its own inverse, so the gradient takes the same exchange."""

    @staticmethod
    def forward(ctx: Any, x_n: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out_n = torch.empty_like(x_n)
        dist.all_to_all_single(out_n, x_n, group=group)
        return out_n

    @staticmethod
    def backward(ctx: Any, d_out_n: Tensor) -> tuple[Tensor, None]:
        d_x_n = torch.empty_like(d_out_n, memory_format=torch.contiguous_format)
        dist.all_to_all_single(d_x_n, d_out_n.contiguous(), group=ctx.group)
        return d_x_n, None


def num_repeats(num_key_value_heads: int, size: int) -> int:
    """Return how often each key-value head is repeated in the exchange, so that `size` ranks get equal shares."""
    return size // gcd(num_key_value_heads, size)


def shares_heads(num_attention_heads: int, num_key_value_heads: int, size: int) -> bool:
    """Return whether `size` ranks can get equally many query heads, each with the key-value heads these need."""
    groups = num_attention_heads // num_key_value_heads
    return num_attention_heads % size == 0 and groups % num_repeats(num_key_value_heads, size) == 0


def check_heads(num_attention_heads: int, num_key_value_heads: int, size: int) -> None:
    """Raise InputError, which names the sizes that work, unless `shares_heads` is true."""
    if shares_heads(num_attention_heads, num_key_value_heads, size):
        return
    sizes = range(1, num_attention_heads + 1)
    possible = [str(n) for n in sizes if shares_heads(num_attention_heads, num_key_value_heads, n)]
    raise InputError(
        f"sequence_parallel_size={size} can't share {num_attention_heads} attention heads on {num_key_value_heads} "
        f"key-value heads evenly; {', '.join(possible)} can, and further devices read other rows"
    )
