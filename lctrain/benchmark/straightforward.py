"""The straightforward ways to train gates, for comparison with ours: the same losses and gradients at another cost.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lctrain.attention.base import Call
from lctrain.attention.duo import DuoAttention
from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.mask import Mask
from lctrain.model.head import IGNORED, hidden_states
from lctrain.training.distillation import Distillation


class DenseKernel(Kernel):
    """A kernel that passes torch's SDPA a mask of all pairs, so that every pattern costs as much as full attention."""

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        return None

    def prepare(self, mask: Mask) -> Tensor:
        return mask.evaluate(slice(0, mask.q_length), slice(0, mask.kv_length))

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Tensor, *, scaling: float, softcap: float | None
    ) -> Tensor:
        # torch's kernels that take a mask take no fewer key-value heads than query heads.
        k_BHSD, v_BHSD = (x.repeat_interleave(q_BHLD.shape[1] // x.shape[1], dim=1) for x in (k_BKSD, v_BKSD))
        return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=prepared, scale=scaling)


@dataclass(frozen=True, kw_only=True)
class ConcatenatedDuoAttention(DuoAttention):
    """DuoAttention with [full; mixed] in one batch, as in the authors' code: the teacher's rows are the first half."""

    @property
    def name(self) -> str:
        return "duo"  # as the module that it mixes by

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        full = call.run(self.full, q_BHLD, k_BKSD, v_BKSD)
        mixed = slice(q_BHLD.shape[0] // 2, None)
        streaming = call.run(self.streaming, q_BHLD[mixed], k_BKSD[mixed], v_BKSD[mixed])
        mix = module.get_submodule(self.name)
        return torch.cat([full[: mixed.start], mix(full[mixed], streaming, call.layout)])


@dataclass(frozen=True, kw_only=True)
class ConcatenatedDistillation(Distillation):
    """Distillation by the distance between the halves of a batch that holds every row twice."""

    def __call__(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        valid_BL = batch["labels"] != IGNORED
        ids, positions = (batch[name].repeat(2, 1) for name in ("input_ids", "position_ids"))
        taught, learned = (half[valid_BL] for half in hidden_states(model, ids, positions).chunk(2))
        losses = {self.loss: self.distance(model, [learned], [taught.detach()])}
        return losses | self.gate_term(model, valid_BL)
