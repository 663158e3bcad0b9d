"""Greedy decoding a token at a time, with little work for the host.

A decoding step of an 8B model is more than a thousand short kernels, and Python launches them more slowly than a card
runs them. All that does not depend on how many tokens there are is captured in CUDA graphs, a piece from each layer's
attention to the next; storing keys and attending run between the pieces as they always do.

Shape legend: B batch, H query heads, D head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda
from transformers import Cache, PreTrainedModel

from lctrain.cache.layer import CacheLayer, around
from lctrain.errors import InputError


class _Piece(NamedTuple):
    """A graph, and the attention behind it, none behind the last; the next graph finds its result in `out`."""

    graph: cuda.CUDAGraph
    attend: Callable[[], Tensor] | None
    out_BHLD: Tensor | None


class GreedyDecoder:
    """Each call feeds the last token of every row and returns the next, [B, 1], a tensor that the next call overwrites.

    Rows have no padding, and `cache` holds all their tokens but `last_ids`. With `graphs` the first call runs as it is,
    the second captures.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, last_ids_B1: Tensor, *, graphs: bool) -> None:
        if graphs and not all(isinstance(layer, CacheLayer) for layer in cache.layers):
            raise InputError("some layers' caches are transformers' own, which graphs can't hold; use graphs=False")
        self._model, self._cache, self._graphs = model, cache, graphs
        self._ids_B1 = last_ids_B1.clone()
        self._positions_11 = torch.full((1, 1), cache.get_seq_length(), device=last_ids_B1.device)
        self._stream = cuda.Stream() if graphs else None
        self._is_warm = False
        self._pieces: list[_Piece] = []

    @torch.no_grad()
    def __call__(self) -> Tensor:
        if self._stream is None or not self._is_warm:
            self._on_stream(self._step)
            self._is_warm = True
            return self._ids_B1
        if not self._pieces:
            self._on_stream(self._capture)
        for graph, attend, out_BHLD in self._pieces:
            graph.replay()
            if attend is not None and out_BHLD is not None:
                out_BHLD.copy_(attend())
        return self._ids_B1

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

    def _on_stream(self, run: Callable[[], None]) -> None:
        """Both the warm-up and the capture are on a stream of their own, whose workspaces the graphs use."""
        if self._stream is None:
            run()
            return
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            run()
        cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        """One forward that computes nothing: kernels go into graphs, attention is put off."""
        pool = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()

        def put_off(attend: Callable[[], Tensor], q_BHLD: Tensor) -> Tensor:
            nonlocal graph
            graph.capture_end()
            self._pieces.append(_Piece(graph, attend, torch.empty_like(q_BHLD)))
            graph = cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            return self._pieces[-1].out_BHLD  # type: ignore[return-value]

        token = around.set(put_off)
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            self._step()
            graph.capture_end()
        finally:
            around.reset(token)
        self._pieces.append(_Piece(graph, None, None))
