"""What is kept of attention, seen by the tensors that autograd hands out."""

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lctrain.memory.recall import attend_once, recording, replaying, save


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_saved_tensors_come_back_once_computed():
    x = torch.randn(3, requires_grad=True)
    (same,), recall = save(x)
    assert torch.equal(same, x)
    assert recall()[0] is recall()[0]
    assert torch.equal(recall()[0], x)


def test_queries_keys_and_values_are_left_to_the_checkpoint():
    """Between forward and backward a checkpointed attention holds one tensor of theirs: the output."""
    x = torch.randn(1, 2, 16, 4, requires_grad=True)
    inputs: list[StorageWeakRef] = []

    def layer(x):
        q, k, v = x * 2, x * 3, x * 4
        inputs.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (q, k, v))
        return attend_once(causal, q, k, v).square()

    calls = []
    context = lambda: (recording(calls, keep=True), replaying(calls))  # noqa: E731
    out = checkpoint(layer, x, use_reentrant=False, context_fn=context)
    assert len(calls) == 1
    assert all(storage.expired() for storage in inputs)
    out.sum().backward()
    expected = torch.autograd.grad(causal(x * 2, x * 3, x * 4).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_outside_of_a_checkpoint_it_is_plain_attention():
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    assert torch.equal(attend_once(causal, q, q, q), causal(q, q, q))
