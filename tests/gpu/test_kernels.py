"""On a card: every kernel against the reference in fp32, forward and gradients, for every static pattern."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lctrain.attention.base import Layout, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.kernels.base import MaskMod, MaskShape
from lctrain.kernels.choose import KERNELS
from lctrain.kernels.reference import ReferenceKernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METHODS: dict[str, MaskedAttention] = {
    "full": FullAttention(),
    "sliding_window": SlidingWindowAttention(sliding_window=200),
    "streaming": StreamingAttention(num_sink_tokens=4, recent_size=150),
    "shifted_sparse": ShiftedSparseAttention(group_size_ratio=None, group_size=256),
}


def mask_of(method: MaskedAttention, length: int, heads: int, kv_heads: int, documents: list[int]) -> MaskMod:
    """The pattern inside each packed document, causal."""
    doc = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).cuda()
    pos = torch.cat([torch.arange(n) for n in documents]).cuda()
    visible = method.visible(
        Layout(length=length, num_attention_heads=heads, num_key_value_heads=kv_heads, layer_idx=0)
    )

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (doc[q_idx] == doc[kv_idx]) & visible(b, h, pos[q_idx], pos[kv_idx])

    return mask_mod


def run(kernel: Any, prepared: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (x.detach().to(dtype, copy=True).requires_grad_() for x in inputs[:3])
    out = kernel.attend(q, k, v, prepared, scaling=q.shape[-1] ** -0.5, softcap=None)
    out.backward(inputs[3].to(dtype))
    return [out.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("documents", [[1000], [300, 1, 699]], ids=["alone", "packed"])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 4, 2), (128, 8, 2), (128, 4, 4)])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_kernel_equals_reference(
    kernel: str, name: str, head_dim: int, heads: int, kv_heads: int, documents: list[int]
) -> None:
    torch.manual_seed(0)
    length = sum(documents)
    sizes = (heads, kv_heads, kv_heads, heads)
    inputs = [torch.randn(1, n, length, head_dim, device="cuda") for n in sizes]
    mask_mod = mask_of(METHODS[name], length, heads, kv_heads, documents)
    shape = MaskShape(
        batch=1,
        num_heads=heads,
        num_key_value_groups=heads // kv_heads,
        q_length=length,
        kv_length=length,
        device=inputs[0].device,
        dtype=torch.bfloat16,
    )
    reference = ReferenceKernel()
    expected = run(reference, reference.prepare(mask_mod, shape), inputs, torch.float32)
    chosen = KERNELS[kernel]()
    actual = run(chosen, chosen.prepare(mask_mod, shape), inputs, torch.bfloat16)
    for got, want in zip(actual, expected, strict=True):
        # bf16 keeps 8 bits: a relative error of 2**-8 an operand, about 1e-2 over a sum
        assert torch.linalg.norm(got - want) / torch.linalg.norm(want) < 1.5e-2
