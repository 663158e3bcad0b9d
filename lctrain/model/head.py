"""Compute losses from hidden states, without holding all logits.

Shape legend: B rows, L tokens, N valid tokens, D hidden.
"""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lctrain.errors import InputError
from lctrain.losses.linear_cross_entropy import linear_cross_entropy

IGNORED = -100


def unwrap(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model, PEFT's adapters included."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def hidden_states(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, position_ids: Tensor, cache: Cache | None = None
) -> Tensor:
    """Return the last hidden states [B, L, D], after the final norm. A new document begins where positions restart.

    With a cache, `input_ids` follow the tokens that it holds, and are added to it.
    """
    num_seen = 0 if cache is None else cache.get_seq_length()
    output = unwrap(model).get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        # All ones, as nothing is padding; without a mask transformers looks for documents itself.
        attention_mask=input_ids.new_ones(input_ids.shape[0], num_seen + input_ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def softcap(model: PreTrainedModel | PeftModel) -> float | None:
    """Return the cap on the logits that Gemma 2 has, or None."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def token_losses(model: PreTrainedModel | PeftModel, hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss (with gradient) and each valid token's loss [N] (without), in fp32.

    Labels are already shifted, and -100 is ignored.
    """
    head = unwrap(model).get_output_embeddings()
    valid = labels_BL != IGNORED
    return linear_cross_entropy(hidden_BLD[valid], head.weight, head.bias, labels_BL[valid], softcap=softcap(model))


@torch.no_grad()
def check_head(model: PreTrainedModel | PeftModel) -> None:
    """Raise InputError if the model changes its logits in a way that `token_losses` does not reproduce."""
    base, training = unwrap(model), model.training
    base.eval()
    ids = torch.arange(8, device=base.device)[None]
    hidden = hidden_states(base, ids, ids)
    logits = base(input_ids=ids, position_ids=ids, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0], reduction="none")
    base.train(training)
    if not torch.allclose(token_losses(base, hidden, ids)[1], expected, rtol=2e-2, atol=2e-2):
        raise InputError(f"{type(base).__name__} changes its logits in a way that the tiled loss does not know")
