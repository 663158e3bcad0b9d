import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, GraniteConfig, MistralConfig, Qwen3Config

from lctrain.errors import InputError
from lctrain.evaluation.perplexity import Perplexity, windows
from lctrain.evaluation.reader import Reader
from lctrain.losses import linear_cross_entropy

TASK = Perplexity(
    lengths=[16, 48, 64], sequence_length=64, batch_tokens=None, num_tokens=384, stride=None, num_buckets=5
)

CASES = {"perplexity": ("perplexity", {"lengths": [16, 48, 64], "num_tokens": 384, "num_buckets": 5})}
FIELDS = {"num_tokens": 64, "stride": 5, "num_buckets": 3}
REFUSED = [({"lengths": [1024]}, "at least 1025 tokens, the longest has 700")]


@torch.inference_mode()
def naive(model, text, length, stride):
    """Negative log-likelihood of every token but the first, one window and one full row of logits at a time."""
    losses, scored = [], 0
    while scored < len(text) - 1:
        end = min(max(length, scored + stride), len(text) - 1)
        window = torch.from_numpy(text[end - length : end + 1].astype(np.int64))
        log_probs = model(input_ids=window[None, :-1]).logits[0].double().log_softmax(-1)
        losses += [-log_probs[i, window[i + 1]].item() for i in range(length - (end - scored), length)]
        scored = end
    return losses


@pytest.mark.parametrize("stride", [None, 5, 16])
def test_equals_a_naive_loop(model, measure, documents, stride):
    task = replace(TASK, stride=stride)
    result = measure(task, documents)
    for length in TASK.lengths:
        losses = [loss for text in task.texts(documents) for loss in naive(model, text, length, stride or length)]
        assert len(losses) == result["num_tokens"] == 384
        assert math.log(result["by_length"][str(length)]) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 7, 16])
@pytest.mark.parametrize("length", [16, 48, 64])
def test_every_length_scores_each_token_once(length, stride):
    scored = [start + i for start, first in windows(192, length, stride) for i in range(first, length)]
    assert scored == list(range(192))


def test_text_is_shared_among_the_long_documents(documents):
    assert [len(text) for text in TASK.texts(documents)] == [129, 129, 129]
    assert [len(text) for text in replace(TASK, num_tokens=1).texts(documents)] == [65]
    assert sum(len(text) - 1 for text in replace(TASK, num_tokens=10**6).texts(documents)) == 256 + 128 + 640


@pytest.mark.parametrize("stride", [None, 16])
def test_positions_average_back_to_the_whole(measure, documents, stride):
    result = measure(replace(TASK, stride=stride), documents)
    ranges = result["by_position"]
    assert (ranges["start"][0], ranges["end"][-1], sum(ranges["num_tokens"])) == (0, 64, result["num_tokens"])
    mean = np.average(np.log(ranges["perplexity"]), weights=ranges["num_tokens"])
    assert math.exp(mean) == pytest.approx(result["by_length"]["64"])


def test_bits_per_byte_of_a_byte_tokenizer_are_bits_per_token(measure, documents):
    task = replace(TASK, num_tokens=64)
    result = measure(task, documents)
    assert result["bits_per_byte"]["16"] == pytest.approx(math.log2(result["by_length"]["16"]))


def test_tiles_change_nothing(model, reader, documents, monkeypatch):
    ids = documents[1][:129].astype(np.int64)[None]
    whole = reader.losses(ids)
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", 7 * model.config.vocab_size)
    torch.testing.assert_close(reader.losses(ids), whole)


@pytest.mark.parametrize("config", [Gemma2Config, GemmaConfig, MistralConfig, Qwen3Config])
def test_other_models(config, tokenizer, measure, documents):
    model = small(config, len(tokenizer))
    task = replace(TASK, lengths=[32], num_tokens=64)
    mean = np.mean([loss for text in task.texts(documents) for loss in naive(model, text, 32, 32)])
    assert measure(task, documents, Reader(model=model, tokenizer=tokenizer))["by_length"]["32"] == pytest.approx(
        math.exp(mean), rel=1e-4
    )


def test_refuses_a_head_it_cannot_reproduce(tokenizer, measure, documents):
    by = Reader(model=small(GraniteConfig, len(tokenizer), logits_scaling=8.0), tokenizer=tokenizer)
    with pytest.raises(InputError, match="GraniteForCausalLM changes its logits"):
        measure(TASK, documents, by)


def small(config, vocab_size, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    init = {"vocab_size": vocab_size, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(config(**sizes, **heads, **init, **fields)).eval()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": []}, "positive and ascending"),
        ({"lengths": [64, 16]}, "positive and ascending"),
        ({"lengths": [16, 16]}, "positive and ascending"),
        ({"lengths": [0, 16]}, "positive and ascending"),
        ({"stride": 17}, "stride 17 must lie in 1..16"),
        ({"stride": 0}, "stride 0 must lie"),
        ({"num_buckets": 65}, "num_buckets 65"),
        ({"num_tokens": 0}, "num_tokens 0"),
    ],
)
def test_refuses_settings(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)


def test_refuses_no_documents():
    with pytest.raises(InputError, match="the longest has 0"):
        TASK.check([], None)
