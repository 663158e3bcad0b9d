"""A store of these tests that keeps more than keys and values, wherever transformers rearranges or forgets rows."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface

from lctrain.attention.full import FullAttention
from lctrain.cache.base import prefill
from lctrain.cache.full import AllKeys, FullCache
from lctrain.cache.layer import CacheLayer, Part
from lctrain.cache.ring import Ring
from lctrain.cache.state import State
from lctrain.decode.one_query import Buffer
from lctrain.errors import InputError
from lctrain.model.install import install

LENGTH, NEW = 23, 8


def sums(k, tokens_BL):
    """What each key adds to those before it, [B, K, L]; nothing where it is padding."""
    return k[..., 0] if tokens_BL is None else k[..., 0] * tokens_BL[:, None]


def scale(v, scores):
    return v * scores.sigmoid()[..., None]


class Scored(AllKeys):
    """Scales each value by a score: the running sum of its own key and of all before it in the row."""

    def __init__(self):
        super().__init__()
        self.scores = None
        self.num_forwards = 0

    def attend(self, q_BHLD, k_BKLD, v_BKLD, start, forward):
        self.num_forwards += 1
        tokens = None if forward.tokens_BS is None else forward.tokens_BS[:, start:]
        scores = sums(k_BKLD, tokens).cumsum(-1)
        if self.scores is not None:
            scores = torch.cat((self.scores, self.scores[..., -1:] + scores), dim=-1)
        self.scores = scores
        return super().attend(q_BHLD, k_BKLD, scale(v_BKLD, scores[..., start:]), start, forward)


class Cropped(Scored):
    def crop(self, length):
        self.scores = self.scores[..., :length]


def naive(module, q, k, v, mask, scaling, **_):
    """Without a cache."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    real = torch.ones(q.shape[0], length).bool() if mask is None else mask.bool()
    v = scale(v, sums(k, real).cumsum(-1))
    sees = torch.ones(length, length).tril().bool() & real[:, None, None] | torch.eye(length).bool()
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.mT * scaling).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2), None


@pytest.fixture
def models(tiny):
    """The same model twice: one that asks a cache of Scored stores, one that knows none."""
    cached, plain = (tiny("llama", num_key_value_heads=2).double() for _ in range(2))
    install(cached, FullAttention(), "sdpa")
    AttentionInterface.register("scored", naive)
    AttentionMaskInterface.register("scored", lambda attention_mask=None, **_: attention_mask)
    plain.set_attn_implementation("scored")
    return cached, plain


def new(store=Scored):
    return Cache([CacheLayer([Part(store(), None)]) for _ in range(2)])


def stores(cache):
    return [part.store for layer in cache.layers for part in layer.parts]


def generate(model, tokens, mask=None, **how):
    how = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "eos_token_id": None} | how
    return model.generate(tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **how)


@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize(
    "how",
    [{}, {"prefill_chunk_size": 4}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "chunks", "beams"],
)
def test_every_tensor_follows_the_beams(models, ids, how, padding):
    (cached, plain), tokens = models, ids(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    found = generate(cached, tokens, mask, past_key_values=new(), **how)
    without = {name: value for name, value in how.items() if name != "prefill_chunk_size"}
    assert torch.equal(found, generate(plain, tokens, mask, use_cache=False, **without))


def test_every_tensor_is_repeated_and_selected(models, ids):
    (cached, plain), tokens, cache = models, ids(3, LENGTH), new()
    prefill(cached, tokens, None, cache, None)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    assert all(store.num_rows == 3 for store in stores(cache))
    chosen = tokens[[2, 0, 1]]
    assert torch.equal(generate(cached, chosen, past_key_values=cache), generate(plain, chosen, use_cache=False))


def test_a_reset_forgets_every_attribute(models, ids):
    (cached, plain), cache = models, new()
    before = [dict(vars(store)) for store in stores(cache)]
    for seed, rows in ((1, 2), (2, 2), (3, 1)):
        tokens = ids(rows, LENGTH, seed)
        assert torch.equal(generate(cached, tokens, past_key_values=cache), generate(plain, tokens, use_cache=False))
        assert all(store.num_forwards for store in stores(cache))
        cache.reset()
        assert [vars(store) for store in stores(cache)] == before


def test_every_tensor_is_counted(models, ids):
    cache = new()
    prefill(models[0], ids(2, LENGTH + 1), None, cache, None)
    for store in stores(cache):
        assert store.num_bytes == sum(x.untyped_storage().nbytes() for x in (store.keys, store.values, store.scores))
        assert store.scores.shape == (2, 2, LENGTH)


def test_tokens_are_taken_back_by_the_store_or_not_at_all(models, ids):
    (cached, plain), tokens = models, ids(1, 6).repeat(1, 4)
    found = generate(cached, tokens, past_key_values=new(Cropped), prompt_lookup_num_tokens=3)
    assert torch.equal(found, generate(plain, tokens, use_cache=False))
    with pytest.raises(InputError, match="can't be brought back"):
        generate(cached, tokens, past_key_values=new(), prompt_lookup_num_tokens=3)
    cache = new(Cropped)
    prefill(cached, tokens, None, cache, None)
    cache.crop(-2)
    assert all(store.scores.shape[-1] == tokens.shape[1] - 3 for store in stores(cache))


def test_what_goes_around_attend_is_not_inherited_beside_another():
    """A card's kernel stores a token by itself where a store tells its buffer: the score would be missed."""
    like = torch.zeros(1, 2, 1, 8)
    assert isinstance(AllKeys().buffer(like, 0), Buffer)
    assert AllKeys().can_crop
    assert Scored().buffer(like, 0) is None
    assert (Scored().can_crop, Cropped().can_crop, Ring(None, None).can_crop) == (False, True, False)
    assert isinstance(type("Named", (AllKeys,), {})().buffer(like, 0), Buffer)


class Pair(NamedTuple):
    a: Tensor
    b: int


class Holder(State):
    """Tensors in every place that is looked at."""

    def __init__(self):
        self.inner, self.pages, self.named, self.pair = Page(), [], {}, (None, 1)
        self.other = FullCache

    def hold(self, rows):
        self.inner.keys = torch.arange(rows)
        self.pages += [torch.arange(rows), torch.arange(rows)[:, None]]
        self.named["scores"] = Pair(torch.arange(rows), 5)
        self.pair = (torch.arange(rows), 2)


class Page(State):
    keys = None


def test_tensors_are_found_where_attributes_hold_them():
    holder, fresh = Holder(), Holder().twin()
    assert holder.num_rows is None
    holder.hold(3)
    kept = holder.twin()
    holder.select(torch.tensor([2, 0, 0, 1]))
    assert len(holder.tensors()) == 5
    assert all(tensor.flatten().tolist() == [2, 0, 0, 1] for tensor in holder.tensors())
    assert (holder.num_rows, holder.named["scores"].b, holder.pair[1], holder.other) == (4, 5, 2, FullCache)
    holder.become(fresh)
    assert (holder.tensors(), holder.pages, holder.named, holder.pair) == ([], [], {}, (None, 1))
    assert kept.num_rows == 3
    kept.pages[0].zero_()
    assert deepcopy(kept).tensors()[1].tolist() == [0] * 3


@pytest.mark.parametrize("odd", [torch.ones(4), torch.tensor(1)])
def test_a_tensor_without_the_batch_is_refused(odd):
    holder = Holder()
    holder.hold(3)
    holder.odd = odd
    with pytest.raises(ValueError, match="Holder holds tensors that don't all begin with the batch"):
        holder.select(torch.tensor([0]))
