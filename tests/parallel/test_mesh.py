"""Who shares a row with whom, and how heads are shared out."""

import pytest
import torch
from hydra.errors import InstantiationException

from lctrain.errors import InputError
from lctrain.parallel.mesh import Mesh
from lctrain.parallel.ulysses import check_heads, num_repeats


def test_neighbours_share_a_row():
    meshes = [Mesh(rank=rank, world_size=6, sequence_parallel_size=3) for rank in range(6)]
    assert [mesh.data_parallel_rank for mesh in meshes] == [0, 0, 0, 1, 1, 1]
    assert {mesh.data_parallel_size for mesh in meshes} == {2}
    row = torch.arange(12)
    assert torch.equal(torch.cat([row[mesh.part(12)] for mesh in meshes[:3]]), row)


@pytest.mark.parametrize("size", [0, 4, 16])
def test_a_size_that_does_not_divide_the_ranks_is_refused(size):
    with pytest.raises(InputError, match=f"sequence_parallel_size={size} does not divide the 6 processes"):
        Mesh(rank=0, world_size=6, sequence_parallel_size=size)


@pytest.mark.parametrize(
    ("num_key_value_heads", "size", "repeats"), [(8, 2, 1), (8, 8, 1), (2, 4, 2), (6, 4, 2), (1, 8, 8)]
)
def test_key_value_heads_are_repeated_until_they_divide(num_key_value_heads, size, repeats):
    assert num_repeats(num_key_value_heads, size) == repeats
    assert num_key_value_heads * repeats % size == 0


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 3), (6, 6, 4), (12, 4, 8)])
def test_heads_that_cannot_be_shared_evenly_are_refused(heads, kv_heads, size):
    with pytest.raises(InputError, match=f"sequence_parallel_size={size} can't share {heads} attention heads"):
        check_heads(heads, kv_heads, size)


def test_rows_and_methods_that_cannot_be_shared_are_refused(run, monkeypatch):
    from lctrain.attention.full import FullAttention

    with pytest.raises(InputError, match="sequence_parallel_size=2 does not divide the 1 processes"):
        run("sequence_parallel_size=2")
    with pytest.raises(InstantiationException, match="rows of 63 tokens can't be shared evenly"):
        run("sequence_parallel_size=2", "sequence_length=63")
    monkeypatch.setattr(FullAttention, "supports_sequence_parallel", False)
    with pytest.raises(InputError, match="FullAttention needs whole rows; use sequence_parallel_size=1"):
        run("sequence_parallel_size=2")
