import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from lctrain.losses import linear_cross_entropy as module
from lctrain.losses.linear_cross_entropy import linear_cross_entropy

N, D, V = 23, 6, 11


@pytest.fixture(params=[4, 23, 1000], ids=lambda rows: f"tiles of {rows}")
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", request.param * V + 3)


def tensors(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=generator)
    return [x.to(dtype).requires_grad_() for x in ([hidden, weight, b] if bias else [hidden, weight])], labels


def full(hidden, weight, bias, labels, softcap):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(
        logits if softcap is None else softcap * torch.tanh(logits / softcap), labels, reduction="none"
    )


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_cross_entropy_of_full_logits(bias, softcap, dtype):
    inputs, labels = tensors(bias=bias)
    b = inputs[2] if bias else None
    expected = full(inputs[0], inputs[1], b, labels, softcap)
    (expected.sum() * 0.7).backward()
    given, _ = tensors(dtype, bias=bias)
    total, losses = linear_cross_entropy(given[0], given[1], given[2] if bias else None, labels, softcap=softcap)
    (total * 0.7).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(total.double(), expected.sum(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    assert not losses.requires_grad
    for a, e in zip(given, inputs, strict=True):
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    inputs, labels = tensors()
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, labels, softcap=softcap)[0], inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    whole, labels = tensors()
    linear_cross_entropy(*whole, labels)[0].backward()
    inputs, _ = tensors()
    inputs[frozen].requires_grad_(False)
    linear_cross_entropy(*inputs, labels)[0].backward()
    assert inputs[frozen].grad is None
    for i in {0, 1, 2} - {frozen}:
        assert torch.equal(inputs[i].grad, whole[i].grad)


def test_no_valid_token_is_a_loss_of_zero():
    inputs, labels = tensors()
    total, losses = linear_cross_entropy(inputs[0][:0], inputs[1], inputs[2], labels[:0])
    total.backward()
    assert total == 0
    assert losses.shape == (0,)
    assert not inputs[1].grad.any()


def test_bf16_sums_tiles_in_fp32(monkeypatch):
    """256 rows one by one: a bf16 sum of the weight's gradient would stop growing."""
    hidden, weight = torch.ones(256, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    monkeypatch.setattr(module, "MAX_LOGITS", 2)
    total, losses = linear_cross_entropy(hidden, weight, None, torch.zeros(256, dtype=torch.long))
    total.backward()
    assert total.dtype == losses.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-128.0, 128.0]


def matmuls(grad):
    inputs, labels = tensors()
    with profile() as recorded, torch.set_grad_enabled(grad):
        linear_cross_entropy(*inputs, labels)
    return sum(event.count for event in recorded.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def test_without_grad_only_the_logits_are_computed():
    assert (matmuls(grad=True), matmuls(grad=False)) == (3, 1)


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 2**15)
    hidden, weight = (
        torch.randn(4096, 2, requires_grad=True),
        torch.randn(512, 2, requires_grad=True),
    )  # 8 MiB of logits
    with profile(profile_memory=True) as recorded:
        linear_cross_entropy(hidden, weight, None, torch.zeros(4096, dtype=torch.long))[0].backward()
    largest = max(event.cpu_memory_usage for event in recorded.events() if event.name.startswith("aten::"))
    assert largest < 2**20
