"""Keep sinks and recent tokens in memory that does not grow.

Shape legend: B batch, H query heads, K key-value heads, L new tokens, S all tokens so far, D head dim, N slots,
M slots in use plus new tokens, R rows of a table: B, or 1 where no row is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from lctrain.cache.base import Forward, Store
from lctrain.cache.rotation import Rotation
from lctrain.decode.one_query import Buffer, slot_of
from lctrain.errors import InputError
from lctrain.kernels import few_queries
from lctrain.kernels.base import Demand
from lctrain.kernels.few_queries import attend_few
from lctrain.kernels.mask import Mask


@dataclass(frozen=True)
class Slots:
    """The slots that keep a row's tokens: the first `num_sinks` for good, the last `num_recent` in a ring."""

    num_sinks: int
    num_recent: int

    @property
    def number(self) -> int:
        return self.num_sinks + self.num_recent

    def of(self, position: Tensor) -> Tensor:
        """Return the slot of the token at each position of its row."""
        return slot_of(position, self.num_sinks, self.num_recent)

    def positions(self, num_tokens_R1: Tensor) -> Tensor:
        """Return the position that each slot holds after a row's first tokens, [R, N]; -1 where it holds none yet."""
        slot = torch.arange(self.number, device=num_tokens_R1.device)
        newest = num_tokens_R1 - 1 - (num_tokens_R1 - 1 - slot) % self.num_recent
        position = torch.where(slot < self.num_sinks, slot, newest)
        return torch.where((position >= slot) & (position < num_tokens_R1), position, -1)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The part of the work on one piece of a forward that all layers share."""

    held: int  # slots in use before the piece
    source_RN: Tensor  # index of the new token that each slot gets, -1 for none
    shift_RL: Tensor  # each new token's distance to its sinks in the text, less that in the cache
    sink_RM: Tensor  # True where the key is a sink
    prepared: Any  # the mask as the kernel prepared it


def _pieces(length: int) -> Iterator[slice]:
    """Yield pieces of a forward whose lengths are powers of two, and a short last one.

    So kernels that are compiled for a length meet few lengths.
    """
    start = 0
    while start < length:
        left = length - start
        stop = length if left < few_queries.FEW else start + (1 << (left.bit_length() - 1))
        yield slice(start, stop)
        start = stop


class Ring(Store):
    """A store of the sinks and the last tokens of each row, in `slots`; padding is not kept.

    With a `rotation`, positions are those inside the cache, as in StreamingLLM (arXiv:2309.17453, §3.2). Keys are
    stored at their positions in the text, and sinks are rotated, relative to each query, to their distance inside the
    cache.
    """

    def __init__(self, slots: Slots, rotation: Rotation | None) -> None:
        super().__init__()
        self._slots = slots
        self._rotation = rotation

    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        if q_BHLD.shape[2] == 1 and forward.tokens_BS is None:
            return self._attend_one(q_BHLD, k_BKLD, v_BKLD, start, forward.scaling)
        outs = []
        for piece in _pieces(q_BHLD.shape[2]):
            q, k, v = (x[:, :, piece].contiguous() for x in (q_BHLD, k_BKLD, v_BKLD))
            outs.append(self._attend_piece(q, k, v, start + piece.start, forward))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def buffer(self, like_BKLD: Tensor, start: int) -> Buffer | None:
        return None if self._rotation is not None else Buffer(*self._buffers(like_BKLD), self._slots.num_sinks)

    def _buffers(self, like_BKLD: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            shape = (*like_BKLD.shape[:2], self._slots.number, like_BKLD.shape[3])
            self.keys, self.values = like_BKLD.new_zeros(shape), like_BKLD.new_zeros(shape)
        return self.keys, self.values

    def _attend_one(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, scaling: float) -> Tensor:
        """Store one token and return its attention to every slot in use; the order of slots does not matter."""
        slot, held = int(self._slots.of(torch.tensor(start))), min(start + 1, self._slots.number)
        keys_BKND, values_BKND = self._buffers(k_BKLD)
        keys_BKND[:, :, slot : slot + 1], values_BKND[:, :, slot : slot + 1] = k_BKLD, v_BKLD
        k, v = keys_BKND[:, :, :held], values_BKND[:, :, :held]
        if self._rotation is not None and start + 1 > held:
            shift = torch.full((1, 1), start + 1 - held, device=k.device)
            sinks = self._rotation(k[:, :, : self._slots.num_sinks], shift)
            k = torch.cat((sinks, k[:, :, self._slots.num_sinks :]), dim=2)
        return attend_few(q_BHLD, k, v, None, scaling)

    def _attend_piece(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        """Return the output of a piece, in which each token sees its own sinks and window, and keep what stays."""
        piece, buffers = self._piece(q_BHLD, k_BKLD, start, forward), self._buffers(k_BKLD)
        q = q_BHLD
        k, v = (
            torch.cat((kept[:, :, : piece.held], new), dim=2)
            for kept, new in zip(buffers, (k_BKLD, v_BKLD), strict=True)
        )
        if self._rotation is not None:
            # A query needs one rotation for sinks and another for recent tokens. It holds both side by side, and each
            # key has zeros in place of the half that does not apply to it.
            sink = piece.sink_RM[:, None, :, None].to(k.dtype)
            q = torch.cat((q, self._rotation(q, -piece.shift_RL)), dim=-1)
            k, v = torch.cat((k * (1 - sink), k * sink), dim=-1), F.pad(v, (0, v.shape[-1]))
        out = forward.kernel.attend(q, k, v, piece.prepared, scaling=forward.scaling, softcap=None)
        source = piece.source_RN[:, None, :, None]
        for kept, new in zip(buffers, (k_BKLD, v_BKLD), strict=True):
            taken = new.gather(2, source.clamp(min=0).expand(kept.shape))
            kept.copy_(torch.where(source < 0, kept, taken))
        return out[..., : v_BKLD.shape[-1]]

    def _piece(self, q_BHLD: Tensor, k_BKLD: Tensor, start: int, forward: Forward) -> _Piece:
        key = self._slots, self._rotation is None, start
        if key not in forward.shared:
            forward.shared[key] = self._make_piece(q_BHLD, k_BKLD, start, forward)
        piece: _Piece = forward.shared[key]
        return piece

    def _make_piece(self, q_BHLD: Tensor, k_BKLD: Tensor, start: int, forward: Forward) -> _Piece:
        slots, stop = self._slots, start + q_BHLD.shape[2]
        padded = forward.tokens_BS is not None
        tokens_RS = torch.ones(1, stop, dtype=torch.bool, device=q_BHLD.device)
        tokens_RS = tokens_RS if forward.tokens_BS is None else forward.tokens_BS[:, :stop]
        position_RS = (tokens_RS.cumsum(1) - 1).clamp(min=0)
        new_RL, is_token_RL = position_RS[:, start:], tokens_RS[:, start:]
        held = slots.number if padded and start else min(start, slots.number)
        held_RN = slots.positions(tokens_RS[:, :start].sum(1, keepdim=True))[:, :held]
        kv_RM = torch.cat((held_RN, new_RL), dim=1)
        real_RM = torch.cat((held_RN >= 0, is_token_RL), dim=1)
        stays = (new_RL < slots.num_sinks) | (new_RL > position_RS[:, -1:] - slots.num_recent)
        slot_RL = torch.where(stays & is_token_RL, slots.of(new_RL), slots.number)
        source_RN = torch.full((new_RL.shape[0], slots.number + 1), -1, device=new_RL.device)
        source_RN.scatter_(1, slot_RL, torch.arange(stop - start, device=new_RL.device).expand(slot_RL.shape))
        return _Piece(
            held=held,
            source_RN=source_RN[:, :-1],
            shift_RL=(new_RL - (slots.number - 1)).clamp(min=0),
            sink_RM=real_RM & (kv_RM < slots.num_sinks),
            prepared=self._prepare(q_BHLD, k_BKLD, new_RL, kv_RM, (is_token_RL, real_RM) if padded else None, forward),
        )

    def _prepare(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        q_RL: Tensor,
        kv_RM: Tensor,
        real: tuple[Tensor, Tensor] | None,
        forward: Forward,
    ) -> Any:
        """Return the pattern over these positions as the kernel prepares it. Raises InputError if the kernel can't."""
        demand = Demand(
            device_type=q_BHLD.device.type,
            dtype=q_BHLD.dtype,
            head_dim=q_BHLD.shape[-1] * (1 if self._rotation is None else 2),
            softcap=None,
        )
        if reason := forward.kernel.refusal(demand):
            raise InputError(f"positions of the cache double the head dimension, and the kernel {reason}")
        sinks, recent = self._slots.num_sinks, self._slots.num_recent
        return forward.kernel.prepare(
            Mask(
                q_length=q_RL.shape[1],
                kv_length=kv_RM.shape[1],
                num_heads=1,
                num_key_value_groups=q_BHLD.shape[1] // k_BKLD.shape[1],
                head_dim=demand.head_dim,
                device=q_BHLD.device,
                dtype=q_BHLD.dtype,
                allowed=causal_mask_function,  # kept keys have lower indices than new ones
                visible=lambda b, h, q_pos, kv_pos: (kv_pos < sinks) | (q_pos - kv_pos < recent),
                q_offset=kv_RM.shape[1] - q_RL.shape[1],
                positions=(q_RL.int(), kv_RM.int()),
                # Padding is a document of its own: a padding query sees padding, so that no row of softmax is empty.
                documents=real and (real[0].int(), real[1].int()),
            )
        )
