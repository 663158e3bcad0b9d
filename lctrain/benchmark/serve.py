"""Measurement of what a head pattern saves in serving: full attention's cache against DuoAttention's, in one run.

Weights, tokens and the pattern are random, since costs do not depend on their values.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lctrain.attention.full import FullAttention
from lctrain.benchmark.measure import GIB, forget, now
from lctrain.benchmark.random_model import RandomModel
from lctrain.benchmark.step import write
from lctrain.cache.base import CachePolicy, prefill
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.cache.layer import CacheLayer
from lctrain.errors import InputError
from lctrain.heads import HeadPattern
from lctrain.memory.savings import NOTHING
from lctrain.model.decode import GreedyDecoder
from lctrain.model.tuning import Frozen
from lctrain.tables import show

WARM_UP = 3  # decoded tokens that are not timed: the first runs without a graph, the second captures one
SHRINK = 0.99  # factor from a length that did not fit to the next length tried


@dataclass(frozen=True, kw_only=True)
class Served:
    """The results for one row of `length` tokens; memory is the device's, and `peak_gib` is 0 on a CPU."""

    cache: str
    length: int
    filled: str  # "read": all chunks of the prompt were; "random": only the last chunk, after random keys and values
    kv_gib: float
    peak_gib: float
    prefill_seconds: float | None
    decode_seconds: float  # median over tokens
    eager_seconds: float  # the same without CUDA graphs


def serve(cfg: DictConfig) -> list[dict[str, Any]]:
    """Measure each cache at `serve.lengths`, then at the longest that fits; write run_dir/serve.json after each row."""
    target = Path(cfg.run_dir) / "serve.json"
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    if cfg.serve.longest and device.type == "cpu":
        raise InputError("the longest row that fits is measured on a CUDA device; set serve.longest=false")
    recipe = RandomModel.like(
        instantiate(cfg.model, _convert_="all"), device, attention=FullAttention(), tuning=Frozen(), memory=NOTHING
    )
    policies = _policies(cfg, recipe)
    recipe.check([max(cfg.serve.lengths)], device.type)
    torch.manual_seed(cfg.seed)
    bench = _Bench(cfg, recipe.build(device).eval())
    settings = OmegaConf.to_container(cfg.serve)
    rows: list[dict[str, Any]] = []
    for row in bench.rows(policies):
        rows.append(asdict(row))
        write(target, rows, ratios=ratios(rows), settings=settings, weights_gib=bench.weights_gib)
    show(table(rows))
    show(ratio_table(ratios(rows)))
    print(target)
    return rows


def _policies(cfg: DictConfig, recipe: RandomModel) -> dict[str, CachePolicy]:
    """Return both cache policies, checked against the shortest row: streaming heads must have tokens to drop in it."""
    config = recipe.config().get_text_config()
    gates = torch.rand(
        config.num_hidden_layers, config.num_key_value_heads, generator=torch.Generator().manual_seed(cfg.seed)
    )
    pattern = HeadPattern.from_gates(
        gates,
        streaming_share=cfg.serve.streaming_share,
        num_sink_tokens=cfg.serve.num_sink_tokens,
        recent_size=cfg.serve.recent_size,
    )
    policies: dict[str, CachePolicy] = {"full": FullCache(), "duo": DuoCache(pattern=pattern, positions="text")}
    for policy in policies.values():
        policy.check(config, min(cfg.serve.lengths))
    return policies


class _Bench:
    """A model and the measurements of it."""

    def __init__(self, cfg: DictConfig, model: Any) -> None:
        self._cfg = cfg.serve
        self._model: PreTrainedModel = model
        self._cuda = model.device.type == "cuda"
        self.weights_gib = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB

    def rows(self, policies: dict[str, CachePolicy]) -> Iterator[Served]:
        """Yield the results of both caches at each length, ascending, and at last for the longest that fits."""
        overhead: dict[str, float] = {}
        for name, policy in policies.items():  # compile kernels for the shapes of a first and a later chunk
            self._read(name, policy, 2 * self._cfg.chunk_size)
        fill = self._read if self._cfg.read else self._filled
        for length in sorted(self._cfg.lengths):
            for name, policy in policies.items():
                row = fill(name, policy, length)
                overhead[name] = row.peak_gib - row.kv_gib
                yield row
        if self._cfg.longest:
            for name, policy in policies.items():
                yield self._longest(name, policy, overhead[name])

    def _read(self, name: str, policy: CachePolicy, length: int) -> Served:
        """Read a whole prompt of this length, then decode."""
        forget(self._model.device)
        cache, tokens = policy.new(self._model, length + self._room), self._tokens(length + 1)
        start = now(self._model.device)
        prefill(self._model, tokens, None, cache, self._cfg.chunk_size)
        return self._decode(name, cache, tokens[:, -1:], "read", now(self._model.device) - start)

    def _longest(self, name: str, policy: CachePolicy, overhead: float) -> Served:
        """Measure the longest row that fits: estimate it by shorter rows, then shrink it until `_filled` fits."""
        forget(self._model.device)
        free = torch.cuda.mem_get_info()[0] / GIB + self.weights_gib - overhead
        length = int(free * GIB / self._num_bytes(policy, 2**20) * 2**20)
        while True:
            with suppress(torch.OutOfMemoryError):
                return self._filled(name, policy, length)
            length = int(length * SHRINK)

    def _filled(self, name: str, policy: CachePolicy, length: int) -> Served:
        """Fill the cache with random keys and values, read the last chunk after them, then decode."""
        forget(self._model.device)
        cache, tokens = policy.new(self._model, length + self._room), self._tokens(length + 1)
        prefill(self._model, tokens[:, :2], None, cache, None)  # makes the buffers
        for layer in _layers(cache):
            layer.length = length - self._cfg.chunk_size
            for part in layer.parts:
                for tensor in filter(Tensor.is_floating_point, part.store.tensors()):
                    tensor.normal_()
        prefill(self._model, tokens, None, cache, self._cfg.chunk_size)
        return self._decode(name, cache, tokens[:, -1:], "random", None)

    def _decode(self, name: str, cache: Cache, last: torch.Tensor, filled: str, seconds: float | None) -> Served:
        length, peak = cache.get_seq_length(), torch.cuda.max_memory_allocated() / GIB if self._cuda else 0.0
        eager = self._token_seconds(GreedyDecoder(self._model, cache, last, graphs=False))
        captured = self._token_seconds(GreedyDecoder(self._model, cache, last, graphs=True)) if self._cuda else eager
        return Served(
            cache=name,
            length=length,
            filled=filled,
            kv_gib=held_bytes(cache) / GIB,
            peak_gib=peak,
            prefill_seconds=seconds,
            decode_seconds=captured,
            eager_seconds=eager,
        )

    def _token_seconds(self, step: GreedyDecoder) -> float:
        for _ in range(WARM_UP):
            step()
        times = []
        for _ in range(self._cfg.num_tokens):
            start = now(self._model.device)
            step()
            times.append(now(self._model.device) - start)
        return median(times)

    @property
    def _room(self) -> int:
        """Return the number of tokens to reserve for decoding."""
        return 2 * (WARM_UP + int(self._cfg.num_tokens))

    def _num_bytes(self, policy: CachePolicy, length: int) -> int:
        return policy.num_bytes(self._model.config, length, 1, self._model.dtype)

    def _tokens(self, length: int) -> torch.Tensor:
        return torch.randint(self._model.config.get_text_config().vocab_size, (1, length), device=self._model.device)


def _layers(cache: Cache) -> Iterator[CacheLayer]:
    for layer in cache.layers:
        assert isinstance(layer, CacheLayer)
        yield layer


def held_bytes(cache: Cache) -> int:
    """Return the bytes that the cache's stores hold."""
    return sum(part.store.num_bytes for layer in _layers(cache) for part in layer.parts)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return duo's share of full's memory and its speed-up at each length, and the ratio of the longest lengths."""
    full, duo = ([row for row in rows if row["cache"] == name] for name in ("full", "duo"))
    compared = []
    for a, b in zip(full, duo, strict=False):
        if a["length"] != b["length"]:
            compared.append({"longest": b["length"] / a["length"]})
            continue
        memory = {name: b[name] / a[name] for name in ("kv_gib", "peak_gib") if a[name]}
        seconds = ("prefill_seconds", "decode_seconds", "eager_seconds")
        speed = {name: a[name] / b[name] for name in seconds if a[name]}
        compared.append({"length": a["length"]} | memory | speed)
    return compared


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a line per row."""
    names = ("cache", "tokens", "KV GiB", "peak GiB", "prefill s", "decode ms", "without graphs ms")
    shown = Table(*names, caption="a star: the cache was filled with random numbers, but for the last chunk")
    for row in rows:
        shown.add_row(
            row["cache"],
            f"{row['length']:,}{'*' if row['filled'] == 'random' else ''}",
            f"{row['kv_gib']:.3f}",
            f"{row['peak_gib']:.2f}",
            "" if row["prefill_seconds"] is None else f"{row['prefill_seconds']:.2f}",
            f"{1000 * row['decode_seconds']:.2f}",
            f"{1000 * row['eager_seconds']:.2f}",
        )
    return shown


def ratio_table(compared: list[dict[str, Any]]) -> Table:
    """Return a line per ratio."""
    names = list(dict.fromkeys(name for ratio in compared for name in ratio))
    told = "memory as a share of full's, times as how often duo's fit into them"
    shown = Table(*(name.replace("_", " ") for name in names), title="Duo against full", caption=told)
    for ratio in compared:
        values = (ratio.get(name, "") for name in names)
        shown.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if value else "" for value in values)
        )
    return shown
