"""Store which heads retrieve and which stream: training gates decides it, and deployment uses it."""

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

TSV, JSON = "full_attention_heads.tsv", "head_pattern.json"  # in the authors' folders, and in exported ones
DEPLOYED = {"num_sink_tokens": 64, "recent_size": 256}  # the authors' values
_OVERSHOOT = 0.1  # the authors clamp before each step, so the gates they write may be one step outside 0 to 1


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """A choice of key-value heads that retrieve (keep every key) or stream (keep sinks and recent tokens).

    DuoAttention (Xiao et al., arXiv:2410.10819, §2.3). Give `threshold` or `streaming_share`: a head retrieves where
    its gate α is above `threshold`, or exactly the `streaming_share` of heads with the smallest gates stream. Clamping
    makes many gates equal, and a fixed random order decides between those.

    gates: α per layer and key-value head. num_sink_tokens, recent_size: the tokens that a streaming head keeps, the
    current one included. provenance: the model, the run, its step and versions. Raises InputError for invalid values.
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
                if not 0 <= gate <= 1:  # NaN fails this too
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
        """Return bool [layers, key-value heads], True where the head retrieves."""
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
        """Build the pattern of gates [layers, key-value heads]. Raises InputError for invalid gates or sizes."""
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
        """Read a pattern from JSON, an authors' TSV (a line per layer, a column per head) or a folder with either.

        `threshold` or `streaming_share` replaces the file's; a TSV has none, and its threshold is 0.5. The sizes of a
        TSV's streaming heads are the deployed ones in the authors' config.json beside it, or else 64 sinks and 256
        recent tokens. Raises InputError if the file is no pattern.
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
        """Return a pattern with the same gates, and with the values given here in place of the old ones."""
        decided = threshold is not None or streaming_share is not None
        return dataclasses.replace(
            self,
            threshold=threshold if decided else self.threshold,
            streaming_share=streaming_share if decided else self.streaming_share,
            num_sink_tokens=self.num_sink_tokens if num_sink_tokens is None else num_sink_tokens,
            recent_size=self.recent_size if recent_size is None else recent_size,
        )

    def write_tsv(self, path: str | Path) -> None:
        """Write the gates as the authors do."""
        np.savetxt(path, np.array(self.gates), delimiter="\t")

    def write_json(self, path: str | Path) -> None:
        """Write the whole pattern; `read` returns it."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:
        """Raise InputError if the pattern is of another model, or its streaming heads keep all of `length` tokens."""
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
    """Return the description by which a pattern's provenance identifies its model's architecture.

    Models with different descriptions can't share a pattern.
    """
    text = config.get_text_config()
    return f"{text.model_type}, hidden size {text.hidden_size}, vocabulary of {text.vocab_size}"
