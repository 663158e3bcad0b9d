import os
import signal

import pytest

from lctrain.errors import InputError, Stopped
from lctrain.evaluation.journal import Journal


def never():
    raise AssertionError("was measured before")


def test_a_cell_is_measured_once(tmp_path):
    path = tmp_path / "cells.jsonl"
    first = Journal(path).once(("after", "needle", 512, 0.1), lambda: {"share": (0.1, 1 / 3)})
    again = Journal(path)
    assert again.once(("after", "needle", 512, 0.1), never) == first == {"share": [0.1, 1 / 3]}
    assert ("after", "needle", 512, 0.2) not in again
    assert again.once(("after", "needle", 512, 0.2), lambda: 3) == 3


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "cells.jsonl"
    for cell in (1, 2):
        Journal(path).once((cell,), lambda: 7)
    os.truncate(path, path.stat().st_size - 5)
    journal = Journal(path)
    assert journal.once((1,), never) == 7
    assert journal.once((2,), lambda: 8) == 8
    assert Journal(path).measured == {(1,): 7, (2,): 8}


def test_what_is_measured_stays_the_same(tmp_path):
    Journal(tmp_path / "c").require("the weights", [["a", 1]])
    Journal(tmp_path / "c").require("the weights", [["a", 1]])
    with pytest.raises(InputError, match=r"resume=auto: the weights changed since .*/c began"):
        Journal(tmp_path / "c").require("the weights", [["a", 2]])


def test_nothing_is_kept_without_a_path():
    journal = Journal()
    assert journal.once((1,), lambda: 5) == 5
    assert (1,) in journal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_cell_be_finished(tmp_path, number):
    before = signal.getsignal(number)
    with (
        pytest.raises(Stopped, match=f"stopped by {number.name}; go on with resume=auto"),
        Journal(tmp_path / "c") as j,
    ):
        j.once((1,), lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before
    assert (1,) in Journal(tmp_path / "c")
