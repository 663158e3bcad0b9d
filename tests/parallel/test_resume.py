"""A run goes on as it began on any number of ranks, however sharded; whatever wrote a checkpoint can be exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.checkpoint import read_values
from lctrain.export import export
from lctrain.folder import rank_files, read_history
from tests.parallel.ranks import Runs, on_cards

MIDDLE, END = "checkpoints/step-00000006.ckpt", "checkpoints/step-00000012.ckpt"
ROWS_PER_STEP = 4
TOLERANCE = 1e-5
SHARED = [
    *("trainer.max_steps=12", "trainer.val_check_interval=1000", "scheduler.num_warmup_steps=2", "curriculum=staged"),
    *("callbacks.checkpoint.every_num_steps=6", "attention=shifted_sparse"),
]
ADAMW = ["optimizer.lr=1e-3", "optimizer.eps=1e-5", "optimizer.weight_decay=0.1"]
KINDS = {
    "full": ADAMW,
    "longlora": ["tuning=longlora", *ADAMW],
    "sgd": ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"],
}


def case(kind, strategy, ranks, sp=1):
    rows = f"datamodule.micro_batch_size={ROWS_PER_STEP * sp // ranks}"
    return [*SHARED, *KINDS[kind], f"strategy={strategy}", f"sequence_parallel_size={sp}", rows]


BEGUN = {  # number of ranks → what they run from the first step to the last
    1: {f"{kind}-single": case(kind, "single", 1) for kind in KINDS},
    2: {f"{kind}-{s}-sp{sp}": case(kind, s, 2, sp) for kind in KINDS for s, sp in (("zero1", 1), ("zero3", 2))}
    | {"dropout": [*case("longlora", "ddp", 2), "tuning.lora_dropout=0.3"]},
}
CONTINUED = {  # number of ranks → what goes on from the middle of which, and how
    1: [("full-zero3-sp2", "single", 1), ("longlora-zero1-sp1", "single", 1), ("sgd-zero3-sp2", "single", 1)],
    2: [
        *(("full-single", "zero2", 1), ("full-single", "zero3", 2), ("full-zero3-sp2", "ddp", 1)),
        *(("full-zero1-sp1", "zero3", 2), ("longlora-single", "zero3", 1), ("longlora-zero3-sp2", "zero1", 2)),
        *(("sgd-single", "zero3", 2), ("sgd-zero3-sp2", "zero2", 1), ("sgd-zero1-sp1", "ddp", 2)),
    ],
    4: [("full-zero3-sp2", "zero3", 2), ("longlora-zero1-sp1", "zero3", 4), ("full-single", "ddp", 1)],
}


BEGUN_ON_CARDS = {1: {"full-single": BEGUN[1]["full-single"]}} | {
    2: {name: BEGUN[2][name] for name in ("full-zero3-sp2", "longlora-zero1-sp1")}
}
CONTINUED_ON_CARDS = {
    1: [("full-zero3-sp2", "single", 1)],
    2: [("full-single", "zero2", 1), ("full-zero3-sp2", "ddp", 1), ("longlora-zero1-sp1", "zero3", 2)],
}


def names(ranks, continued):
    return [f"{source}-then-{ranks}-{strategy}-sp{sp}" for source, strategy, sp in continued[ranks]]


def pairs(continued):
    """Number of ranks, source and name of every run that goes on."""
    return [
        (n, source[0], name) for n in continued for source, name in zip(continued[n], names(n, continued), strict=True)
    ]


class Resumed:
    """Runs that are begun, and others that go on from their middles, on CPUs or on cards."""

    def __init__(self, train, begun, continued, place) -> None:
        self._train, self._continued, self._place = train, continued, place
        runs = {ranks: train(ranks, self._cases(cases)) for ranks, cases in begun.items()}
        self._begun = {name: runs[ranks] for ranks, cases in begun.items() for name in cases}
        self._after: dict[int, Runs] = {}

    def _cases(self, cases):
        return {name: self._place(words) for name, words in cases.items()}

    def begun(self, name: str) -> Path:
        return self._begun[name][name]

    def after(self, ranks: int, name: str) -> Path:
        if ranks not in self._after:
            self._after[ranks] = self._train(ranks, self._cases(dict(map(self._goes_on, self._continued[ranks]))))
        return self._after[ranks][name]

    def _goes_on(self, then) -> tuple[str, list[str]]:
        """From the checkpoint of a source that has ended; if it failed, this one does, too."""
        source, name, words = then
        self._begun[source].troubles()
        return name, [*words, f"resume={self._begun[source].folder / source / MIDDLE}"]


def then(ranks, continued):
    """What goes on from which source: its name and overrides."""
    return [
        (source, name, case(source.partition("-")[0], strategy, ranks, sp))
        for name, (source, strategy, sp) in zip(names(ranks, continued), continued[ranks], strict=True)
    ]


@pytest.fixture(scope="module")
def resumed(train_on_ranks) -> Resumed:
    continued = {ranks: then(ranks, CONTINUED) for ranks in CONTINUED}
    continued[2].append(("dropout", "dropout", BEGUN[2]["dropout"]))
    return Resumed(train_on_ranks, BEGUN, continued, list)


@pytest.fixture(scope="module")
def resumed_on_cards(train_on_ranks) -> Resumed:
    continued = {ranks: then(ranks, CONTINUED_ON_CARDS) for ranks in CONTINUED_ON_CARDS}
    return Resumed(train_on_ranks, BEGUN_ON_CARDS, continued, on_cards)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("ranks", "source", "name"), pairs(CONTINUED))
def test_it_goes_on_as_it_would_have(resumed, ranks, source, name):
    compare(resumed.begun(source), resumed.after(ranks, name), ranks)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("ranks", "source", "name"), pairs(CONTINUED_ON_CARDS))
def test_on_cards_it_goes_on_as_it_would_have(resumed_on_cards, ranks, source, name):
    """To the same 1e-5: all is fp32 by the same kernels, only sums over a step run in another order."""
    compare(resumed_on_cards.begun(source), resumed_on_cards.after(ranks, name), ranks)


def compare(begun, after, ranks):
    """Losses of the steps after the middle, and the weights after the last."""
    rows = read_history(begun / "metrics.jsonl")[6:]
    others = read_history(after / "metrics.jsonl")
    assert [row["step"] for row in others] == list(range(7, 13))
    for row, other in zip(rows, others, strict=True):
        assert (other["sequence_length"], other["lr"]) == (row["sequence_length"], row["lr"])
        assert other["loss"] == pytest.approx(row["loss"], abs=TOLERANCE)
    assert furthest(read_values(begun / END), read_values(after / END)) < TOLERANCE
    assert furthest(read_values(begun / MIDDLE), read_values(after / END)) > 100 * TOLERANCE  # it did train
    assert len(rank_files(after / END)) == ranks


def test_on_the_same_ranks_it_is_the_same_to_the_bit(resumed):
    """With dropout, so that every rank's own generator counts."""
    begun, after = resumed.begun("dropout"), resumed.after(2, "dropout")
    rows, others = read_history(begun / "metrics.jsonl")[6:], read_history(after / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert furthest(read_values(begun / END), read_values(after / END)) == 0


@pytest.mark.parametrize("name", [name for cases in BEGUN.values() for name in cases if name != "dropout"])
def test_any_of_them_can_be_exported(resumed, tmp_path, ids, name):
    """Weights and logits are those of one process."""
    kind = name.partition("-")[0]
    folders = [export(str(resumed.begun(run)), "auto", str(tmp_path / run)) for run in {name, f"{kind}-single"}]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    with torch.no_grad():
        logits = [model(ids(1, 64)).logits for model in models]
    assert torch.allclose(logits[0], logits[-1], atol=1e-4)
    assert furthest(dict(models[0].named_parameters()), dict(models[-1].named_parameters())) < 3 * TOLERANCE
