import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from transformers import AutoConfig

from lctrain import config
from lctrain.attention.full import FullAttention
from lctrain.cache.h2o import H2OCache
from lctrain.errors import InputError, Stopped
from lctrain.evaluation.journal import Journal
from lctrain.evaluation.passkey import Passkey
from lctrain.evaluation.perplexity import Perplexity
from lctrain.evaluation.reader import Reader
from lctrain.evaluation.run import check_cache, evaluate, main

TASKS = {
    "perplexity": Perplexity(
        lengths=[64], sequence_length=64, batch_tokens=None, num_tokens=64, stride=None, num_buckets=2
    ),
    "passkey": Passkey(
        lengths=[150], sequence_length=150, batch_tokens=None, depths=[0.5], num_trials=1, heldout=True,
        chat_template=None, seed=0, num_digits=3,
    ),
}  # fmt: skip


def test_runs_every_task(reader, data):
    results = evaluate(reader, data, TASKS, Journal(), progress=False)
    assert list(results) == ["perplexity", "passkey"]
    assert results["perplexity"]["by_length"]["64"] > 1


def test_no_tasks_no_results(reader, data):
    assert evaluate(reader, data, {}, Journal(), progress=False) == {}


def test_checks_every_task_before_the_first(tokenizer, data, documents):
    data.heldout_documents = lambda: documents[3:4]
    with pytest.raises(InputError, match="passkey"):
        evaluate(Reader(model=None, tokenizer=tokenizer), data, TASKS, Journal(), progress=False)


def test_a_task_reads_held_out_text_or_all(data):
    assert len(TASKS["passkey"].documents(data)) == 5
    assert len(replace(TASKS["passkey"], heldout=False).documents(data)) == 7


def test_what_was_measured_under_a_label_is_not_measured_again(reader, data, tokenizer):
    journal = Journal()
    results = evaluate(reader, data, TASKS, journal, label="after", progress=False)
    num_cells = len(journal.measured)
    assert evaluate(reader, data, TASKS, journal, label="after", progress=False) == results
    assert len(journal.measured) == num_cells == 2
    evaluate(reader, data, TASKS, journal, label="before", progress=False)
    assert len(journal.measured) == 4


@pytest.fixture
def evaluation(saved, text, tmp_path):
    """The config of a small evaluation of two tasks, eight cells, in `tmp_path/<name>`."""
    path = saved("llama", max_position_embeddings=128)
    words = f"""model.path={path} data=text data.path={text} datamodule.cache_dir={tmp_path}/tokens
        datamodule.heldout_fraction=0.5 sequence_length=128 evaluation=needle evaluation.needle.lengths=[96,128]
        evaluation.passkey.lengths=[96,128] evaluation.needle.depths=[0.0,1.0]"""
    return lambda name, *others: config.compose("evaluate", [f"run_dir={tmp_path}/{name}", *words.split(), *others])


def stop_after(num_batches, monkeypatch):
    """Sends SIGTERM while that many batches have been read; gives the list of all that were."""
    read, complete = [], Reader.complete

    def counting(self, prompts, num_tokens):
        read.append(len(prompts))
        if len(read) == num_batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return complete(self, prompts, num_tokens)

    monkeypatch.setattr(Reader, "complete", counting)
    return read


def test_a_stopped_evaluation_goes_on_to_the_same_report(evaluation, tmp_path, monkeypatch):
    main(evaluation("whole"))
    read = stop_after(4, monkeypatch)
    with pytest.raises(Stopped):
        main(evaluation("stopped"))
    assert not (tmp_path / "stopped/report.json").exists()
    main(evaluation("stopped", "resume=auto"))
    whole, stopped = (tmp_path / name / "report.json" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    assert len(json.loads(whole.read_text())["details"]["model"]["needle"]["by_depth"]["128"]) == 2
    num_batches = len(read)
    main(evaluation("stopped", "resume=auto"))  # nothing is left
    assert (len(read), stopped.read_bytes()) == (num_batches, whole.read_bytes())


def test_an_evaluation_goes_on_only_as_it_began(evaluation, monkeypatch):
    stop_after(2, monkeypatch)
    with pytest.raises(Stopped):
        main(evaluation("run"))
    with pytest.raises(InputError, match="already holds a run; add resume=auto"):
        main(evaluation("run"))
    with pytest.raises(InputError, match=r"resume=auto: seed was 0 when .* and is 1 now"):
        main(evaluation("run", "resume=auto", "seed=1"))
    with pytest.raises(InputError, match="resume=auto: prefill_chunk_size was None"):
        main(evaluation("run", "resume=auto", "prefill_chunk_size=16"))
    with pytest.raises(InputError, match="resume=latest is neither never nor auto"):
        main(evaluation("run", "resume=latest"))
    main(evaluation("run", "resume=auto", "logger=csv"))


def test_weights_that_changed_are_another_model(evaluation, saved, tmp_path):
    copy = shutil.copytree(saved("llama", max_position_embeddings=128), tmp_path / "copy")
    words = [
        f"model.path={copy}",
        "~evaluation.needle",
        "evaluation.passkey.depths=[0.5]",
        "evaluation.passkey.num_trials=1",
    ]
    main(evaluation("run", *words))
    os.utime(copy / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match="the weights of model changed"):
        main(evaluation("run", *words, "resume=auto"))


def test_what_an_evaluation_is_told_reaches_the_reader(evaluation, monkeypatch):
    readers = []
    monkeypatch.setattr(Reader, "complete", lambda self, prompts, _: readers.append(self) or [""] * len(prompts))
    main(evaluation("run", "prefill_chunk_size=16"))
    assert {reader.prefill_chunk_size for reader in readers} == {16}


STREAMING = "cache=streaming cache.recent_size=16"
REFUSALS = {
    "evaluation.needle.depths=[0.5,1.5]": "needle depths must ascend from 0 to 1",
    "evaluation.needle.answer=''": "holds no word",
    "evaluation.needle.chat_template=default": "the tokenizer has none",
    "evaluation.needle.lengths=[32]": "needle at length 32: a needle's prompt needs",
    "evaluation.passkey.lengths=[96,9000]": r"passkey at length 9000 .* there are 6340, 2660 too few",
    "prefill_chunk_size=0": "prefill_chunk_size=0 must be at least 1",
    "cache=streaming": "= 2052 is all of 128 tokens; use cache=full",
    f"{STREAMING} attention=sliding_window attention.sliding_window=16": "StreamingCache decides .* instead of Sliding",
    f"{STREAMING} rope=dynamic rope.factor=2": "rope_type=dynamic .* use cache.positions=text",
    "cache=duo": "is no head pattern; give head_pattern.json",
}


@pytest.mark.parametrize("override", REFUSALS)
def test_refusals_come_before_anything_is_written(evaluation, tmp_path, override):
    with pytest.raises(InputError, match=REFUSALS[override]):
        explained(evaluation("run", *override.split()))
    assert not (tmp_path / "run").exists()


def test_a_cache_that_evicts_shows_in_perplexity_only_if_rows_are_read_in_chunks(saved):
    cache, config = H2OCache(budget=8, recent_size=4, pyramid_beta=1.0), AutoConfig.from_pretrained(saved("llama"))
    check_cache(cache, FullAttention(), config, TASKS["perplexity"], chunk_size=16)
    check_cache(cache, FullAttention(), config, TASKS["passkey"])  # is evicted before it answers
    with pytest.raises(InputError, match="forgets between forwards, and this task reads a row in one"):
        check_cache(cache, FullAttention(), config, TASKS["perplexity"])


def explained(cfg):
    try:
        config.check(cfg)
        main(cfg)
    except Exception as error:
        raise config.explain(error, "evaluate") or error from None
