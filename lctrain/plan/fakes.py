"""Fake CUDA-only kernels for planning: they allocate and save the same tensors, without data.

Shape legend: B rows, H query heads, K key-value heads, L tokens, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lctrain.attention.base import Attention, Call, Extra, Layout, MaskedAttention, Rows
from lctrain.kernels.mask import IndexMask
from lctrain.memory.recall import attend_once
from lctrain.model.layers import LayerKernels
from lctrain.parallel.ulysses import Ulysses
from lctrain.plan.flops import layer_layout


class FakeUlysses(Ulysses):
    """The exchange as the first of `size` ranks sees it: what it receives is allocated, and nothing is sent."""

    def __init__(self, size: int) -> None:
        object.__setattr__(self, "_size", size)

    @property
    def size(self) -> int:
        return self._size  # type: ignore[no-any-return,attr-defined]

    @property
    def rank(self) -> int:
        return 0

    def _exchange(self, x_n: Tensor) -> Tensor:
        out: Tensor = _Received.apply(x_n)  # type: ignore[no-untyped-call]
        return out


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_n: Tensor) -> Tensor:
        return torch.empty_like(x_n, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, d_out_n: Tensor) -> Tensor:
        return torch.empty_like(d_out_n.contiguous())


def attend_by(method: Attention, length: int, sequence_parallel_size: int) -> Callable[..., tuple[Tensor, None]]:
    """Return a function for `AttentionInterface` that fakes `method` on rows of `length`, shared by this many ranks.

    Each of the method's patterns runs a fake fused kernel, which saves its inputs, its output and a log-sum-exp per
    query.
    """
    ulysses = FakeUlysses(sequence_parallel_size) if sequence_parallel_size > 1 else None
    shared: dict[Any, Any] = {}

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, first_head: int = 0, **_: Any
    ) -> tuple[Tensor, None]:
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        layout = replace(layer_layout(module.config, length, module.layer_idx), first_head=first_head)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return method.attend(module, q, k, v, FakeCall(layout, q.shape[0], shared))

        out = attention(q, k, v) if ulysses is None else ulysses.attend(attention, q, k, v)
        return out.transpose(1, 2), None

    return attend


@dataclass(frozen=True)
class FakeCall(Call):
    """A call in which a fake fused kernel attends, over rows of one document each."""

    layout: Layout
    batch: int
    shared: dict[Any, Any]
    scaling: float = 1.0

    @cached_property
    def rows(self) -> Rows:
        length = self.layout.length
        return Rows(
            positions_BS=torch.arange(length).expand(self.batch, -1),
            documents_BS=torch.zeros(length, dtype=torch.int64).expand(self.batch, -1),
            first_query=0,
            num_queries=length,
            shared=self.shared,
        )

    def run(self, pattern: MaskedAttention, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        return attend_once(_FusedAttention.apply, q_BHLD, k_BKSD, v_BKSD)

    def over(
        self, visible: IndexMask, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, extra: Extra | None = None
    ) -> Tensor:
        if extra is not None:
            k_BKSD, v_BKSD = torch.cat((extra.k_BKED, k_BKSD), 2), torch.cat((extra.v_BKED, v_BKSD), 2)
        return attend_once(_FusedAttention.apply, q_BHLD, k_BKSD, v_BKSD)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
        B, H, L, _ = q_BHLD.shape
        out_BHLD = q_BHLD.new_empty(B, L, H, v_BKLD.shape[-1]).transpose(1, 2)  # strides as the next layer needs them
        ctx.save_for_backward(q_BHLD, k_BKLD, v_BKLD, out_BHLD, q_BHLD.new_empty(B, H, L, dtype=torch.float32))
        return out_BHLD

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors  # a real kernel holds all of them until its end
        summed = [q, k, v] if q.shape[1] != k.shape[1] else [q]  # gradients to which several blocks add, in fp32
        workspace = [torch.empty_like(x, dtype=torch.float32) for x in summed]
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        del workspace, out, lse
        return gradients


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype)


loss_of: Callable[[Tensor], Tensor] = _Loss.apply  # a number whose gradient is as large as the hidden states


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        ctx.in_place = in_place
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy if ctx.in_place else torch.empty_like(dy), torch.empty_like(ctx.saved_tensors[1]), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors  # type: ignore[no-any-return]  # the real kernel writes gradients over its inputs


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, weight, in_place)  # type: ignore[no-untyped-call]
    return out


LAYER_KERNELS = LayerKernels(
    rms_norm=_rms_norm, swiglu=_Gate.apply, geglu=_Gate.apply, rope=lambda q, k, cos, sin: (q, k)
)


class _Stored:
    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.back: Tensor | None = None


class CountingHost:
    """A fake host memory that only counts its bytes, in powers of two, as torch pins them."""

    num_bytes = 0

    def put(self, tensor: Tensor) -> _Stored:
        self.num_bytes += 1 << (tensor.numel() * tensor.itemsize - 1).bit_length()
        return _Stored(tensor)

    def fetch(self, stored: _Stored) -> None:
        stored.back = torch.empty(stored.shape, dtype=stored.dtype)

    def take(self, stored: _Stored) -> Tensor:
        if stored.back is None:
            self.fetch(stored)
        back, stored.back = stored.back, None
        assert back is not None
        return back
