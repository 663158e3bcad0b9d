"""Lists of blocks against the mask evaluated pair by pair."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lctrain.kernels import block_mask as module
from lctrain.kernels.block_mask import block_mask
from lctrain.kernels.mask import Mask

LENGTH, HEADS = 700, 4  # 700 is 5.5 blocks
PATTERNS = {
    "causal": lambda b, h, q, k: k <= q,
    "window": lambda b, h, q, k: q - k < 150,
    "streaming": lambda b, h, q, k: (k < 3) | (q - k < 100),
    "s2": lambda b, h, q, k: (q + (h >= 2) * 64) // 128 == (k + (h >= 2) * 64) // 128,
    "dilated": lambda b, h, q, k: (q - k < 300) & ((q - k) % 2 == 0),
    "by head": lambda b, h, q, k: torch.tensor([True, False, True, False])[h] | (q - k < 50),
}


def mask_of(visible, documents=None, length=LENGTH):
    """Causal, as installed; rows of packed `documents` by their lengths."""
    mask = Mask(
        q_length=length, kv_length=length, num_heads=HEADS, num_key_value_groups=2, head_dim=8,
        device=torch.device("cpu"), dtype=torch.float32, allowed=lambda b, h, q, k: k <= q, visible=visible,
    )  # fmt: skip
    if documents is None:
        return mask
    rows = [torch.tensor(row) for row in documents]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents]).int()
    numbers = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in rows]).int()
    return replace(mask, positions=(positions, positions), documents=(numbers, numbers))


def dense(mask):
    return mask.evaluate(slice(0, mask.q_length), slice(0, mask.kv_length))


def blocks_of(mask, q_block, kv_block):
    """(whether any pair of a block attends, whether all do and the block is filled) [B, H, L, S] of blocks."""
    pairs = F.pad(dense(mask), (0, -mask.kv_length % kv_block, 0, -mask.q_length % q_block))
    tiles = pairs.unflatten(-1, (-1, kv_block)).unflatten(-3, (-1, q_block)).transpose(-2, -3)
    return tiles.any(-1).any(-1), tiles.all(-1).all(-1)


def listed(counts, lists, num):
    """The blocks that a list names, [B, H, M, num]."""
    named = torch.zeros(*counts.shape, num + 1, dtype=torch.bool)
    used = torch.arange(lists.shape[-1]) < counts[..., None]
    return named.scatter_(-1, torch.where(used, lists, num).long(), True)[..., :num]


@pytest.mark.parametrize("kv_block", [128, 64])
@pytest.mark.parametrize(
    "documents", [None, [[700]], [[300, 1, 399], [128, 128, 444]], [[20] * 35]], ids=["alone", "one", "packed", "many"]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_no_pair_is_lost_and_none_is_added(name, documents, kv_block):
    mask = mask_of(PATTERNS[name], documents)
    found = block_mask(mask, kv_block)
    some, all_ = blocks_of(mask, 128, kv_block)
    partial = listed(found.kv_num_blocks, found.kv_indices, some.shape[-1])
    full = listed(found.full_kv_num_blocks, found.full_kv_indices, some.shape[-1])
    assert not (partial & full).any()
    assert not (full & ~all_).any()
    assert not (some & ~(partial | full)).any()
    assert torch.equal(full, all_)  # no block that is full is asked pair by pair
    assert (partial & ~some).sum() <= 0.02 * some.sum()  # hardly any that is empty is computed
    for counts, lists, other in (
        (found.q_num_blocks, found.q_indices, partial),
        (found.full_q_num_blocks, found.full_q_indices, full),
    ):
        assert torch.equal(listed(counts, lists, some.shape[-2]), other.mT)


def test_lists_are_ascending_and_int32():
    found = block_mask(mask_of(PATTERNS["streaming"], [[300, 400]]))
    for counts, lists in ((found.kv_num_blocks, found.kv_indices), (found.full_q_num_blocks, found.full_q_indices)):
        assert counts.dtype == lists.dtype == torch.int32
        used = torch.arange(lists.shape[-1]) < counts[..., None]
        assert (lists.diff(dim=-1)[used[..., 1:]] > 0).all()


def test_lists_are_as_wide_as_the_longest():
    window = block_mask(mask_of(PATTERNS["window"], length=128 * 64))
    assert window.kv_indices.shape == window.q_indices.shape == (1, HEADS, 64, 3)
    assert block_mask(mask_of(PATTERNS["s2"])).full_kv_indices.shape[-1] == 2  # none is full; torch wants two
    one = block_mask(mask_of(PATTERNS["causal"], length=100))  # more entries than blocks are refused by flash-attn-4
    assert one.kv_indices.shape == one.full_q_indices.shape == (1, HEADS, 1, 1)
    causal = block_mask(mask_of(PATTERNS["causal"], length=128 * 5))
    assert causal.kv_indices.shape == causal.full_kv_indices.shape  # which FlexAttention takes for granted


def test_many_blocks_are_bounded_in_parts(monkeypatch):
    mask = mask_of(PATTERNS["s2"], [[300, 1, 399]])
    whole = block_mask(mask)
    monkeypatch.setattr(module, "MAX_PAIRS", 300)
    parts = block_mask(mask)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_indices", "q_indices", "full_q_num_blocks"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_large_lists_make_larger_blocks_of_queries(monkeypatch):
    mask = mask_of(PATTERNS["causal"], length=768)
    assert block_mask(mask).BLOCK_SIZE == (128, 128)
    monkeypatch.setattr(
        module, "MAX_LIST_BYTES", 2 * HEADS * 6 * 2 * 5 * 4 // 2
    )  # half of 6 rows, two lists of 5, twice
    large = block_mask(mask)
    assert large.BLOCK_SIZE == (256, 128)
    some, all_ = blocks_of(mask, 256, 128)
    partial = listed(large.kv_num_blocks, large.kv_indices, 6)
    full = listed(large.full_kv_num_blocks, large.full_kv_indices, 6)
    assert torch.equal(partial | full, some)
    assert torch.equal(full, all_)


def test_many_pairs_of_blocks_make_larger_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(module, "MAX_GRID", HEADS * 2 * 6)
    assert block_mask(mask_of(PATTERNS["s2"])).BLOCK_SIZE == (512, 128)


def test_a_mask_without_bounds_is_evaluated(monkeypatch):
    """A table over pairs of positions: nothing is known of a block without looking."""
    noise = torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.1
    calls = []
    monkeypatch.setattr(module, "create_block_mask", lambda *args, **options: calls.append((args, options)))
    block_mask(mask_of(lambda b, h, q, k: noise[q, k]))
    (mask_mod, *sizes), options = calls.pop()
    assert sizes == [1, HEADS, LENGTH, LENGTH]
    assert options["_compile"]
    assert options["BLOCK_SIZE"] == (128, 128)
    q, k = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
    assert torch.equal(mask_mod(0, 0, q, k), noise & (k <= q))


def test_other_documents_compile_nothing_anew():
    """A batch's documents change numbers in tables, whose widths torch must not hold for constants."""
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    def attend(x, mask: BlockMask):
        return flex_attention(x, x, x, block_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=count, dynamic=False, fullgraph=True)
    x = torch.randn(1, HEADS, LENGTH, 16)
    for documents in ([[300, 400]], [[100, 500, 100]], [[20] * 35], [[700]]):
        mask = mask_of(PATTERNS["s2"], documents)
        expected = F.scaled_dot_product_attention(x, x, x, attn_mask=dense(mask))
        torch.testing.assert_close(compiled(x, block_mask(mask)), expected)
    assert len(frames) == 1
