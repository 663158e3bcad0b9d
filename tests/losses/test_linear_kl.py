import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from lctrain.losses import linear_kl as module
from lctrain.losses.linear_kl import linear_kl

N, D, V = 23, 6, 11


@pytest.fixture(params=[4, 23, 1000], ids=lambda rows: f"tiles of {rows}")
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", request.param * 2 * V + 3)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (N, D), (V, D), (V,))
    student, *others = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return student.requires_grad_(), *others


def full(student, teacher, weight, bias, softcap):
    logits = [F.linear(hidden, weight, bias) for hidden in (student, teacher)]
    capped = [x if softcap is None else softcap * torch.tanh(x / softcap) for x in logits]
    log_student, log_teacher = (x.log_softmax(-1) for x in capped)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_kl_of_full_logits(bias, softcap, dtype):
    (given, *others), (student, *exact) = tensors(dtype), tensors()
    expected = full(student, *exact[:2], exact[2] if bias else None, softcap)
    (expected * 0.7).backward()
    total = linear_kl(given, *others[:2], others[2] if bias else None, softcap=softcap)
    (total * 0.7).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(given.grad.double(), student.grad, rtol=tolerance, atol=tolerance)


def test_the_teacher_itself_and_no_token_are_a_loss_of_zero():
    student, _, weight, bias = tensors()
    total = linear_kl(student, student.detach(), weight, bias)
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12
    assert linear_kl(student[:0], student[:0].detach(), weight, bias) == 0


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 2**15)
    student, teacher, weight = torch.randn(4096, 2, requires_grad=True), torch.randn(4096, 2), torch.randn(512, 2)
    with profile(profile_memory=True) as recorded:  # 8 MiB of logits each
        linear_kl(student, teacher, weight, None).backward()
    largest = max(event.cpu_memory_usage for event in recorded.events() if event.name.startswith("aten::"))
    assert largest < 2**20
