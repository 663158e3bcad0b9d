"""A run goes on as it began on any number of ranks, however sharded; whatever wrote a checkpoint can be exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.checkpoint import read_values
from lctrain.export import export
from lctrain.folder import rank_files, read_history

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


def names(ranks):
    return [f"{source}-then-{ranks}-{strategy}-sp{sp}" for source, strategy, sp in CONTINUED[ranks]]


@pytest.fixture(scope="module")
def begun(train_on_ranks) -> dict[str, Path]:
    folders = {ranks: train_on_ranks(ranks, cases) for ranks, cases in BEGUN.items()}
    return {name: folders[ranks] / name for ranks, cases in BEGUN.items() for name in cases}


@pytest.fixture(scope="module")
def continued(train_on_ranks, begun):
    folders: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in folders:
            cases = {
                name: [*case(source.partition("-")[0], strategy, ranks, sp), f"resume={begun[source] / MIDDLE}"]
                for name, (source, strategy, sp) in zip(names(ranks), CONTINUED[ranks], strict=True)
            }
            if ranks == 2:
                cases["dropout"] = [*BEGUN[2]["dropout"], f"resume={begun['dropout'] / MIDDLE}"]
            folders[ranks] = train_on_ranks(ranks, cases)
        return folders[ranks]

    return of


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("ranks", "source", "name"), [(n, CONTINUED[n][i][0], name) for n in CONTINUED for i, name in enumerate(names(n))]
)
def test_it_goes_on_as_it_would_have(begun, continued, ranks, source, name):
    after = continued(ranks) / name
    rows = read_history(begun[source] / "metrics.jsonl")[6:]
    others = read_history(after / "metrics.jsonl")
    assert [row["step"] for row in others] == list(range(7, 13))
    for row, other in zip(rows, others, strict=True):
        assert (other["sequence_length"], other["lr"]) == (row["sequence_length"], row["lr"])
        assert other["loss"] == pytest.approx(row["loss"], abs=TOLERANCE)
    assert furthest(read_values(begun[source] / END), read_values(after / END)) < TOLERANCE
    assert furthest(read_values(begun[source] / MIDDLE), read_values(after / END)) > 100 * TOLERANCE  # it did train
    assert len(rank_files(after / END)) == ranks


def test_on_the_same_ranks_it_is_the_same_to_the_bit(begun, continued):
    """With dropout, so that every rank's own generator counts."""
    rows = read_history(begun["dropout"] / "metrics.jsonl")[6:]
    others = read_history(continued(2) / "dropout/metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert furthest(read_values(begun["dropout"] / END), read_values(continued(2) / "dropout" / END)) == 0


@pytest.mark.parametrize("name", [name for cases in BEGUN.values() for name in cases if name != "dropout"])
def test_any_of_them_can_be_exported(begun, tmp_path, ids, name):
    """Weights and logits are those of one process."""
    kind = name.partition("-")[0]
    folders = [export(str(begun[run]), "auto", str(tmp_path / run)) for run in {name, f"{kind}-single"}]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    with torch.no_grad():
        logits = [model(ids(1, 64)).logits for model in models]
    assert torch.allclose(logits[0], logits[-1], atol=1e-4)
    assert furthest(dict(models[0].named_parameters()), dict(models[-1].named_parameters())) < 3 * TOLERANCE
