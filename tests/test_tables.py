"""Every table that a command prints, with rows as they are measured, in 80 columns: in a terminal and in a log file."""

import io
import json
import os
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lctrain.benchmark import devices, gates, kernels, length, overhead, retrieval, retrieval_report, serve, step, trace
from lctrain.cluster import status
from lctrain.config import compose
from lctrain.evaluation import report
from lctrain.evaluation import run as evaluation
from lctrain.plan import run as plan
from lctrain.tables import MAX_LINES, show

TRACED = [
    ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloop>>", 0.41),
    ("aten::mm", 0.002),
]
SAVED = "28 layers recomputed from one input in 2, 28 keep attention, 12 inputs on the host, MLPs by 8192 tokens"
RATES = [123456.0, 123457.0] * 5
FAILED = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 16.00 GiB"


def step_rows():
    base = {"precision": None, "attention": "shifted_sparse", "length": 131072, "pinned_memory": 17.3}
    for tuning, seconds, memory in (("LoRATuning", 15.09, SAVED), ("LoRATuning and embed, norm", 1.25, "auto")):
        yield base | {
            "stack": "lctrain",
            "tuning": tuning,
            "seconds": [seconds] * 3,
            "memory": memory,
            "device_memory": 127.2,
        }
    yield base | {"stack": "trl", "tuning": "lora", "seconds": [], "error": FAILED}


def device_rows():
    base = {"attention": "shifted_sparse", "tuning": "FullTuning", "num_rows": 1, "memory": SAVED, "length": 1048576}
    yield base | {"layout": "alone", "devices": 1, "seconds": [], "error": "out of memory"}
    for layout in ("full_shared", "full_apart"):
        yield base | {"layout": layout, "devices": 8, "seconds": [17.5], "device_memory": 78.1, "waiting": 0.5}


def kernel_rows():
    told = {"kernel": "flash", "length": 1048576, "pairs_per_head": 1e9, "mask_seconds": 0.0049, "mask_bytes": 2**30}
    for pattern, packed, seconds in (("full", False, 4.5), ("shifted_sparse", True, 0.75)):
        rates = {"forward_seconds": seconds / 3.5, "tflops_per_second": 2729 / seconds, "of_full": 0.9}
        row = told | rates | {"pattern": pattern, "packed": packed, "seconds": seconds}
        yield kernels.Result(**{name: row[name] for name in kernels.FIELDS if name in row})


def gate_rows():
    for way in gates.WAYS:
        yield {"way": way, "length": 131072, "seconds": [12.5], "device_memory": 116.3, "memory": SAVED}
    yield {"way": "dense", "length": 524288, "seconds": [], "error": "out of memory"}


def serve_rows():
    for cache, scale in (("full", 4), ("duo", 1)):
        yield {
            "cache": cache, "length": 1048576, "filled": "random", "kv_gib": 32.125 * scale, "peak_gib": 60.5 * scale,
            "prefill_seconds": 1234.5 * scale, "decode_seconds": 0.0123 * scale, "eager_seconds": 0.0345 * scale,
        }  # fmt: skip


def evaluated(explosion, recall):
    lengths = {"512": 1, "4096": 2, "131072": 3}
    perplexity = {"by_length": {length: 9.5 * explosion * times for length, times in lengths.items()}}
    tasks = {task: dict.fromkeys(lengths, recall) for task in ("passkey", "multi_passkey", "needle")}
    return {"perplexity": perplexity} | {task: {"by_length": of, "by_depth": {}} for task, of in tasks.items()}


def arms():
    for kind, share, seed in (
        ("full", 0.0, None),
        ("random", 0.5, 0),
        ("random", 0.5, 1),
        ("all streaming", 1.0, None),
    ):
        done = evaluated(100.0 + (seed or 0), 0.5 + (seed or 0) / 10)
        yield retrieval_report.row("arm", kind, share, seed, done, done)


def plan_everything():
    shape = "{model_type: llama, hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2, num_attention_heads: 4}"
    small = ["model.path=nobody/nothing", "model.dtype=bfloat16", f"model.architecture={shape}", "sequence_length=512"]
    plan.main(compose("plan", [*small, "curriculum=staged", "trainer.accelerator=auto", "memory=auto", "rope=linear"]))


def status_of_runs(folder):
    for name in ("2026-05-01_llama3-8b_shifted-sparse_longlora_131072", "b", "seeds/[seed=3]"):
        path = folder / name
        path.mkdir(parents=True)
        OmegaConf.save({"trainer": {"max_steps": 100000}}, path / "config.yaml")
        row = {"step": 40000, "loss": 2.512, "tokens": 64, "tokens_per_second": 12345678.0, "restarts": 12}
        (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (path / "job_id.txt").write_text("12345678_12\n")
    status.main(OmegaConf.create({"run_dir": None, "folder": str(folder)}))


PRINTERS = {
    "step": (step, lambda _: step.show(step.table(list(step_rows())))),
    "length": (length, lambda _: length.show(length.table(list(step_rows())[:2]))),
    "devices": (devices, lambda _: devices._show(SimpleNamespace(rows=list(device_rows()), told=str))),
    "kernels": (kernels, lambda _: kernels._print(list(kernel_rows()), "")),
    "gates": (gates, lambda _: gates._show(list(gate_rows()), Path("gates.json"))),
    "serve": (serve, lambda _: serve.show(serve.table(list(serve_rows())))),
    "serve ratios": (serve, lambda _: serve.show(serve.ratio_table(serve.ratios(list(serve_rows()))))),
    "retrieval": (retrieval, lambda _: retrieval.show(retrieval.table(list(arms())))),
    "overhead": (
        overhead,
        lambda _: overhead._print({"lctrain": RATES, "plain": RATES[::-1]}, {"lctrain": 1.0, "plain": 2.0}, "run_dir"),
    ),
    "trace": (
        trace,
        lambda _: trace.show(
            trace.table(trace.Traced(seconds=1.0, busy=1.0, num_synchronizations=0, num_compilations=0, kernels=TRACED))
        ),
    ),
    "plan": (plan, lambda _: plan_everything()),
    "evaluation": (
        evaluation,
        lambda _: evaluation.show(report.table({"before": evaluated(2000, 0.0), "after": evaluated(0.5, 0.75)})),
    ),
    "status": (status, status_of_runs),
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=["file", "terminal"])
def printed(request, monkeypatch, tmp_path):
    """What is printed of a table, as text, in a terminal of 80 columns or in a file."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if request.param == "terminal":
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm-256color")

    def output(table):
        with Terminal() if request.param == "terminal" else (tmp_path / "log.txt").open("w+") as out:
            with redirect_stdout(out):
                show(table)
            out.seek(0)
            return Text.from_ansi(out.read()).plain

    return output


def words(text):
    return {word.removesuffix(":") for word in re.split(r"[\s│┃]+", text)}


def check(table, text):
    """Nothing is wider than 80, and every heading's and cell's words are there whole."""
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 80
    for column in table.columns:
        heading = [*str(column.header).split()] if any(column.cells) else []
        for told in (heading, *map(str.split, column.cells)):
            assert words(" ".join(told)) <= words(text)


@pytest.mark.parametrize("name", PRINTERS)
def test_nothing_is_broken_in_80_columns(printed, monkeypatch, tmp_path, name):
    module, call = PRINTERS[name]
    shown = []
    monkeypatch.setattr(module, "show", lambda table: shown.append((table, printed(table))))
    call(tmp_path / "runs")
    assert len(shown) == (3 if name == "plan" else 1)
    for table, text in shown:
        check(table, text)


def made(*headings, rows, **more):
    table = Table(*headings, **more)
    for row in rows:
        table.add_row(*row)
    return table


def lines_of(table, width):
    console = Console(width=width, file=io.StringIO())
    show(table, console)
    return [line.replace("┃", "│").rstrip() for line in console.file.getvalue().splitlines()]


def cells_of(lines):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


ROWS = [("lctrain", "full", "65,536", "nothing is recomputed"), ("trl", "full", "131,072", "28 layers recomputed")]


def test_what_fits_is_one_table():
    lines = lines_of(made("stack", "attention", "tokens", "memory", rows=ROWS), 80)
    assert cells_of(lines) == [["stack", "attention", "tokens", "memory"], *map(list, ROWS)]
    assert lines[3].index("65,536") == lines[4].index("131,072") + 1  # numbers end together


def test_headings_are_wrapped_before_anything_moves():
    lines = lines_of(made("a heading of many words", "b", rows=[("1", "x"), ("2", "x")]), 20)
    assert cells_of(lines)[-2:] == [["1", "x"], ["2", "x"]]
    assert max(map(len, lines)) <= 20


def test_what_is_the_same_in_every_row_moves_above():
    """An empty column is not told at all."""
    rows = [(*row[:2], "", *row[2:]) for row in ROWS]
    table = made("stack", "attention", "on\nhost", "tokens", "memory", rows=rows, title="All")
    lines = lines_of(table, 48)
    assert lines[:2] == ["All", "attention: full"]
    assert cells_of(lines) == [["stack", "tokens", "memory"], *([row[0], *row[2:]] for row in ROWS)]
    assert cells_of(lines_of(table, 57)) == [["stack", "attention", "tokens", "memory"], *map(list, ROWS)]


def test_no_more_moves_than_must_and_lines_above_end_between_columns():
    names, rows = [f"a setting {i}" for i in range(6)], [[f"a value {i}" for i in range(6)] + [n] for n in "12"]
    lines = lines_of(made(*names, "n", rows=rows), 50)
    assert lines[:2] == ["a setting 0: a value 0 · a setting 1: a value 1", "a setting 2: a value 2"]
    assert cells_of(lines)[-1] == ["a value 3", "a value 4", "a value 5", "2"]


def test_cells_are_wrapped_between_words():
    lines = lines_of(made("stack", "attention", "tokens", "memory", rows=ROWS), 40)
    assert lines[0] == "attention: full"
    assert ["lctrain", "65,536", "nothing is"] in cells_of(lines)
    assert ["", "", "recomputed"] in cells_of(lines)
    assert not cells_of(lines_of(made("a", "b", rows=[("out of memory", "x" * 20)]), 38))  # which is too short for that


@pytest.mark.parametrize(("width", "rows"), [(20, ROWS), (60, [("lctrain", "full", "1", " ".join(["word"] * 60))])])
def test_what_makes_no_table_is_a_list(width, rows):
    """Too narrow for the words, or taller than MAX_LINES a row."""
    lines = lines_of(made("stack", "attention", "tokens", "memory", rows=rows, caption="after all"), width)
    assert lines[0] == ("attention: full" if len(rows) > 1 else "stack: lctrain")
    assert lines[-1] == "after all"
    assert sum(line.startswith("stack: ") for line in lines) == len(rows)
    assert max(map(len, lines)) <= width
    assert not cells_of(lines)
    assert MAX_LINES < 9


def test_a_single_row_and_equal_rows_keep_their_columns():
    for rows in (ROWS[:1], ROWS[:1] * 2):
        assert sum("attention: full" in line for line in lines_of(made(*"abcd", rows=rows), 20)) == 0
        assert sum("b: full" in line for line in lines_of(made(*"abcd", rows=rows), 20)) == len(rows)


def test_a_word_longer_than_the_line_stays_whole():
    path = "runs/" + "x" * 100
    assert lines_of(made("run", "job", rows=[[path, "1"]]), 80)[:3] == ["run:", f"  {path}", "job: 1"]


def test_cells_are_text_and_no_markup():
    assert ["[full; mixed]", "[bold]1[/bold]"] in cells_of(
        lines_of(made("a", "b", rows=[["[full; mixed]", "[bold]1[/bold]"]]), 80)
    )


def test_sections_stay():
    table = made("a", "b", rows=[("1", "2")])
    table.add_section()
    table.add_row("all", "3")
    assert sum(line.startswith("├") for line in lines_of(table, 80)) == 1


def test_a_log_is_80_columns_wide_whatever_the_terminal(monkeypatch, tmp_path):
    """rich would ask the terminal of the keyboard."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((200, 50)))
    wide = made("a", "b", rows=[("word " * 12, "word " * 12), ("x", "y")])
    with (tmp_path / "log.txt").open("w") as file, redirect_stdout(file):
        show(wide)
    assert max(map(cell_len, (tmp_path / "log.txt").read_text().splitlines())) <= 80
