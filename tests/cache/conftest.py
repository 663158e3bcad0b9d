"""The policies of conf/cache at sizes that show in 23 tokens, and what they should compute: a loop without a cache.

The test file of conf/cache/<name>.yaml is test_<name>.py. It declares `CASES`: name → (yaml, fields that shrink it, or
a function of the number of key-value heads that returns them, reference), and `FIELDS`: another value of each field.
The reference is written from the paper: it takes a `Row`, and returns the output [K, G, L, D] of its query heads.

Shape legend: K key-value heads, G query heads of a key-value head, L tokens of the row, D head dim.
"""

import itertools
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import rotate_half

from lctrain.attention.full import FullAttention
from lctrain.config import conf_dir
from lctrain.model.install import install

YAMLS = {path.stem: path for path in sorted((conf_dir() / "cache").glob("*.yaml"))}
FILES = {name: Path(__file__).with_name(f"test_{name}.py") for name in YAMLS}
DECLARED = {name: runpy.run_path(str(path)) for name, path in FILES.items() if path.exists()}
CASES = {name: case for file in DECLARED.values() for name, case in file["CASES"].items()}
serial = itertools.count()
FIELDS = [(file["CASES"], name, value) for file in DECLARED.values() for name, value in file["FIELDS"].items()]


def pytest_generate_tests(metafunc):
    """Runs a test that takes a `policy` for every case, and one that takes a `field` for every field of every yaml."""
    if "field" in metafunc.fixturenames:
        values = [pytest.param(next(iter(cases)), {name: value}, id=name) for cases, name, value in FIELDS]
        metafunc.parametrize(("policy", "field"), values)
    elif "policy" in metafunc.fixturenames:
        metafunc.parametrize("policy", CASES)


@dataclass
class Row:
    """The tokens of a row, without padding, in one layer."""

    layer: int
    q: Tensor  # [K, G, L, D]
    k: Tensor  # [K, L, D]
    v: Tensor  # [K, L, D]
    scaling: float
    forwards: list[list[int]]  # the tokens that each forward reads
    inv_freq: Tensor

    def attend(self, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The output where token i sees each earlier token j, and itself, if sees(i, j)."""
        seen = self._seen(sees)
        scores = torch.einsum("kgid,kjd->kgij", self.q, self.k) * self.scaling
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ self.v[:, None]

    def attend_in_the_cache(self, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The same where positions count the tokens that are seen: keys and queries are turned back to these."""
        seen, token = self._seen(sees), torch.arange(self.k.shape[1])
        place = seen.cumsum(-1) - 1  # of key j as token i sees it
        keys, queries = self._turn(self.k[:, None], place - token), self._turn(self.q, place[:, -1] - token)
        scores = torch.einsum("kgid,kijd->kgij", queries, keys) * self.scaling
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ self.v[:, None]

    def _seen(self, sees: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        token = torch.arange(self.k.shape[1])
        return sees(token[:, None], token) & (token <= token[:, None])

    def _turn(self, x: Tensor, by: Tensor) -> Tensor:
        angles = by.double()[..., None] * self.inv_freq.double()
        cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + rotate_half(x) * sin


def naive_attention(reference, sizes, inv_freq):
    """Row by row. Forwards read so many tokens each, padding included; later forwards read one."""

    def attend(module, q, k, v, mask, scaling, **_):
        out, length = torch.zeros_like(q), q.shape[2]
        later = length - sum(sizes)
        forward = torch.repeat_interleave(torch.tensor([*sizes, *[1] * later]))  # which one reads each token
        for b in range(q.shape[0]):
            real = torch.ones(length, dtype=torch.bool) if mask is None else mask[b].bool()
            read = forward[real]
            row = Row(
                layer=module.layer_idx,
                q=q[b, :, real].unflatten(0, (k.shape[1], -1)),
                k=k[b, :, real],
                v=v[b, :, real],
                scaling=scaling,
                forwards=[(read == number).nonzero()[:, 0].tolist() for number in read.unique()],
                inv_freq=inv_freq,
            )
            out[b, :, real] = reference(row).flatten(0, 1)
        return out.transpose(1, 2), None

    return attend


@pytest.fixture(scope="session")
def policy_of():
    """Policies by the names of cases, with other fields."""

    def make(name, *, kv=2, **changes):
        yaml, fields, _ = CASES[name]
        config = OmegaConf.to_container(OmegaConf.load(YAMLS[yaml]))
        config |= (fields(kv) if callable(fields) else fields) | changes
        made = {key: instantiate(value) if isinstance(value, dict) else value for key, value in config.items()}
        return get_class(made.pop("_target_"))(**made)

    return make


@pytest.fixture
def serving(tiny, policy_of):
    """A tiny Llama in fp64, and a policy for it."""

    def make(name, *, kv=2, kernel="sdpa", fields=None, **changes):
        model = tiny("llama", num_hidden_layers=4, num_key_value_heads=kv, **changes).double()
        install(model, FullAttention(), kernel)
        return model, policy_of(name, kv=kv, **(fields or {}))

    return make


@pytest.fixture
def naive(tiny):
    """The same Llama, which attends by a case's reference and knows no cache, as if forwards read tokens by `sizes`."""

    def make(name, sizes, *, kv=2, **changes):
        model = tiny("llama", num_hidden_layers=4, num_key_value_heads=kv, **changes).double()
        inv_freq = model.model.rotary_emb.inv_freq
        registered = f"naive_cache_{next(serial)}"
        AttentionInterface.register(registered, naive_attention(CASES[name][2], sizes, inv_freq))
        AttentionMaskInterface.register(registered, lambda attention_mask=None, **_: attention_mask)
        model.set_attn_implementation(registered)
        return model

    return make


@pytest.fixture
def held():
    """Counts the bytes of all storages that a cache's stores refer to."""

    def count(cache):
        stores = [part.store for layer in cache.layers for part in layer.parts]
        storages = [
            tensor.untyped_storage() for store in stores for tensor in vars(store).values() if torch.is_tensor(tensor)
        ]
        assert len({storage.data_ptr() for storage in storages}) == len(storages)
        return sum(storage.nbytes() for storage in storages)

    return count
