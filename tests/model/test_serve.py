import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.cache.streaming import StreamingCache
from lctrain.errors import InputError
from lctrain.heads import HeadPattern
from lctrain.model.install import install
from lctrain.model.serve import load

GATES = [[0.9, 0.1], [0.2, 0.3]]
PATTERN = HeadPattern.from_gates(GATES, threshold=0.5, num_sink_tokens=2, recent_size=4)


def generate(model, policy, tokens):
    return model.generate(tokens, past_key_values=policy.new(model), max_new_tokens=8, do_sample=False)


@pytest.fixture
def exported(tiny, saved, tmp_path):
    """A folder with a pattern, and the model that it was written from."""
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    for file in saved("llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    PATTERN.write_json(tmp_path / "head_pattern.json")
    install(model, FullAttention())
    return tmp_path, model


def test_a_folder_with_a_pattern_generates_as_before_the_export(exported, ids):
    folder, before = exported
    expected = generate(before, DuoCache(pattern=PATTERN, positions="text"), ids(2, 30))
    model, policy = load(folder)
    assert torch.equal(generate(model, policy, ids(2, 30)), expected)
    assert policy == DuoCache(pattern=PATTERN, positions="text")


def test_a_cache_of_ones_own(exported):
    mine = StreamingCache(num_sink_tokens=2, recent_size=4, positions="text")
    assert load(exported[0], cache=mine)[1] is mine


def test_a_folder_without_a_pattern_keeps_everything(saved, ids):
    model, policy = load(saved("llama"))
    assert isinstance(policy, FullCache)
    assert torch.equal(
        generate(model, policy, ids(1, 30)), model.generate(ids(1, 30), max_new_tokens=8, do_sample=False)
    )


def test_a_pattern_of_another_model_is_refused_before_the_weights_are_read(exported, monkeypatch):
    folder, _ = exported
    HeadPattern.from_gates([[0.5] * 3] * 2, threshold=0.5).write_json(folder / "head_pattern.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has 2 layers of 3 key-value heads, the model 2 of 2"):
        load(folder)


def test_no_folder_is_refused():
    with pytest.raises(InputError, match=r"model.path=/no/such/folder"):
        load("/no/such/folder")
