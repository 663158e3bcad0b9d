import json

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from lctrain.evaluation.pictures import column, draw, score_by_length, smooth
from lctrain.evaluation.report import Column, log_media, table, write_report

RECALL = {"passkey_before.png", "passkey_after.png", "passkey_by_depth.png"}
PICTURES = {"perplexity_by_length.png", "perplexity_by_position.png", "training.png", *RECALL}
HISTORY = [{"step": i, "loss": 3 - i / 20, "sequence_length": 512 if i < 10 else 4096} for i in range(20)]


def result(explosion, recall):
    ranges = {"start": [0, 2048], "end": [2048, 4096], "perplexity": [9.0, 9.0 * explosion], "num_tokens": [1, 1]}
    return {
        "perplexity": {
            "metric": "perplexity",
            "unit": "per token",
            "by_length": {"512": 9.5, "4096": 9.5 * explosion},
            "by_position": ranges,
        },
        "passkey": {
            "metric": "recall",
            "unit": "share",
            "by_length": {"512": 1.0, "4096": recall},
            "num_examples": 8,
            "by_depth": {"512": {"0.0": 1.0, "1.0": 1.0}, "4096": {"0.0": recall, "1.0": recall}},
        },
    }


RESULTS = {"before": result(200, 0.0), "after": result(0.5, 0.75)}


def test_report_json(tmp_path):
    report = write_report(
        tmp_path / "new", RESULTS, config={"seed": 1}, steps=20, tokens_per_second=1234.5, history=HISTORY
    )
    assert report == json.loads((tmp_path / "new/report.json").read_text())
    assert report["perplexity"] == {"before": {"512": 9.5, "4096": 1900.0}, "after": {"512": 9.5, "4096": 4.75}}
    assert report["passkey"]["after"] == {"512": 1.0, "4096": 0.75}
    assert (report["steps"], report["tokens_per_second"], report["config"]) == (20, 1234.5, {"seed": 1})
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert report["details"] == RESULTS


def test_pictures_show_something(tmp_path):
    write_report(tmp_path, RESULTS, config={}, history=HISTORY)
    assert {path.name for path in tmp_path.glob("*.png")} == PICTURES
    for name in PICTURES:
        image = imread(tmp_path / name)
        assert min(image.shape[:2]) > 500
        assert len(np.unique((255 * image[..., :3]).astype(int) @ [256**2, 256, 1])) > 50


def test_pictures_only_of_what_there_is(tmp_path):
    write_report(tmp_path, {"model": {"passkey": RESULTS["after"]["passkey"]}}, config={})
    assert {path.name for path in tmp_path.glob("*.png")} == {"passkey_model.png", "passkey_by_depth.png"}
    assert draw(tmp_path, {}) == []
    assert write_report(tmp_path, {}, config={})["details"] == {}


def test_scores_are_drawn_with_their_intervals(tmp_path):
    scores = {
        "metric": "qa_f1",
        "by_length": {"512": 0.5, "4096": 0.25},
        "interval": {"512": (0.3, 0.6), "4096": (0.1, 0.9)},
    }
    axes = score_by_length("qa", {"before": scores, "after": scores}).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["before", "after"]
    for bars in axes.containers:
        points, _, (ranges,) = bars.lines
        assert [*map(list, points.get_data())] == [[512, 4096], [0.5, 0.25]]
        assert np.array(ranges.get_segments())[:, :, 1] == pytest.approx(np.array([[0.3, 0.6], [0.1, 0.9]]))
    assert [path.name for path in draw(tmp_path, {"model": {"qa": scores}})] == ["qa_by_length.png"]


def test_table_shows_before_and_after_side_by_side():
    console = Console(width=100, record=True)
    console.print(table(RESULTS))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["512", "9.50", "9.50", "100%", "100%"] in lines
    assert ["4k", "1,900.00", "4.75", "0%", "75%"] in lines


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "100%"), (0.955, "95.5%"), (1 / 3, "33.3%"), (0.0015, "0.15%"), (0.0, "0%")]
)
def test_shares_have_three_digits(value, text):
    assert Column("ruler", "model", "share", {"512": value}).text(512) == text
    assert Column("ruler", "model", "share", {"512": value}).text(1024) == "-"


def test_wandb_gets_the_table_and_the_pictures(tmp_path):
    logged = {}
    write_report(tmp_path, RESULTS, config={}, history=HISTORY)
    log_media(type("Run", (), {"log": lambda _, media: logged.update(media)})(), tmp_path, RESULTS)
    numbers = {name: value for name, value in logged.items() if isinstance(value, float)}
    assert numbers["evaluation/perplexity/after/4096"] == 4.75
    assert numbers["evaluation/passkey/before/4096"] == 0.0
    assert len(numbers) == 8  # of two tasks, two models, two lengths
    assert set(logged) - set(numbers) == {
        "evaluation/by_length",
        "evaluation/by_cell",
        *(f"evaluation/{name.removesuffix('.png')}" for name in PICTURES),
    }
    by_length = logged["evaluation/by_length"]
    assert by_length.columns[:2] == ["length (tokens)", "perplexity before (per token)"]
    assert by_length.columns[-1] == "passkey after (share)"
    assert by_length.data[1] == [4096, 1900.0, 4.75, 0.0, 0.75]
    assert logged["evaluation/by_cell"].data[-1] == ["after", "passkey", 4096, 1.0, 0.75]
    assert len(logged["evaluation/by_cell"].data) == 8


def test_column_leaves_gaps_out():
    rows = [{"step": 1, "loss": "2.5"}, {"step": 2, "loss": ""}, {"step": 3, "loss": None}, {"step": 4}]
    assert column(rows, "loss") == ([1.0], [2.5])


def test_smooth_is_a_running_mean():
    assert smooth([0, 3, 6]) == [1.5, 3.0, 4.5]
