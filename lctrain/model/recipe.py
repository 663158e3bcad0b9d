"""Recipes that build the model to train from a folder, a hub id or a bare config."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig  # type: ignore[attr-defined]

from lctrain.attention.base import Attention
from lctrain.errors import InputError
from lctrain.kernels.choose import choose
from lctrain.matmul import fp8
from lctrain.memory.host import Host, PinnedHost
from lctrain.memory.savings import AutoSavings, Savings
from lctrain.model import layers, learned
from lctrain.model.head import unwrap
from lctrain.model.install import demand, install
from lctrain.model.tuning import Frozen, FullTuning, Tuning, keep_trained_in_fp32, num_elements
from lctrain.parallel.ulysses import Ulysses, check_heads
from lctrain.rope.base import RopeScheme

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(ABC):
    """A description of the model to train; no weights are loaded before `build`."""

    attention: Attention
    rope: RopeScheme
    tuning: Tuning
    sequence_length: int
    kernel: str
    layer_kernel: str
    dtype: str
    precision: str | None
    memory: Savings | AutoSavings

    @abstractmethod
    def base_config(self) -> PreTrainedConfig:
        """Return the config as it was published."""

    @abstractmethod
    def load(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        """Return a model with config `config` and its weights in `dtype`."""

    @cached_property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    def learned(self) -> dict[str, Tensor]:
        """Return what the attention method learned in an earlier run; nothing where it begins anew."""
        return {}

    def config(self) -> PreTrainedConfig:
        """Return a copy of the config to train and export with."""
        return deepcopy(self._adapted_config)

    @cached_property
    def _adapted_config(self) -> PreTrainedConfig:
        """The config to train and export with: positions stretched, and the window that the method asks for."""
        config = self.base_config()
        self.rope.apply(config, self.sequence_length)
        replaced = self.attention.adapt_config(config.get_text_config())
        window = getattr(config.get_text_config(), "sliding_window", None)
        if replaced or window:
            log.info("attention: %s", replaced or f"the model's own window of {window} tokens is kept where it has one")
        return config

    def check(self, lengths: Sequence[int], device_type: str = "cpu", sequence_parallel_size: int = 1) -> None:
        """Raise InputError, before any weight is read, if the model can't be trained on `device_type` on rows of these
        lengths (ascending).
        """
        config = self.check_attention(lengths, sequence_parallel_size)
        choose(self.kernel, demand(config, self.torch_dtype(config), device_type))
        self._check_layers(config, device_type)
        if len(self.tokenizer) > config.vocab_size:
            raise InputError(
                f"the tokenizer knows {len(self.tokenizer)} tokens, the embedding only {config.vocab_size}: "
                "this tokenizer does not belong to this model"
            )

    def _check_layers(self, config: PreTrainedConfig, device_type: str) -> None:
        """Check what needs the model's modules, on a skeleton without memory."""
        skeleton = unwrap(self.skeleton(self.config()))
        layers.uses_liger(self.layer_kernel, device_type)
        self._savings().check(config, device_type=device_type, dropout=self.drops_out())
        if self.precision not in (None, "fp8"):
            raise InputError(f"precision={self.precision} is not fp8, for frozen matrices, or null")
        if self.precision == "fp8":
            fp8.check(torch.device(device_type))
            layers.quantize_frozen(skeleton)
        self._part_heads(skeleton)

    def check_attention(self, lengths: Sequence[int], sequence_parallel_size: int = 1) -> PreTrainedConfig:
        """Run the part of `check` that needs only the config, and return the config."""
        config = self.config().get_text_config()
        if not hasattr(config, "num_key_value_heads"):
            raise InputError(f"{config.model_type} tells no num_key_value_heads; its attention can't be replaced")
        if longer := [length for length in lengths if length > self.sequence_length]:
            raise InputError(
                f"rows of {longer[-1]} tokens are longer than model.sequence_length={self.sequence_length}, for which "
                "positions are stretched; give a larger one, or shorter rows by sequence_length"
            )
        self.attention.check(config, list(lengths))
        if sequence_parallel_size > 1:
            if not self.attention.supports_sequence_parallel:
                raise InputError(f"{type(self.attention).__name__} needs whole rows; use sequence_parallel_size=1")
            at_a_time = isinstance(self.memory, Savings) and self.memory.kv_heads_at_a_time
            kv_heads = at_a_time or config.num_key_value_heads
            num_heads = config.num_attention_heads * kv_heads // config.num_key_value_heads
            check_heads(num_heads, kv_heads, sequence_parallel_size)
        return config

    def build(
        self,
        device: torch.device | str = "cpu",
        ulysses: Ulysses | None = None,
        zero3: Mapping[str, Any] | None = None,
    ) -> PreTrainedModel | PeftModel:
        """Load the model to `device`, install the attention on a kernel that runs there, and choose what trains.

        With `zero3`, DeepSpeed's config, each parameter goes straight into its shards: no rank ever holds the model.
        """
        if zero3 is not None and self.precision == "fp8":
            raise InputError(
                "precision=fp8 scales whole matrices, and strategy=zero3 shards them; use another strategy"
            )
        if zero3 is not None and self._savings().kv_heads_at_a_time:
            raise InputError(
                "memory.kv_heads_at_a_time computes with parts of matrices, and strategy=zero3 gathers whole ones for "
                "whole layers; use another strategy"
            )
        config = self.config()
        half = zero3 is not None and zero3["data_types"]["grad_accum_dtype"] == "bf16"
        dtype = self.loaded_dtype(config, half)
        if zero3 is None:
            model = self.load(config, dtype)
            model.to(device)  # type: ignore[arg-type]
        else:
            bf16 = {"enabled": dtype == torch.bfloat16}
            known = HfDeepSpeedConfig({**zero3, "bf16": bf16})  # transformers shards as long as this object exists
            model = self.load(config, dtype)
            del known
        kernel = install(model, self.attention, self.kernel, ulysses)
        log.info("attention: %s on kernel %s", self.attention, kernel)
        if values := self.learned():
            learned.fill(model, self.attention, values)
        elif self.attention.learns and isinstance(self.tuning, Frozen):
            log.warning("attention: %s has learned nothing yet, and runs as it begins", self.attention)
        tuned = self._tune(model, half)
        liger = layers.uses_liger(self.layer_kernel, model.device.type)
        self.speed_up(unwrap(tuned), layers.liger() if liger else None, PinnedHost())
        log.info("layers: %s; memory: %s", "Liger's" if liger else "transformers'", self.memory)
        trainable = sum(num_elements(p) for p in tuned.parameters() if p.requires_grad)
        total = sum(num_elements(p) for p in tuned.parameters())
        log.info("parameters: %s, %s trainable (%.2f%%)", f"{total:,}", f"{trainable:,}", 100 * trainable / total)
        return tuned

    def skeleton(self, config: PreTrainedConfig) -> PreTrainedModel | PeftModel:
        """Return the model as it would train, on the meta device, which takes no memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.torch_dtype(config))
            install(model, self.attention, "reference")
            return self._tune(model)

    def _tune(self, model: PreTrainedModel, half: bool = False) -> PreTrainedModel | PeftModel:
        tuned = self.tuning.apply(model)
        if not isinstance(self.tuning, Frozen):
            for name, parameter in tuned.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or self.attention.owns(name))
        if not half:
            keep_trained_in_fp32(tuned)
        return tuned

    def speed_up(self, model: PreTrainedModel, kernels: layers.LayerKernels | None, host: Host) -> None:
        """Replace a tuned model's modules by faster ones and apply the memory savings.

        The names of the parameters and the set of those that train stay the same.
        """
        if self.precision == "fp8":
            layers.quantize_frozen(model)
        if kernels is not None:
            layers.fuse(model, kernels)
        if self.autocasts() and model.get_input_embeddings().weight.requires_grad:
            layers.keep_stream_in(model, self.torch_dtype(model.config))
        self._part_heads(model)
        self._savings().apply(model, host)

    def _part_heads(self, model: PreTrainedModel) -> None:
        counts = self._savings().resolve(model.config.get_text_config().num_hidden_layers)
        if counts.kv_heads_at_a_time:
            layers.part_heads(model, int(counts.checkpoint_layers), counts.kv_heads_at_a_time)

    def _savings(self) -> Savings:
        if isinstance(self.memory, AutoSavings):
            raise TypeError("memory=auto is resolved by lctrain.plan before a model is built")
        return self.memory

    def drops_out(self) -> bool:
        """Return whether there is dropout, so that two forwards of the same row differ."""
        return bool(getattr(self.tuning, "lora_dropout", 0.0))

    def autocasts(self) -> bool:
        """Return whether the model is in half precision: what trains is then kept in fp32 and computed with in bf16."""
        return self.torch_dtype(self.config()) != torch.float32

    def loaded_dtype(self, config: PreTrainedConfig, half: bool = False) -> torch.dtype:
        """Return the dtype that weights are loaded in: fp32 if all of them train, unless in `half` precision."""
        return torch.float32 if self.tuning.trains_all and not half else self.torch_dtype(config)

    def torch_dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """Return the torch dtype that `self.dtype` means for a model of this config."""
        dtype = config.dtype or torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"model.dtype={self.dtype} is not a torch dtype; use auto, float32 or bfloat16")
        return dtype


@dataclass(frozen=True, kw_only=True)
class PretrainedModel(ModelRecipe):
    """A causal LM from a local folder or a hub id. Unless the settings allow more, its weights must be safetensors and
    none of its code runs.

    `architecture` is the published shape of a hub model, to plan with when the hub can't be reached; `check` refuses a
    model that differs from it.
    """

    path: str
    revision: str
    use_safetensors: bool
    trust_remote_code: bool
    architecture: Mapping[str, Any] | None = field(default=None)

    def base_config(self) -> PreTrainedConfig:
        if self.architecture is None or self._is_local():
            return self._published_config()
        try:
            return self._published_config(local_files_only=True)  # in the hub's cache if `check` or a run fetched it
        except InputError:
            return AutoConfig.for_model(**self.architecture)

    def load(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        self._check_weights()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                revision=self.revision,
                use_safetensors=self.use_safetensors,
                trust_remote_code=self.trust_remote_code,
                ignore_mismatched_sizes=True,  # the error below names them
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:
            raise InputError(f"model.path={self.path}: {_first_line(error)}") from error
        model, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
            raise InputError(f"model.path={self.path}: weights missing or of another shape: {', '.join(lacking[:3])} …")
        return cast(PreTrainedModel, model)

    def learned(self) -> dict[str, Tensor]:
        return learned.values_for(self.attention, self.path, self.revision) if self.attention.learns else {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        self._check_folder()
        try:
            return AutoTokenizer.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.path={self.path} has no tokenizer that loads: {_first_line(error)}") from error

    def check(self, lengths: Sequence[int], device_type: str = "cpu", sequence_parallel_size: int = 1) -> None:
        self._check_weights()
        self.learned()  # refuses a folder that learned with other settings
        published = self._published_config()
        for key, value in (self.architecture or {}).items():
            if getattr(published, key, value) != value:
                raise InputError(f"model.architecture.{key} is {value}, but {self.path} has {getattr(published, key)}")
        super().check(lengths, device_type, sequence_parallel_size)

    def _published_config(self, local_files_only: bool = False) -> PreTrainedConfig:
        self._check_folder()
        try:
            config = AutoConfig.from_pretrained(
                self.path,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=local_files_only,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.path={self.path}: {_first_line(error)}") from error
        return cast(PreTrainedConfig, config)

    def _is_local(self) -> bool:
        path = Path(self.path)
        beside = path.parent != Path() and path.parent.is_dir()  # tells a missing folder from a hub id, owner/name
        return path.exists() or beside or self.path.startswith((".", "/", "~")) or self.path.count("/") > 1

    def _check_folder(self) -> None:
        folder = Path(self.path)
        if self._is_local() and not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise InputError(f"model.path={self.path} {what}; give a folder in Hugging Face format or a hub id")

    def _check_weights(self) -> None:
        """Open the headers of a local folder's safetensors, to refuse a truncated file before anything is built."""
        if not self._is_local():
            return
        self._check_folder()
        shards = sorted(Path(self.path).glob("*.safetensors"))
        if not shards and (self.use_safetensors or not list(Path(self.path).glob("*.bin"))):
            raise InputError(f"model.path={self.path} holds no weights in safetensors format")
        for shard in shards:
            try:
                with safe_open(shard, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise InputError(f"{shard} is truncated or not a safetensors file: {_first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class ScratchModel(ModelRecipe):
    """A model with random weights, to pretrain. `architecture` is a transformers config, `model_type` included."""

    architecture: Mapping[str, Any]
    tokenizer_path: str

    def check(self, lengths: Sequence[int], device_type: str = "cpu", sequence_parallel_size: int = 1) -> None:
        if not isinstance(self.tuning, FullTuning):
            raise InputError("model=scratch starts from random weights, which must all train; use tuning=full")
        super().check(lengths, device_type, sequence_parallel_size)

    def base_config(self) -> PreTrainedConfig:
        special = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return AutoConfig.for_model(**{**self.architecture, **special, "vocab_size": len(self.tokenizer)})

    def load(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.tokenizer_path)
        except (OSError, ValueError) as error:
            raise InputError(f"model.tokenizer_path={self.tokenizer_path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
