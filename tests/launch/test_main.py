"""Exit codes, the one line that names the mistake, and that a refused call leaves nothing behind."""

import sys
from pathlib import Path

import pytest

from launch.main import main
from lctrain import __version__
from lctrain.errors import InputError, RunError

REFUSED = {
    "trian": "no command 'trian'; did you mean 'train'?",
    "plan trainer.max_stepz=3": "no such option 'trainer.max_stepz'; did you mean 'trainer.max_steps'?",
    "plan traner.max_steps=3": "no such option 'traner.max_steps'; did you mean 'trainer.max_steps'?",
    "plan max_steps=3": "no such option 'max_steps'; did you mean 'trainer.max_steps'?",
    "plan atention=full": "no such option 'atention'; did you mean 'attention'?",
    "plan attention=slidng_window": "no attention 'slidng_window'; did you mean 'sliding_window'? (choices: ",
    "plan attention=sliding_window attention.sliding_windw=8": "did you mean 'attention.sliding_window'?",
    "plan attention=streaming attention.sliding_window=8": " or sliding_window",
    "plan seed=[1": "cannot read 'seed=[1'",
    "plan seed=1,2": "Ambiguous value for argument 'seed=1,2'",
    "plan seed": "cannot read 'seed': options are written option=value",
    "plan --epochs 3": "no flag '--epochs': options are written option=value",
    "plan --config-dir nowhere": "nowhere' not found",
    "export": "no value for 'run_dir': give run_dir=…",
    "train sequence_length=abc": "sequence_length=abc must be a whole number",
    "export run_dir=${nowhere}": "cannot resolve 'run_dir': Interpolation key 'nowhere' not found",
    "export run_dir=${oc.env:LCTRAIN_NOT_SET}": "Environment variable 'LCTRAIN_NOT_SET' not found",
}


@pytest.mark.parametrize("command", REFUSED)
def test_wrong_input_is_one_line_and_exit_code_2(command, lctrain, tmp_path):
    done = lctrain(*command.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert REFUSED[command] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_composing_writes_nothing(lctrain, tmp_path):
    done = lctrain("train", "--cfg", "job", "attention=sliding_window", "attention.sliding_window=7")
    assert done.returncode == 0, done.stderr
    assert "sliding_window: 7" in done.stdout
    assert lctrain("train", "--info", "defaults").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_own_config_folder(lctrain, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text("# @package _global_\nseed: 41\n")
    done = lctrain("train", "--config-dir", "mine", "experiment=short", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "seed: 41" in done.stdout
    (tmp_path / "mine" / "experiment" / "demo.yaml").write_text("# @package _global_\nseed: 41\n")
    for flag in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        done = lctrain("train", *flag, "experiment=demo", "--cfg", "job")
        assert done.returncode == 2
        assert "mine/experiment/demo.yaml has the name of a file of lctrain's" in done.stderr


@pytest.fixture
def export_with(monkeypatch, tmp_path, capfd):
    """Runs `lctrain export run_dir=r …` in this process with another `launch.export.run`: exit code, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("HYDRA_FULL_ERROR")

    def call(run, *arguments):
        monkeypatch.setattr("launch.export.run", run)
        monkeypatch.setattr(sys, "argv", ["lctrain", "export", "run_dir=r", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # what the interpreter does with a text
                print(code, file=sys.stderr)
                code = 1
            return code, capfd.readouterr().err
        return 0, capfd.readouterr().err

    yield call
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("model.path=x is no folder"), 2, "error: model.path=x is no folder\n"),
        (RunError("the loss is NaN at step 3"), 1, "error: the loss is NaN at step 3\n"),
        (KeyboardInterrupt(), 1, "error: interrupted\n"),
    ],
)
def test_errors_of_a_run(error, code, line, export_with):
    def run(cfg):
        raise error

    assert export_with(run) == (code, line)


def test_a_bug_keeps_its_traceback(export_with):
    def run(cfg):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        export_with(run)


def test_a_run_sees_its_config_the_callers_folder_and_the_whole_command(export_with, tmp_path):
    seen = {}

    def run(cfg):
        seen.update(output=cfg.output, folder=Path.cwd(), command=list(sys.argv))

    assert export_with(run) == (0, "")
    assert seen == {
        "output": str(tmp_path / "r/exported"),
        "folder": tmp_path,
        "command": ["lctrain", "export", "run_dir=r"],  # a trainer starts its other processes with it
    }
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_may_be_written_short(export_with, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    assert export_with(lambda cfg: seen.append(cfg.output), "output=~/out") == (0, "")
    assert seen == [str(tmp_path / "out")]


def test_multirun_runs_once_for_each_value(export_with):
    seen = []
    assert export_with(lambda cfg: seen.append(cfg.checkpoint), "--multirun", "checkpoint=a,b")[0] == 0
    assert seen == ["a", "b"]


def test_benchmark_takes_its_name_as_a_bare_word(lctrain):
    done = lctrain("benchmark", "overhead", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "what: overhead" in done.stdout


def test_version(lctrain):
    assert lctrain("--version").stdout == f"lctrain {__version__}\n"
