"""Find the complete blocks of tokens in rows, counted from the begin of each document.

Shape legend: B batch, S tokens of a row, N blocks of a row, M tokens of a block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from lctrain.attention.base import Rows
from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The complete blocks of rows, in the order of documents and positions.

    A row of S tokens has at most S // M of them. Where it has fewer, the last entries are not `complete`: their other
    fields mean nothing, and no query may see them.
    """

    members_BNM: Tensor  # indices of a block's tokens
    numbers_BN: Tensor  # of a block in its document, from 0
    documents_BN: Tensor
    complete_BN: Tensor

    @classmethod
    def of(cls, positions_BS: Tensor, documents_BS: Tensor, is_token_BS: Tensor, size: int) -> "Blocks":
        """Return the blocks of `size` tokens. `is_token_BS` is False for room in a cache."""
        order_BS = documents_BS.argsort(dim=1, stable=True)  # padding may lie between the tokens of a document
        positions, documents, is_token = (x.gather(1, order_BS) for x in (positions_BS, documents_BS, is_token_BS))
        length, back = positions.shape[1], size - 1
        first_position, first_document = (F.pad(x, (back, 0), value=-1)[:, :length] for x in (positions, documents))
        ends = (positions % size == back) & (first_position == positions - back) & (first_document == documents)
        nth_BN = torch.arange(1, length // size + 1, device=order_BS.device).expand(len(order_BS), -1).contiguous()
        last_BN = torch.searchsorted((ends & is_token).cumsum(1), nth_BN)  # `length` where there are fewer
        complete_BN = last_BN < length
        places_BNM = last_BN[..., None] - torch.arange(back, -1, -1, device=order_BS.device)
        places_BNM = places_BNM.where(complete_BN[..., None], 0)
        members_BNM = order_BS.gather(1, places_BNM.flatten(1)).unflatten(1, (-1, size))
        begins_BN = members_BNM[..., 0]
        return cls(
            members_BNM=members_BNM,
            numbers_BN=positions_BS.gather(1, begins_BN) // size,
            documents_BN=documents_BS.gather(1, begins_BN),
            complete_BN=complete_BN,
        )

    @classmethod
    def of_tokens(cls, rows: Rows, size: int) -> "Blocks":
        """Return the blocks of a forward's tokens, which its layers share."""
        key = (cls, size)
        if key not in rows.shared:
            index_S = torch.arange(rows.positions_BS.shape[1], device=rows.positions_BS.device)
            is_token_BS = (index_S < rows.first_query + rows.num_queries).expand_as(rows.positions_BS)
            rows.shared[key] = cls.of(rows.positions_BS, rows.documents_BS, is_token_BS, size)
        blocks: Blocks = rows.shared[key]
        return blocks

    def groups(self, size: int) -> "Blocks":
        """Return the blocks of `size` blocks each, whose members are indices of blocks."""
        return Blocks.of(self.numbers_BN, self.documents_BN, self.complete_BN, size)

    def take(self, x_BKSD: Tensor) -> Tensor:
        """Return what `x` holds for the members of each block, [B, K, N, M, D]."""
        index_BTD = self.members_BNM.flatten(1)[:, None, :, None]
        taken_BKTD = x_BKSD.gather(2, index_BTD.expand(-1, x_BKSD.shape[1], -1, x_BKSD.shape[3]))
        taken: Tensor = taken_BKTD.unflatten(2, self.members_BNM.shape[1:])
        return taken

    def slots(self, length: int) -> Tensor:
        """Return the entry of each token's block, [B, S]; N where its block is not complete."""
        num_blocks, size = self.members_BNM.shape[1:]
        to_BNM = self.members_BNM.where(self.complete_BN[..., None], length)
        slots_BS = to_BNM.new_full((len(to_BNM), length + 1), num_blocks)
        each_T = torch.arange(num_blocks, device=to_BNM.device).repeat_interleave(size)
        return slots_BS.scatter_(1, to_BNM.flatten(1), each_T.expand(len(to_BNM), -1))[:, :length]


def refuse_own_window(method: object, config: PreTrainedConfig) -> None:
    """Raise InputError if layers of the model have a window of their own, beyond which blocks would lose tokens."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if getattr(config, "sliding_window", None) and "sliding_attention" in types:
        raise InputError(
            f"{type(method).__name__} needs a model without a window of its own, which hides blocks in part; "
            f"this one sees {config.sliding_window} tokens"
        )
