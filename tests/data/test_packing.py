"""Every token in its place: nothing lost, nothing twice, nothing but the step decides."""

from collections import Counter
from math import ceil

import numpy as np
import pytest

from lctrain.data.curriculum import Curriculum, Fixed, Staged
from lctrain.data.packing import Packing, StreamPacking, WholePacking, cut
from lctrain.errors import InputError

LENGTHS = np.random.default_rng(0).integers(1, 90, 50)
DOCUMENTS = np.arange(0, 50, 2)  # the others are not trained on
STAGED = Staged(
    sequence_length=48,
    num_steps=-1,
    stages=[{"sequence_length": 20, "steps": 2}, {"sequence_length": 32, "steps": 2}, {"fraction": 1.0}],
)


def build(kind: type[Packing], *, curriculum: Curriculum | None = None, num_micro_batches: int = 4) -> Packing:
    return kind(
        documents=DOCUMENTS,
        lengths=LENGTHS,
        curriculum=curriculum or Fixed(sequence_length=48),
        micro_batch_tokens=96,
        num_micro_batches=num_micro_batches,
        seed=3,
    )


def test_cut_reaches_every_token_once() -> None:
    ends = np.cumsum(LENGTHS)
    documents = np.arange(50)
    for size in (1, 7, 64, 10_000):
        pieces = [p for at in range(0, ends[-1], size) for p in cut(documents, ends, at, min(at + size, ends[-1]))]
        seen = [(document, token) for document, first, stop in pieces for token in range(first, stop)]
        assert seen == [(document, token) for document in range(50) for token in range(LENGTHS[document])]


@pytest.mark.parametrize("curriculum", [None, STAGED])
def test_stream_reads_every_token_once_an_epoch(curriculum: Curriculum | None) -> None:
    packing = build(StreamPacking, curriculum=curriculum)
    epoch_tokens = int(LENGTHS[DOCUMENTS].sum())
    stream: list[tuple[int, int]] = []
    for step in range(ceil(2 * epoch_tokens / (4 * 96))):
        for index in range(4):
            rows = packing.rows(step, index)
            sizes = [sum(stop - first for _, first, stop in row) for row in rows]
            assert sum(sizes) == 96
            assert set(sizes[:-1]) <= {packing.length_at(step)}
            stream += [(d, token) for row in rows for d, first, stop in row for token in range(first, stop)]
    wanted = Counter((int(d), token) for d in DOCUMENTS for token in range(LENGTHS[d]))
    assert Counter(stream[:epoch_tokens]) == wanted
    assert Counter(stream[epoch_tokens : 2 * epoch_tokens]) == wanted
    assert stream[:epoch_tokens] != stream[epoch_tokens : 2 * epoch_tokens]


def test_an_epoch_shorter_than_a_row_repeats() -> None:
    packing = StreamPacking(
        documents=np.array([0]),
        lengths=np.array([5]),
        curriculum=Fixed(sequence_length=12),
        micro_batch_tokens=12,
        num_micro_batches=1,
        seed=0,
    )
    assert packing.rows(0, 0) == [[(0, 0, 5), (0, 0, 5), (0, 0, 2)]]
    assert packing.rows(1, 0) == [[(0, 2, 5), (0, 0, 5), (0, 0, 4)]]


@pytest.mark.parametrize("kind", [StreamPacking, WholePacking])
@pytest.mark.parametrize("curriculum", [None, STAGED])
def test_a_step_needs_no_steps_before_it(kind: type[Packing], curriculum: Curriculum | None) -> None:
    packing = build(kind, curriculum=curriculum)
    in_order = [[packing.rows(step, index) for index in range(4)] for step in range(8)]
    assert [build(kind, curriculum=curriculum).rows(step, 3) for step in (7, 2, 5)] == [
        in_order[step][3] for step in (7, 2, 5)
    ]


@pytest.mark.parametrize("curriculum", [None, STAGED])
def test_whole_documents_are_never_cut_and_come_once_an_epoch(curriculum: Curriculum | None) -> None:
    packing = build(WholePacking, curriculum=curriculum)
    seen: Counter[int] = Counter()
    for step in range(12):
        length = packing.length_at(step)
        for index in range(4):
            rows = packing.rows(step, index)
            assert len(rows) == ceil(96 / length)
            for row in rows:
                assert sum(stop for _, _, stop in row) <= length
                assert all(first == 0 and stop == LENGTHS[document] for document, first, stop in row)
            assert sum(stop for row in rows for _, _, stop in row) <= 96
            seen.update(document for row in rows for document, _, _ in row)
    assert set(seen) == {int(d) for d in DOCUMENTS if LENGTHS[d] <= 48}
    if curriculum is None:
        assert max(seen.values()) - min(seen.values()) <= 1


def test_what_whole_packing_drops_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    packing = build(WholePacking, curriculum=STAGED)
    assert isinstance(packing, WholePacking)
    for length in (20, 32, 48):
        dropped = sum(LENGTHS[d] > length for d in DOCUMENTS)
        assert packing.num_dropped(length) == dropped
        assert f"rows of {length} tokens drop {dropped} of 25 documents" in caplog.text


def test_whole_packing_refuses_rows_that_hold_no_document() -> None:
    with pytest.raises(InputError, match="every document is longer than 4 tokens"):
        WholePacking(
            documents=np.array([0, 1]),
            lengths=np.array([5, 6]),
            curriculum=Fixed(sequence_length=4),
            micro_batch_tokens=8,
            num_micro_batches=1,
            seed=0,
        )
