"""Linear attention with gates beside a window of softmax attention, converted from a model's own attention.

Shape legend: B batch, H query heads, K key-value heads, G query heads of a key-value head, L queries, S keys, D head
dim, E = D + 1: a value and a 1, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Call, Cost, Layout, MaskedAttention, require_positive
from lctrain.attention.full import FullAttention
from lctrain.errors import InputError
from lctrain.kernels.linear_attention import Entries, linear, windowed

INITIAL_WINDOW_FACTOR = -2.197  # as in LoLCATs: softmax weights begin with a factor of 0.1
MIN_FEATURE = 1e-12  # the weights of a query never add up to 0


class FeatureMaps(nn.Module):
    """What linear attention learns in a layer: feature maps, the factor of softmax weights, and gates."""

    def __init__(self, method: "LinearAttention", num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        identity_DF = torch.eye(head_dim, method.feature_dim)
        self.feature_map_q = nn.Parameter(identity_DF.repeat(num_heads, 1, 1))
        self.feature_map_k = nn.Parameter(identity_DF.repeat(num_kv_heads, 1, 1))
        self.window_factors = nn.Parameter(torch.full((num_heads,), INITIAL_WINDOW_FACTOR))
        self.gate_weight = nn.Parameter(torch.zeros(num_kv_heads, head_dim))
        bias = -log(expm1(log(2) / method.initial_half_life))  # logsigmoid(bias) = -log(2) / half-life
        self.gate_bias = nn.Parameter(torch.full((num_kv_heads,), bias))

    def forward(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return φ(q) [B, H, L, 2F], φ(k) [B, K, S, 2F], log α [B, K, S] and the factors [H], of the heads here."""
        num_heads, first_head = q_BHLD.shape[1], layout.first_head

        def of_queries(parameter_H: Tensor, step: int = 1) -> Tensor:
            return parameter_H[first_head : first_head + num_heads : step].to(q_BHLD.dtype)

        def of_keys(parameter_K: Tensor) -> Tensor:  # ranks that share a row may each hold some queries of one key head
            parameter_H = parameter_K.repeat_interleave(layout.num_attention_heads // layout.num_key_value_heads, dim=0)
            return of_queries(parameter_H, num_heads // k_BKSD.shape[1])

        gates_BKS = torch.einsum("bksd,kd->bks", v_BKSD, of_keys(self.gate_weight)) + of_keys(self.gate_bias)[:, None]
        phi_q, phi_k = q_BHLD @ of_queries(self.feature_map_q), k_BKSD @ of_keys(self.feature_map_k)
        factors_H = of_queries(self.window_factors).sigmoid()
        return _features(phi_q), _features(phi_k), F.logsigmoid(gates_BKS), factors_H


def _features(x: Tensor) -> Tensor:
    return torch.cat((x.softmax(-1), (-x).softmax(-1)), dim=-1).clamp(min=MIN_FEATURE)


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Attention):
    """Linear attention beside a softmax window, in place of a model's attention in some layers.

    LoLCATs (Zhang et al., arXiv:2410.10254) gives both one denominator. With w = `sliding_window`,
    s_ij = q_i·k_j · scaling, c_i its maximum over the window, and G the sum of log α up to a token,

        y_i = (γ Σ_{i-w < j <= i} exp(s_ij - c_i) v_j + Σ_{j <= i-w} exp(G_{i-w} - G_j) φ(q_i)·φ(k_j) v_j)
              / (the same without v_j)

    where φ(x) = [softmax(xW), softmax(-xW)] is Hedgehog's feature map (arXiv:2402.04347), which begins with W as the
    identity, and γ the sigmoid of a factor per query head. α = sigmoid(v·u + b) is a decay per key-value head and
    token, as in gated linear attention (Liger, arXiv:2503.01496), which begins with u = 0 and a b that halves what is
    kept every `initial_half_life` tokens. A token enters the state, and decays it, when it leaves the window.

    `layers` lists the layers that are linear; with `full_attention_interval` = n every n-th runs full attention, as in
    Qwen3-Next, and the others are linear; with neither, all are. q, k and v come from the model's own projections.
    Everything is computed in fp32 or more; `chunk_size` divides the work and does not change the result.

    Deviations: LoLCATs has no gates, a feature map of k per query head instead of per key-value head, and trains in two
    stages (objective=distillation with loss=attention_output is its attention transfer, except that each layer reads
    what the layers before it made of the text instead of what the teacher's did). Liger makes gates from k before
    rotation, which an attention method does not get; v is not rotated either.

    Cost: O(chunk_size + sliding_window + feature_dim) per token while a row is read. Decoding with cache=full keeps all
    keys, and sums up those before the forward anew in each.
    """

    layers: Sequence[int] | None
    full_attention_interval: int | None
    sliding_window: int
    feature_dim: int
    initial_half_life: float
    chunk_size: int

    def __post_init__(self) -> None:
        if self.layers is not None and self.full_attention_interval is not None:
            raise InputError("give one of attention.layers and attention.full_attention_interval, or null for both")
        sizes = ("full_attention_interval", "sliding_window", "feature_dim", "initial_half_life", "chunk_size")
        require_positive(self, **{name: getattr(self, name) for name in sizes})

    def is_linear(self, layer_idx: int) -> bool:
        """Return whether a layer is linear."""
        if self.layers is not None:
            return layer_idx in self.layers
        return self.full_attention_interval is None or (layer_idx + 1) % self.full_attention_interval != 0

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        if not self.is_linear(call.layout.layer_idx):
            return call.run(FullAttention(), q_BHLD, k_BKSD, v_BKSD)
        num_tokens = call.rows.first_query + call.rows.num_queries  # what follows in a cache is uninitialised
        dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        with torch.autocast(q_BHLD.device.type, enabled=False):
            k, v = (x[:, :, :num_tokens].to(dtype) for x in (k_BKSD, v_BKSD))
            return self._attend(module, q_BHLD.to(dtype), k, v, call).to(q_BHLD.dtype)

    def _attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        phi_q, phi_k, log_decay_BKS, factors_H = module.get_submodule(self.name)(q_BHLD, k_BKSD, v_BKSD, call.layout)
        q_BKGLD, q_BKGLF = (x.unflatten(1, (k_BKSD.shape[1], -1)) for x in (q_BHLD * call.scaling, phi_q))
        factors_KG11 = factors_H.view(*q_BKGLD.shape[1:3], 1, 1)
        v_BKSE = F.pad(v_BKSD, (0, 1), value=1.0)
        documents_BS = call.rows.documents_BS[:, : k_BKSD.shape[2]]
        entries = self._entries(phi_k, v_BKSE, log_decay_BKS, documents_BS)
        near = windowed(q_BKGLD, k_BKSD, v_BKSE, documents_BS, self.sliding_window, self.chunk_size)
        far = linear(q_BKGLF, documents_BS[:, call.rows.first_query :], entries, self.chunk_size)
        sums_BKGLE = factors_KG11 * near + far
        out_BKGLD: Tensor = sums_BKGLE[..., :-1] / sums_BKGLE[..., -1:]
        return out_BKGLD.flatten(1, 2)

    def _entries(self, phi_k: Tensor, v_BKSE: Tensor, log_decay_BKS: Tensor, documents_BS: Tensor) -> Entries:
        """Return an empty entry, then for each token the one that leaves its window, or an empty entry if none does."""
        num_entries, lag = documents_BS.shape[1] + 1, self.sliding_window + 1
        return Entries(
            k_BKLF=F.pad(phi_k, (0, 0, lag, 0)),
            v_BKLE=F.pad(v_BKSE, (0, 0, lag, 0)),
            log_decay_BKL=F.pad(log_decay_BKS, (lag, 0)),
            documents_BL=F.pad(documents_BS, (lag, 0), value=-1),
        ).part(slice(num_entries))

    def child(self, config: PreTrainedConfig, layout: Layout) -> nn.Module | None:
        if not self.is_linear(layout.layer_idx):
            return None
        return FeatureMaps(self, layout.num_attention_heads, layout.num_key_value_heads, _head_dim(config))

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention | Cost, int]]:
        num_heads, length = layout.num_attention_heads, layout.length
        if not self.is_linear(layout.layer_idx):
            return [(FullAttention(), num_heads)]
        window, chunk = min(self.sliding_window, length), min(self.chunk_size, length)
        share = 1 + layout.num_key_value_heads / num_heads  # what is done for a query, and once for keys of its group
        in_window, in_chunk = window - window * (window - 1) / (2 * length), (chunk + 1) / 2
        # A key takes 4·D FLOPs. The value of a token in the chunk takes half of that; the state takes as much for each
        # dimension of feature_dim, and the map half.
        keys = in_window + in_chunk / 2 + share * 1.5 * self.feature_dim
        return [(Cost(keys=keys, other_flops=4 * self.feature_dim * in_chunk, has_mask=False), num_heads)]

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        linear = [layer for layer in range(config.num_hidden_layers) if self.is_linear(layer)]
        if outside := [layer for layer in self.layers or [] if not 0 <= layer < config.num_hidden_layers]:
            raise InputError(
                f"attention.layers: {config.model_type} has {config.num_hidden_layers} layers, no {outside[0]}"
            )
        if not linear:
            raise InputError("no layer is linear; use attention=full, or change attention.full_attention_interval")
        if self.sliding_window >= lengths[-1]:
            raise InputError(
                f"attention.sliding_window={self.sliding_window} is all of the longest sequence ({lengths[-1]}): "
                "nothing is left for linear attention; use attention=full"
            )
        if self.feature_dim > _head_dim(config):
            raise InputError(f"attention.feature_dim={self.feature_dim} is more than a head's {_head_dim(config)}")
        _check_model(config, linear, lengths[-1])


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_model(config: PreTrainedConfig, linear: list[int], length: int) -> None:
    """Raise InputError if a linear layer has a window of its own or caps its scores."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if window and window < length and (windowed := [layer for layer in linear if kinds[layer] == "sliding_attention"]):
        raise InputError(
            f"layer {windowed[0]} of {config.model_type} sees {window} tokens, and would see all if it were linear; "
            "leave it out of attention.layers"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise InputError(f"{config.model_type} caps attention scores, which attention=linear can't; choose another")
