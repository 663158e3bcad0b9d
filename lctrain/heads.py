"""Which heads retrieve and which stream: the result of training gates, and what a model is deployed with."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lctrain.errors import InputError

TSV, JSON = "full_attention_heads.tsv", "head_pattern.json"  # in the authors' folders and in exported ones
DEPLOYED = {"num_sink_tokens": 64, "recent_size": 256}  # the authors'
_OVERSHOOT = 0.1  # the authors clamp before each step: what they write may be a step outside


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """Which key-value heads retrieve (keep every key) and which stream (keep sinks and recent tokens).

    DuoAttention (Xiao et al., arXiv:2410.10819, §2.3). A head retrieves where its gate α is above `threshold`; or the
    `streaming_share` of heads with the smallest gates stream, that many exactly: equal gates, of which clamping makes
    many, are told apart by a fixed draw. Give one of the two.

    gates: α per layer and key-value head. num_sink_tokens, recent_size: what a streaming head keeps, the token itself
    included. provenance: the model, the run, its step and versions.
    """

    gates: tuple[tuple[float, ...], ...]
    threshold: float | None = None
    streaming_share: float | None = None
    num_sink_tokens: int
    recent_size: int
    provenance: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.gates or not self.gates[0] or len({len(layer) for layer in self.gates}) > 1:
            raise InputError("a head pattern needs the same number of gates, at least one, in every layer")
        for layer, gates in enumerate(self.gates):
            for head, gate in enumerate(gates):
                if not 0 <= gate <= 1:  # NaN is not either
                    raise InputError(f"head pattern: gate of layer {layer}, head {head} is {gate}, not within 0 and 1")
        if (self.threshold is None) == (self.streaming_share is None):
            raise InputError("a head pattern needs one of threshold and streaming_share")
        for name in ("threshold", "streaming_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"head pattern: {name}={value} must be within 0 and 1")
        sizes = self.num_sink_tokens, self.recent_size
        if any(type(size) is not int for size in sizes) or sizes[0] < 0 or sizes[1] < 1:
            raise InputError(
                f"head pattern: num_sink_tokens={sizes[0]} must be a whole number of at least 0 and "
                f"recent_size={sizes[1]} one of at least 1"
            )

    @property
    def retrieval_heads(self) -> Tensor:
        """Bool [layers, key-value heads], True where the head retrieves."""
        gates = torch.tensor(self.gates, dtype=torch.float64)
        if self.threshold is not None:
            return gates > self.threshold
        assert self.streaming_share is not None
        tie_break = np.random.default_rng(0).permutation(gates.numel())
        ascending = np.lexsort((tie_break, gates.flatten().numpy()))
        retrieves = torch.ones(gates.numel(), dtype=torch.bool)
        retrieves[ascending[: round(self.streaming_share * gates.numel())].copy()] = False
        return retrieves.view_as(gates)

    @classmethod
    def from_gates(
        cls,
        gates: Tensor | Sequence[Sequence[float]],
        *,
        threshold: float | None = None,
        streaming_share: float | None = None,
        num_sink_tokens: int = DEPLOYED["num_sink_tokens"],
        recent_size: int = DEPLOYED["recent_size"],
        provenance: Mapping[str, str] | None = None,
    ) -> "HeadPattern":
        """The pattern of gates [layers, key-value heads]; InputError if they are none."""
        rows = gates.tolist() if isinstance(gates, Tensor) else gates
        return cls(
            gates=tuple(tuple(float(gate) for gate in layer) for layer in rows),
            threshold=threshold,
            streaming_share=streaming_share,
            num_sink_tokens=num_sink_tokens,
            recent_size=recent_size,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def read(
        cls, path: str | Path, *, threshold: float | None = None, streaming_share: float | None = None
    ) -> "HeadPattern":
        """From JSON, from a TSV of the authors' (a row a layer, a column a head), or from a folder that holds either.

        `threshold` or `streaming_share` replaces what the file says; a TSV says nothing and is read with 0.5. What a
        streaming head keeps comes from the authors' config.json beside it, where it names what is deployed, else it is
        their 64 sinks and 256 recent tokens. InputError for what is no pattern.
        """
        file = Path(path)
        if file.is_dir():
            file = file / JSON if (file / JSON).is_file() else file / TSV
        if not file.is_file():
            raise InputError(f"{path} is no head pattern; give {JSON}, {TSV}, or a folder with one of them")
        try:
            pattern = cls._from_json(file) if file.suffix == ".json" else cls._from_tsv(file)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file} is no head pattern: {error}") from error
        return pattern.deployed(threshold=threshold, streaming_share=streaming_share)

    @classmethod
    def _from_json(cls, file: Path) -> "HeadPattern":
        content, names = json.loads(file.read_text()), [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, dict) or not {"gates"} <= content.keys() <= set(names):
            raise InputError(f"a head pattern has gates, and nothing but {', '.join(names)}")
        return cls.from_gates(content.pop("gates"), **content)

    @classmethod
    def _from_tsv(cls, file: Path) -> "HeadPattern":
        rows = [row for row in file.read_text().splitlines() if row.strip()]
        gates = np.loadtxt(rows, delimiter="\t", ndmin=2) if rows else np.empty((0, 0))
        near = (gates >= -_OVERSHOOT) & (gates <= 1 + _OVERSHOOT)
        beside = file.with_name("config.json")
        settings: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
        sinks, recent = settings.get("deploy_sink_size"), settings.get("deploy_recent_size")
        return cls.from_gates(
            np.where(near, gates.clip(0, 1), gates).tolist(),
            threshold=0.5,
            num_sink_tokens=DEPLOYED["num_sink_tokens"] if sinks is None else sinks,
            recent_size=DEPLOYED["recent_size"] if recent is None else recent,
            provenance={"model": settings["model_name"]} if "model_name" in settings else {},
        )

    def deployed(
        self,
        *,
        threshold: float | None = None,
        streaming_share: float | None = None,
        num_sink_tokens: int | None = None,
        recent_size: int | None = None,
    ) -> "HeadPattern":
        """The same gates, with what is given here in place of what was decided before."""
        decided = threshold is not None or streaming_share is not None
        return dataclasses.replace(
            self,
            threshold=threshold if decided else self.threshold,
            streaming_share=streaming_share if decided else self.streaming_share,
            num_sink_tokens=self.num_sink_tokens if num_sink_tokens is None else num_sink_tokens,
            recent_size=self.recent_size if recent_size is None else recent_size,
        )

    def write_tsv(self, path: str | Path) -> None:
        """The gates, as the authors write them."""
        np.savetxt(path, np.array(self.gates), delimiter="\t")

    def write_json(self, path: str | Path) -> None:
        """Everything; `read` gives it back."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:
        """InputError if it is not for a model of this config, or streaming heads see all of `length` tokens."""
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None)
        if heads is None:
            raise InputError(f"{text.model_type} tells no num_key_value_heads: it has no heads to retrieve or stream")
        if (len(self.gates), len(self.gates[0])) != (text.num_hidden_layers, heads):
            raise InputError(
                f"the head pattern has {len(self.gates)} layers of {len(self.gates[0])} key-value heads, "
                f"the model {text.num_hidden_layers} of {heads}"
            )
        known = self.provenance.get("architecture")
        if known is not None and known != architecture(config):
            raise InputError(f"the head pattern is of another model ({known}), this one is {architecture(config)}")
        if length is not None and self.num_sink_tokens + self.recent_size >= length:
            raise InputError(
                f"streaming heads keep {self.num_sink_tokens} + {self.recent_size} tokens, which is all of {length}; "
                "use full attention, or smaller num_sink_tokens and recent_size"
            )


def architecture(config: PreTrainedConfig) -> str:
    """What a pattern's provenance knows its model by: models that differ in it can't share a pattern."""
    text = config.get_text_config()
    return f"{text.model_type}, hidden size {text.hidden_size}, vocabulary of {text.vocab_size}"
