"""A model as it is measured. Shapes: B rows, L tokens, N tokens generated."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lctrain.model.head import hidden_states, token_losses


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def complete(self, prompts_BL: NDArray[np.int64], num_tokens: int) -> list[str]:
        """What greedy decoding writes behind each prompt, at most `num_tokens` tokens."""
        input_ids = torch.from_numpy(prompts_BL).to(self.model.device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, pad_token_id=self.tokenizer.pad_token_id or 0
        )
        mask = torch.ones_like(input_ids)
        output = cast(Any, self.model).generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        return self.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)

    def losses(self, ids: NDArray[np.int64]) -> Tensor:
        """Negative log-likelihood in fp32 [B, L] of each token of `ids` [B, L + 1] but the first."""
        rows = torch.from_numpy(ids).to(self.model.device)
        inputs_BL, labels_BL = rows[:, :-1], rows[:, 1:]
        position_ids = torch.arange(inputs_BL.shape[1], device=rows.device).expand_as(inputs_BL)
        hidden_BLD = hidden_states(self.model, inputs_BL, position_ids)
        return token_losses(self.model, hidden_BLD, labels_BL)[1].view(labels_BL.shape)
