"""Decode greedily, one token at a time, with little work for the host.

A decoding step of an 8B model is more than a thousand short kernels, which Python launches more slowly than a GPU runs
them. A CUDA graph launches them all at once; the number of tokens so far is kept on the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cuda
from transformers import Cache, PreTrainedModel

from lctrain.cache.layer import CacheLayer, before
from lctrain.errors import InputError


class GreedyDecoder:
    """A decoder that feeds each row's last token and returns the next, [B, 1], which the following call overwrites.

    Rows have no padding, and `cache` holds all their tokens but `last_ids`. With `graphs`, the first call runs without
    a graph and the second captures one; both are repeated whenever a buffer has to grow. Raises InputError for caches
    that can't be captured: transformers' own, positions of the cache, an attention method that is not full.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, last_ids_B1: Tensor, *, graphs: bool) -> None:
        if graphs and not all(isinstance(layer, CacheLayer) for layer in cache.layers):
            raise InputError("some layers' caches are transformers' own, which graphs can't hold; use graphs=False")
        self._model, self._cache = model, cache
        self._ids_B1 = last_ids_B1.clone()
        self._positions_11 = torch.full((1, 1), cache.get_seq_length(), device=last_ids_B1.device)
        self._stream = cuda.Stream() if graphs else None
        self._is_warm = False
        self._graph: cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if self._stream is None:
            self._step()
        elif not self._is_warm or self._must_grow():
            self._on_stream(self._stream, self._step)
            self._is_warm, self._graph = True, None
        else:
            if self._graph is None:
                self._on_stream(self._stream, self._capture)
            self._replay()
        return self._ids_B1

    def _must_grow(self) -> bool:
        return any(layer.room <= layer.length for layer in self._cache.layers if isinstance(layer, CacheLayer))

    def _replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()
        for layer in self._cache.layers:
            assert isinstance(layer, CacheLayer)
            layer.length += 1

    def _step(self) -> None:
        out: Any = self._model(
            input_ids=self._ids_B1,
            position_ids=self._positions_11.expand(self._ids_B1.shape),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._ids_B1.copy_(out.logits[:, -1:].argmax(-1))
        self._positions_11.add_(1)

    def _on_stream(self, stream: cuda.Stream, run: Callable[[], None]) -> None:
        """Run the warm-up or the capture on `stream`: a graph uses the workspaces of the stream that captured it."""
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            run()
        cuda.current_stream().wait_stream(stream)

    def _capture(self) -> None:
        """Record one decoding step as a CUDA graph, without computing it."""
        self._graph = cuda.CUDAGraph()
        token = before.set(self._positions_11[0])
        self._graph.capture_begin(capture_error_mode="thread_local")
        try:
            self._step()
        finally:
            self._graph.capture_end()
            before.reset(token)
