"""Precision: the errors of gradients, and values near p = q.

Relative L2 errors against float64 on the same rounded inputs, with V = 151,936. The bounds are
three times the figures that the argmax-referenced form reached when it was designed.
"""

import math

import pytest
import torch

import cases
import hybrid_kernels
from hybrid_kernels import Divergence, hybrid_loss, reference, token_terms
from hybrid_kernels.divergences import FAMILIES
from tolerance import assert_near, relative_error

ALLOWED = {"typical": 3 * 4e-7, "close": 3 * 1.5e-6, "offset": 3 * 4e-7, "one_hot": 3 * 2e-7}


def precise_case(style, vocabulary, device):
    """Inputs for the gradient of the reverse KL alone, with an upstream gradient of 1."""
    case = cases.make(vocabulary, (4,), style=style, seed=3, device=device)
    case.scalar_upstream = 1.0
    return case


@pytest.mark.parametrize("vocabulary", [pytest.param(1000, marks=pytest.mark.smoke), 151936])
@pytest.mark.parametrize("style", ALLOWED)
def test_gradient_error_of_the_reverse_kl(style, vocabulary, backend, device):
    case = precise_case(style, vocabulary, device)
    options = {"advantages": None, "reduction": "sum"}
    truth = case.hybrid_loss(reference.hybrid_loss, torch.float64, **options).gradient
    got = case.hybrid_loss(backend=backend, **options).gradient
    assert_near(got, truth, ALLOWED[style])


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("style", ["typical", "offset"])
def test_gradient_error_at_other_temperatures(style, temperature, backend, device):
    """Differences are taken before they are scaled; the other order costs four digits."""
    case = precise_case(style, 10_000, device)
    options = {"advantages": None, "reduction": "sum", "temperature": temperature}
    truth = case.hybrid_loss(reference.hybrid_loss, torch.float64, **options).gradient
    got = case.hybrid_loss(backend=backend, **options).gradient
    assert_near(got, truth, ALLOWED[style])


def test_a_composition_in_fp32_would_not_pass(device):
    """The bounds mean something: fp32 log_softmax misses them, by three digits near p = q."""
    for style, factor in (("typical", 2), ("close", 500), ("offset", 2)):
        case = precise_case(style, 151936, device)
        options = {"advantages": None, "reduction": "sum"}
        truth = case.hybrid_loss(reference.hybrid_loss, torch.float64, **options).gradient
        eager = case.hybrid_loss(reference.hybrid_loss, torch.float32, **options).gradient
        assert relative_error(eager, truth) > factor * ALLOWED[style]


@pytest.mark.parametrize("divergence", [name for name in FAMILIES if FAMILIES[name].one_sweep])
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
def test_a_small_divergence_keeps_its_relative_precision(noise, divergence, backend, device):
    """Down to 1e-9 nats, where the sum of p log(p/q) in fp32 has no digit left."""
    generator = torch.Generator().manual_seed(5)
    student = 3 * torch.randn(4, 50_000, generator=generator)
    teacher = student + noise * torch.randn(student.shape, generator=generator)
    student, teacher = student.to(device), teacher.to(device)
    got = token_terms(student, teacher, divergence=divergence, backend=backend).divergence
    truth = reference.token_terms(student.double(), teacher, divergence=divergence).divergence
    assert (truth < 1.5 * noise**2).all()
    assert ((got - truth).abs() < 2e-5 * truth).all()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_an_offset_of_both_sides_changes_nothing(offset, backend, device):
    """Softmax does not see it: exactly, where the sums are exact."""
    case = cases.make(1000, (4,), style="ties", device=device)
    expected = case.hybrid_loss(backend=backend)
    case.student += offset
    case.teacher -= offset
    got = case.hybrid_loss(backend=backend)
    torch.testing.assert_close(got.gradient, expected.gradient, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(got.result.divergence, expected.result.divergence, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_scale_saves_the_mean_of_fp16_logits(inplace, backend, device):
    """fp16 can't hold entries of 1e-8, but it can hold 65,536 times as much."""
    generator = torch.Generator().manual_seed(6)
    student = torch.randn(4, 3000, generator=generator).half().to(device)
    teacher = (student + 0.5 * torch.randn(student.shape, generator=generator).to(device)).half()
    options = {"token_ids": torch.tensor([0, 7, -100, 9], device=device), "num_tokens": 8192}

    def gradient(module, leaf, **others):
        advantages = torch.ones(4, device=device)
        logits = leaf.clone() if inplace else leaf
        result = module.hybrid_loss(logits, teacher, advantages=advantages, **options, **others)
        (2.0**16 * result.loss).backward()
        return leaf.grad.double()

    got = gradient(
        hybrid_kernels, student.clone().requires_grad_(), backend=backend, inplace=inplace
    )
    truth = gradient(reference, student.double().requires_grad_())
    assert (got - truth).norm() < 1e-3 * truth.norm()


def test_large_advantages_do_not_overflow_fp16(backend, device):
    """The gradient is small enough once the mean and the scale of the loss are applied."""
    student = torch.zeros(2, 3, dtype=torch.float16, device=device, requires_grad=True)
    ids, advantages = torch.tensor([0, 1], device=device), torch.tensor([3e5, -3e5], device=device)
    options = {"num_tokens": 8192, "dense_weight": 0.0, "backend": backend}
    result = hybrid_loss(student, None, ids, advantages, **options)
    (4 * result.loss).backward()
    expected = 4 * 3e5 / 8192 / 3 * torch.tensor([[-2.0, 1, 1], [-1, 2, -1]], device=device)
    torch.testing.assert_close(student.grad, expected.half(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", Divergence("jsd", beta=0.5)], ids=str)
def test_closed_form_of_two_entries(divergence, backend, device):
    """Compares with formulas for two numbers, in Python's floats."""
    a, b = 1.25, -0.5
    p = 1 / (1 + math.exp(-a))
    q = 1 / (1 + math.exp(-b))

    def kl(x, y):
        return x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y))

    logits = torch.tensor([[a, 0.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[b, 0.0]], device=device)
    loss = hybrid_loss(logits, teacher, divergence=divergence, backend=backend).loss
    loss.backward()
    if divergence == "reverse_kl":
        value, slope = kl(p, q), a - b
    else:
        m = (p + q) / 2
        value = (kl(p, m) + kl(q, m)) / 2
        slope = 0.5 * (math.log(p / m) - math.log((1 - p) / (1 - m)))
    assert math.isclose(loss.item(), value, rel_tol=1e-6)
    expected = torch.tensor([[1.0, -1.0]], device=device) * p * (1 - p) * slope
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=0)
