"""What can't work is refused before anything is written; what goes on does so as it began; the whole chain."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lctrain import config
from lctrain.errors import InputError
from lctrain.folder import RunFolder


def test_the_seed_changes_the_order(run, tmp_path):
    runs = [run(f"run_dir={tmp_path}/{seed}", f"seed={seed}") for seed in (0, 1)]
    assert runs[0].history[0]["loss"] != runs[1].history[0]["loss"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.precision=16-true", "trainer.precision=16-true is neither 32-true nor bf16-mixed"),
        ("tuning=frozen", "leaves nothing to train; choose another tuning"),
        ("rope=none", "rope=none leaves the model at 32 positions, model.sequence_length is 64"),
        ("trainer.max_steps=0", "trainer.max_steps=0 must be at least 1"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1 must be at least 1"),
        ("optimizer.lr=-1", "optimizer or scheduler: Invalid learning rate: -1"),
        ("callbacks.checkpoint.num_kept=0", "callbacks.checkpoint.num_kept must be at least 1"),
        ("resume=nowhere.ckpt", "resume=nowhere.ckpt is not a whole checkpoint"),
        ("model.path=/nowhere/at/all", "model.path=/nowhere/at/all does not exist"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all: no such file or folder"),
        ("trainer.devices=0", r"trainer: .*devices=0"),
        ("trainer.accelerator=abacus", "trainer: .*abacus"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(run, tmp_path, override, line):
    with pytest.raises(Exception, match=line) as caught:
        run(override)
    assert isinstance(config.explain(caught.value, "train", [override]), InputError)
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder(run, tmp_path):
    run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run; add resume=auto"):
        run("optimizer.lr=1")
    first = RunFolder(tmp_path / "run")
    first.acquire()
    with pytest.raises(InputError, match="another process is running"):
        run("resume=auto")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


CHANGES = {
    "optimizer.lr=1": "optimizer.lr was 0.01 when .* began and is 1 now",
    "seed=1": "seed was 0",
    "rope=yarn": "rope was LinearScaling when .* began and is YaRN now",
    "tuning=lora": "tuning was FullTuning when .* began and is LoRATuning now",
    "trainer.precision=bf16-mixed": "trainer.precision was 32-true",
    "trainer.gradient_clip_val=0.1": "trainer.gradient_clip_val was 1.0",
    "trainer.max_steps=9": "scheduler.num_steps was 4",
}


def test_a_run_goes_on_only_as_it_began(run, tmp_path):
    run()
    path = tmp_path / "run/checkpoints/step-00000004.ckpt"
    for change, key in CHANGES.items():
        with pytest.raises(InputError, match=f"resume=auto: {key}"):
            run("resume=auto", change)
    with pytest.raises(InputError, match=f"resume={path}: seed"):
        run(f"resume={path}", "seed=1")
    for change in ("trainer.accumulate_grad_batches=2", "datamodule.micro_batch_size=3"):
        with pytest.raises(
            InputError, match=rf"steps of \d+ tokens, these would be of \d+: keep the product of .*{change[:9]}"
        ):
            run("resume=auto", change)


def test_what_does_not_change_a_step_may_change(run, tmp_path):
    run("trainer.max_steps=2", "scheduler.num_steps=4")
    free = [
        "callbacks.checkpoint.num_kept=7",
        "logger=csv",
        f"datamodule.cache_dir={tmp_path}/tokens",
        "evaluation=perplexity",
    ]
    assert run("resume=auto", "trainer.val_check_interval=3", *free).steps == 4


def test_a_finished_run_that_is_resumed_is_left_as_it_was(run, tmp_path):
    history = run().history
    again = run("resume=auto")
    assert (again.steps, again.history, again.tokens_per_second) == (4, history, 0)


def test_another_folder_can_start_from_a_checkpoint(run, tmp_path):
    run()
    checkpoint = tmp_path / "run/checkpoints/step-00000004.ckpt"
    on = run(f"run_dir={tmp_path}/on", f"resume={checkpoint}", "trainer.max_steps=6", "optimizer.lr=1e-3")
    assert [row["step"] for row in on.history] == [5, 6]


def test_the_demo_runs_to_its_report(tmp_path, monkeypatch):
    """The whole chain on a random model: train, export, evaluate before and after."""
    from launch.train import run as train_and_report

    monkeypatch.chdir(tmp_path)
    source = Path(torch.__file__).parent / "nn" / "modules"
    base = random_base(tmp_path / "base")
    overrides = f"""experiment=demo run_dir=runs/demo trainer.max_steps=2 scheduler.num_warmup_steps=0 logger=csv
        sequence_length=512 model.path={base} data=text data.path={source} data.patterns=[*.py]
        datamodule.cache_dir={tmp_path}/tokens datamodule.num_heldout_tokens=1024 trainer.accelerator=cpu
        evaluation.perplexity.num_tokens=1024 evaluation.perplexity.lengths=[128,512] evaluation.passkey.lengths=[256]
        evaluation.passkey.depths=[0.5] evaluation.passkey.num_trials=1"""
    train_and_report(config.compose("train", overrides.split()))
    report = OmegaConf.load(tmp_path / "runs/demo/report.json")
    for when in ("before", "after"):
        assert list(report.perplexity[when]) == ["128", "512"]
        assert list(report.passkey[when]) == ["256"]
    assert report.steps == 2
    assert report.tokens_per_second > 0
    assert (tmp_path / "runs/demo/exported/model.safetensors").is_file()
    assert list((tmp_path / "runs/demo").glob("*.png"))


def random_base(folder: Path) -> Path:
    """A random Llama that reads with the tokenizer in data/."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(config.asset("tiny-base"))
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **shape, **ids)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LEARNS = ["attention=hierarchical_windows", "attention.sliding_windows=[3,9]"]
AS_TRAINED = ["attention@evaluation_attention=hierarchical_windows", "evaluation_attention.sliding_windows=[3,9]"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([*LEARNS, "evaluation=perplexity"], r"learns, and would be evaluated as FullAttention\(\)"),
        ([*LEARNS, *AS_TRAINED[:1], "evaluation=perplexity"], r"would be evaluated as HierarchicalWindows\("),
        (["strategy=zero3", "strategy.half_precision=true"], "half_precision is for tuning=full with model.dtype=bf"),
        ([*LEARNS, "strategy=zero3", "strategy.half_precision=true", "model.dtype=bfloat16"], "that learns nothing"),
    ],
)
def test_what_would_measure_or_train_something_else_is_refused(run, tmp_path, overrides, line):
    with pytest.raises(InputError, match=line):
        run(*overrides)
    assert not (tmp_path / "run").exists()
