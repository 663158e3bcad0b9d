import json

import numpy as np
from matplotlib.image import imread
from rich.console import Console

from lctrain.evaluation.pictures import column, draw, smooth
from lctrain.evaluation.report import log_media, table, write_report

RECALL = {"passkey_before.png", "passkey_after.png", "passkey_by_depth.png"}
PICTURES = {"perplexity_by_length.png", "perplexity_by_position.png", "training.png", *RECALL}
HISTORY = [{"step": i, "loss": 3 - i / 20, "sequence_length": 512 if i < 10 else 4096} for i in range(20)]


def result(explosion, recall):
    ranges = {"start": [0, 2048], "end": [2048, 4096], "perplexity": [9.0, 9.0 * explosion], "num_tokens": [1, 1]}
    return {
        "perplexity": {"by_length": {"512": 9.5, "4096": 9.5 * explosion}, "by_position": ranges},
        "passkey": {
            "by_length": {"512": 1.0, "4096": recall},
            "num_trials": 8,
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


def test_table_shows_before_and_after_side_by_side():
    console = Console(width=100, record=True)
    console.print(table(RESULTS))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["512", "9.50", "9.50", "100%", "100%"] in lines
    assert ["4k", "1,900.00", "4.75", "0%", "75%"] in lines


def test_wandb_gets_the_table_and_the_pictures(tmp_path):
    logged = {}
    write_report(tmp_path, RESULTS, config={}, history=HISTORY)
    log_media(type("Run", (), {"log": lambda _, media: logged.update(media)})(), tmp_path, RESULTS)
    assert set(logged) == {
        "evaluation/by_length",
        "evaluation/by_cell",
        *(f"evaluation/{name.removesuffix('.png')}" for name in PICTURES),
    }
    assert logged["evaluation/by_length"].data[1] == ["4k", "1,900.00", "4.75", "0%", "75%"]
    assert logged["evaluation/by_cell"].data[-1] == ["after", "passkey", 4096, 1.0, 0.75]
    assert len(logged["evaluation/by_cell"].data) == 8


def test_column_leaves_gaps_out():
    rows = [{"step": 1, "loss": "2.5"}, {"step": 2, "loss": ""}, {"step": 3, "loss": None}, {"step": 4}]
    assert column(rows, "loss") == ([1.0], [2.5])


def test_smooth_is_a_running_mean():
    assert smooth([0, 3, 6]) == [1.5, 3.0, 4.5]
