"""From hidden states to losses, without logits. Shape legend: B rows, L tokens, N valid tokens, D hidden."""

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lctrain.errors import InputError
from lctrain.kernels.linear_cross_entropy import linear_cross_entropy

IGNORED = -100


def unwrap(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model; PEFT's adapters live inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def hidden_states(
    model: PreTrainedModel | PeftModel, input_ids: Tensor, position_ids: Tensor, cache: Cache | None = None
) -> Tensor:
    """Last hidden states [B, L, D], the final norm included. Documents are packed where positions restart.

    With a cache, `input_ids` go on from the tokens that it holds, and are put into it.
    """
    num_seen = 0 if cache is None else cache.get_seq_length()
    output = unwrap(model).get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        # Nothing is padding; without a mask transformers looks for documents itself.
        attention_mask=input_ids.new_ones(input_ids.shape[0], num_seen + input_ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def softcap(model: PreTrainedModel | PeftModel) -> float | None:
    """Gemma 2's cap on the logits."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def token_losses(model: PreTrainedModel | PeftModel, hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(sum with gradient, each valid token's loss [N] without) in fp32; labels are already shifted, -100 is ignored."""
    head = unwrap(model).get_output_embeddings()
    valid = labels_BL != IGNORED
    return linear_cross_entropy(hidden_BLD[valid], head.weight, head.bias, labels_BL[valid], softcap=softcap(model))


@torch.no_grad()
def check_head(model: PreTrainedModel | PeftModel) -> None:
    """Refuse a model that does more to its logits than `token_losses` knows of: its losses would be wrong."""
    base, training = unwrap(model), model.training
    base.eval()
    ids = torch.arange(8, device=base.device)[None]
    hidden = hidden_states(base, ids, ids)
    logits = base(input_ids=ids, position_ids=ids, use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0], reduction="none")
    base.train(training)
    if not torch.allclose(token_losses(base, hidden, ids)[1], expected, rtol=2e-2, atol=2e-2):
        raise InputError(f"{type(base).__name__} changes its logits in a way that the tiled loss does not know")
