"""Greedy decoding a token at a time, with little work for the host.

A decoding step of an 8B model is more than a thousand short kernels, and Python launches them more slowly than a card
runs them. All that is the same for any number of tokens is captured in CUDA graphs. Keys that grow with the text are
stored and attended between two graphs as they always are; stores that forget run beside that, in a graph on a stream of
their own.

Shape legend: B batch, H query heads, D head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda
from transformers import Cache, PreTrainedModel

from lctrain.cache.layer import Attend, CacheLayer, runner
from lctrain.errors import InputError


class _Growing(NamedTuple):
    """What is run for a layer behind its graph; the next graph finds the results in `outs`."""

    layer: CacheLayer
    parts: list[Attend]
    outs: list[Tensor]
    beside: cuda.CUDAGraph | None


class _Piece(NamedTuple):
    """A graph, and a layer's growing stores, none behind the last."""

    graph: cuda.CUDAGraph
    growing: _Growing | None


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
        self._side = cuda.Stream() if graphs else None
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
        for layer in self._cache.layers:
            assert isinstance(layer, CacheLayer)
            layer.length += 1
        for graph, growing in self._pieces:
            graph.replay()
            if growing is not None:
                self._attend(growing)
        return self._ids_B1

    def _attend(self, growing: _Growing) -> None:
        main = cuda.current_stream()
        assert self._side is not None
        if growing.beside is not None:
            self._side.wait_stream(main)
            with cuda.stream(self._side):
                growing.beside.replay()
        for part, out_BHLD in zip(growing.parts, growing.outs, strict=True):
            out_BHLD.copy_(part(growing.layer.length - 1))
        if growing.beside is not None:
            main.wait_stream(self._side)

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
        """One forward that computes nothing: what is steady goes into graphs, what grows is put off."""
        pool = cuda.graph_pool_handle()

        def begin() -> cuda.CUDAGraph:
            started = cuda.CUDAGraph()
            started.capture_begin(pool=pool, capture_error_mode="thread_local")
            return started

        graph = begin()

        def run(layer: CacheLayer, start: int, parts: list[Attend]) -> list[Tensor]:
            nonlocal graph
            layer.length = start  # nothing was stored
            growing = [part for part in parts if not part.store.is_steady(start)]
            steady = [part for part in parts if part.store.is_steady(start)]
            if not growing:
                return [part(self._positions_11[0]) for part in steady]
            graph.capture_end()
            beside = begin() if steady else None
            outs = {id(part): part(self._positions_11[0]) for part in steady}
            if beside is not None:
                beside.capture_end()
            outs |= {id(part): torch.empty_like(part.q_BHLD) for part in growing}
            self._pieces.append(_Piece(graph, _Growing(layer, growing, [outs[id(part)] for part in growing], beside)))
            graph = begin()
            return [outs[id(part)] for part in parts]

        token = runner.set(run)
        try:
            self._step()
            graph.capture_end()
        finally:
            runner.reset(token)
        self._pieces.append(_Piece(graph, None))
