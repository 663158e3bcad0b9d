import pytest
import torch

from lctrain.errors import InputError
from lctrain.model.head import check_head


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})],
)
def test_a_model_that_scales_its_logits_is_refused(tiny, model_type, shape):
    with pytest.raises(InputError, match=r"ForCausalLM changes its logits in a way that the tiled loss does not know"):
        check_head(tiny(model_type, **shape))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("training", [True, False])
def test_others_pass_and_keep_their_mode(tiny, model_type, training):
    model = tiny(model_type).train(training)
    check_head(model)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_a_bf16_model_passes(tiny):
    check_head(tiny("llama").to(torch.bfloat16))
