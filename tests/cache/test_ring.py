import pytest
import torch

from lctrain.cache.ring import Slots, _pieces
from lctrain.kernels import few_queries


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, [1]), (127, [127]), (128, [128]), (700, [512, 128, 60]), (32767, [2**i for i in range(14, 6, -1)] + [127])],
)
def test_prompts_are_read_in_pieces_of_few_lengths(length, expected):
    pieces = list(_pieces(length))
    assert [piece.stop - piece.start for piece in pieces] == expected
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]


def test_pieces_change_nothing(serving, ids, monkeypatch):
    tokens, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :17] = 0
    for name in ("duo", "duo in the cache"):
        model, policy = serving(name)
        logits = []
        for few in (64, 4):
            monkeypatch.setattr(few_queries, "FEW", few)
            assert len(list(_pieces(60))) == (1 if few == 64 else 4)
            logits.append(model(tokens, attention_mask=mask, past_key_values=policy.new(model)).logits[mask.bool()])
        torch.testing.assert_close(*logits)


@pytest.mark.parametrize(("num_sinks", "num_recent"), [(0, 1), (0, 4), (3, 5), (2, 1)])
def test_slots_hold_the_first_and_the_last(num_sinks, num_recent):
    """Against a row that is written token by token."""
    slots = Slots(num_sinks, num_recent)
    written = torch.full((slots.number,), -1)
    for position in range(30):
        assert slots.positions(torch.tensor([[position]]))[0].tolist() == written.tolist()
        written[slots.of(torch.tensor(position))] = position
        kept = {p for p in range(position + 1) if p < num_sinks or p > position - num_recent}
        assert kept <= set(written.tolist()) - {-1}
