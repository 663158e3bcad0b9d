"""A graph holds a whole step; a recording of torch's operations stands for it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from lctrain.attention.full import FullAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.cache import full
from lctrain.cache.base import prefill
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.cache.streaming import StreamingCache
from lctrain.errors import InputError
from lctrain.heads import HeadPattern
from lctrain.model import decode
from lctrain.model.decode import GreedyDecoder
from lctrain.model.install import install

PATTERN = HeadPattern.from_gates([[0.9, 0.1], [0.2, 0.3]], threshold=0.5, num_sink_tokens=2, recent_size=5)
POLICIES = [
    FullCache(),
    DuoCache(pattern=PATTERN, positions="text"),
    StreamingCache(num_sink_tokens=2, recent_size=5, positions="text"),
    StreamingCache(num_sink_tokens=2, recent_size=20, positions="text"),
]


class Recording(TorchDispatchMode):
    """As a CUDA graph: what is captured is not run, and always reads and writes the same tensors."""

    def capture_begin(self, capture_error_mode):
        self.calls = []
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        changes = func._schema.is_mutable
        out = args[0] if changes else func(*args, **kwargs or {})
        if not tensors(out):  # of types alone
            return out
        if not changes:
            held = {x.untyped_storage().data_ptr() for x in tensors(args)}
            for tensor in tensors(out):
                if tensor.untyped_storage().data_ptr() not in held:
                    tensor.zero_()
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def tensors(args):
    return [x for x in tree_leaves(args) if torch.is_tensor(x)]


@pytest.fixture
def recordings(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    made = []
    fake = SimpleNamespace(
        CUDAGraph=lambda: made.append(Recording()) or made[-1],
        Stream=lambda: stream,
        stream=lambda stream: nullcontext(),
        current_stream=lambda: stream,
    )
    monkeypatch.setattr(decode, "cuda", fake)
    return made


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def model(tiny):
    made = tiny("llama")
    install(made, FullAttention())
    return made


def decoded(model, policy, tokens, num, graphs):
    cache = policy.new(model)
    prefill(model, tokens, None, cache, 5)
    step = GreedyDecoder(model, cache, tokens[:, -1:], graphs=graphs)
    found = torch.cat([tokens, *(step().clone() for _ in range(num))], dim=1)
    assert cache.get_seq_length() == found.shape[1] - 1
    return found


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_decodes_as_generate(model, ids, recordings, policy, graphs):
    tokens = ids(2, 12)
    how = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tokens, past_key_values=policy.new(model), **how)
    assert torch.equal(decoded(model, policy, tokens, 10, graphs), expected)
    assert len(recordings) == (1 if graphs else 0)


def test_captures_anew_when_a_buffer_grows(model, ids, recordings, monkeypatch):
    monkeypatch.setattr(full, "MIN_ROOM", 4)
    tokens = ids(1, 12)
    expected = decoded(model, FullCache(), tokens, 16, False)
    assert torch.equal(decoded(model, FullCache(), tokens, 16, True), expected)
    assert len(recordings) > 1


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        (FullAttention(), DuoCache(pattern=PATTERN, positions="cache")),
        (SlidingWindowAttention(sliding_window=4), FullCache()),
    ],
)
def test_what_changes_from_token_to_token_can_not_be_captured(tiny, ids, recordings, method, policy):
    model = tiny("llama")
    install(model, method)
    with pytest.raises(InputError, match="changes as the text grows; use graphs=False"):
        decoded(model, policy, ids(1, 12), 3, True)


def test_a_cache_of_transformers_can_not_be_captured(model, ids):
    with pytest.raises(InputError, match="some layers' caches are transformers' own"):
        GreedyDecoder(model, DynamicCache(config=model.config), ids(1, 1), graphs=True)
