"""Every policy of conf/cache against its reference without a cache: any chunks, padded rows, what a field changes."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from lctrain.attention.full import FullAttention
from lctrain.cache.base import CachePolicy
from lctrain.config import compose, conf_dir
from lctrain.heads import HeadPattern
from lctrain.model.install import install
from lctrain.model.serve import load

LENGTH = 29
YAMLS = sorted(path.stem for path in (conf_dir() / "cache").glob("*.yaml"))


def chunks(size):
    """The lengths of the chunks of `size` that the text is read in."""
    return [len(chunk) for chunk in torch.arange(LENGTH).split(size)]


def in_chunks(model, cache, tokens, mask, size):
    """The logits of all tokens, a forward for each chunk."""
    logits = []
    for start in range(0, tokens.shape[1], size):
        stop = start + size
        known = None if mask is None else mask[:, :stop]
        positions = None if mask is None else (known.cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            out = model(tokens[:, start:stop], attention_mask=known, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def in_one_pass(model, tokens, mask=None):
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


def close(found, expected, mask=None):
    real = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv", [4, 1])
def test_chunks_equal_the_reference(serving, naive, ids, policy, kv):
    tokens = ids(2, LENGTH)
    for size in (1, 2, 7, 11, LENGTH):
        expected = in_one_pass(naive(policy, chunks(size), kv=kv), tokens)
        for kernel in ("sdpa", "reference"):
            model, policy_ = serving(policy, kv=kv, kernel=kernel)
            close(in_chunks(model, policy_.new(model), tokens, None, size), expected)


def test_padding_is_neither_seen_nor_kept(serving, naive, ids, policy):
    """On the left, as in a batch of prompts, and between, as where a batch of answers is answered."""
    tokens, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :12] = mask[1, :4] = mask[1, 13:18] = 0
    for size in (1, 4, 7, 11, LENGTH):
        for kernel in ("sdpa", "reference"):
            model, policy_ = serving(policy, kernel=kernel)
            expected = in_one_pass(naive(policy, chunks(size)), tokens, mask)
            close(in_chunks(model, policy_.new(model), tokens, mask, size), expected, mask)


def test_every_field_changes_something(serving, ids, policy, field):
    logits = []
    for fields in ({}, field):
        model, policy_ = serving(policy, fields=fields)
        logits.append(in_chunks(model, policy_.new(model), ids(1, LENGTH), None, 7))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_folder_is_served_with_it(saved, tiny, ids, policy_of, policy):
    shape = {"num_hidden_layers": 4}
    mine, built = policy_of(policy), tiny("llama", **shape)
    install(built, FullAttention())
    loaded, served = load(saved("llama", **shape), cache=mine)
    logits = [in_chunks(model, served.new(model), ids(1, LENGTH), None, 7) for model in (built, loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_is_the_constructor_and_has_a_test_of_its_own(tmp_path, name):
    HeadPattern.from_gates([[0.0, 1.0]], threshold=0.5).write_json(tmp_path / "head_pattern.json")
    config = OmegaConf.load(conf_dir() / "cache" / f"{name}.yaml")
    fields = [field.name for field in dataclasses.fields(get_class(config["_target_"]))]
    assert list(config) == ["_target_", *fields]
    evaluate = compose("evaluate", [f"model.path={tmp_path}", f"cache={name}"])
    assert isinstance(instantiate(evaluate.cache, _convert_="all"), CachePolicy)
    declared = runpy.run_path(str(Path(__file__).with_name(f"test_{name}.py")))
    assert declared["FIELDS"].keys() == set(fields)
    assert {yaml for yaml, _, _ in declared["CASES"].values()} == {name}
