import pytest
import torch
from torch.nn.functional import pad
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from lctrain.attention.base import Rows
from lctrain.attention.blocks import Blocks, refuse_own_window
from lctrain.errors import InputError

LENGTHS = [5, 1, 9, 6, 3]
PACKED = torch.cat([torch.arange(n) for n in LENGTHS]), torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))
IS_TOKEN = torch.tensor([0] * 3 + [1] * 8 + [0] * 2 + [1] * 7 + [0] * 4)
PADDED = (IS_TOKEN.cumsum(0) - 1).clamp(min=0), IS_TOKEN  # as the forward numbers them: padding is document 0
ROOM = 6  # tokens that a cache has room for, whose tables hold anything


def blocks_and_slots(size):
    positions, documents = (pad(torch.stack(x), (0, ROOM)) for x in zip(PACKED, PADDED, strict=True))
    rows = Rows(positions_BS=positions, documents_BS=documents, first_query=20, num_queries=4, shared={})
    blocks = Blocks.of_tokens(rows, size)
    assert Blocks.of_tokens(rows, size) is blocks
    return blocks, blocks.slots(24 + ROOM)


def expected(row, size):
    """Members of each block by (document, number), of documents that are no padding."""
    documents = (PACKED, PADDED)[row][1]
    found = {}
    for document in range(row, 5):
        tokens = (documents == document).nonzero()[:, 0].tolist()
        found |= {(document, n): tokens[n * size : (n + 1) * size] for n in range(len(tokens) // size)}
    return found


@pytest.mark.parametrize("row", [0, 1], ids=["packed", "padded"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 31])
def test_blocks_are_those_that_a_loop_over_documents_finds(size, row):
    """Padding is on both sides of the document and inside."""
    blocks, slots_BS = blocks_and_slots(size)
    tables = (blocks.documents_BN, blocks.numbers_BN, blocks.members_BNM, blocks.complete_BN)
    found, slots = {}, {}
    for slot, (document, number, members, complete) in enumerate(zip(*(x[row].tolist() for x in tables), strict=True)):
        if complete and document >= row:
            found[document, number] = members
            slots |= dict.fromkeys(members, slot)
    assert found == expected(row, size)
    tokens = [j for j in range(24) if (PACKED, PADDED)[row][1][j] >= row]
    assert [slots_BS[row, j] for j in tokens] == [slots.get(j, 30 // size) for j in tokens]


@pytest.mark.parametrize("size", [2, 3])
def test_groups_of_blocks_are_larger_blocks(size):
    """Blocks of a document that has too few of them make no group with those of the next document."""
    blocks, _ = blocks_and_slots(2)
    groups, found = blocks.groups(size), {}
    for group in groups.complete_BN[0].nonzero()[:, 0].tolist():
        tokens = blocks.members_BNM[0, groups.members_BNM[0, group]].flatten().tolist()
        found[int(groups.documents_BN[0, group]), int(groups.numbers_BN[0, group])] = tokens
    assert found == expected(0, 2 * size)


def test_what_is_taken_is_that_of_the_members():
    blocks, _ = blocks_and_slots(3)
    x = torch.randn(2, 4, 30, 5, generator=torch.Generator().manual_seed(0))
    taken = blocks.take(x)
    for b, n in ((0, 1), (1, 2)):
        assert torch.equal(taken[b, :, n], x[b, :, blocks.members_BNM[b, n]])


def test_a_model_with_its_own_window_is_refused():
    refuse_own_window(None, LlamaConfig())
    refuse_own_window(None, Qwen2Config(sliding_window=5, use_sliding_window=False))
    with pytest.raises(InputError, match="this one sees 5 tokens"):
        refuse_own_window(None, MistralConfig(sliding_window=5))
