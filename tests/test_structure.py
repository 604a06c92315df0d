"""Properties of every divergence, on random shapes and values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from cases import DIVERGENCES, every_divergence
from hybrid_kernels import Divergence, token_terms
from hybrid_kernels.divergences import FAMILIES
from tolerance import assert_matches_reference

shapes = st.tuples(st.integers(0, 3), st.integers(0, 4))
vocabularies = st.integers(2, 300)  # of one: test_edges.py
seeds = st.integers(0, 2**32)


def divergence_and_gradient(student, teacher, divergence, backend, **options):
    leaf = student.clone().requires_grad_()
    terms = token_terms(leaf, teacher, divergence=divergence, backend=backend, **options)
    terms.divergence.sum().backward()
    return terms.divergence.detach(), leaf.grad


@every_divergence
@given(
    rows=shapes,
    vocabulary=vocabularies,
    seed=seeds,
    style=st.sampled_from(cases.STYLES),
    temperature=st.floats(0.3, 4.0),
    masked=st.booleans(),
)
def test_random_problems(
    divergence, backend, device, rows, vocabulary, seed, style, temperature, masked
):
    case = cases.make(vocabulary, rows, style=style, masked=masked, seed=seed, device=device)
    assert_matches_reference(
        case,
        backend,
        divergence=divergence,
        temperature=temperature,
        entropy_weight=0.2,
        reduction="none",
    )


@every_divergence
@pytest.mark.parametrize("style", ["typical", "offset", "one_hot", "forbidden_by_student"])
def test_zero_value_and_gradient_at_p_equal_q(style, divergence, backend, device):
    case = cases.make(1000, (4,), style=style, device=device)
    teacher = case.student.clone()
    value, gradient = divergence_and_gradient(case.student, teacher, divergence, backend)
    assert (value.abs() < 1e-6).all()
    assert (gradient.abs() < 1e-6).all()
    # Softmax does not see an offset, so that p = q here too; it is exact in fp32.
    teacher = (case.student * 2**6).round() / 2**6
    value, gradient = divergence_and_gradient(teacher, teacher + 64, divergence, backend)
    assert (value.abs() < 1e-6).all()
    assert (gradient.abs() < 1e-6).all()


@every_divergence
@pytest.mark.parametrize("style", cases.STYLES)
def test_gradient_rows_sum_to_zero(style, divergence, backend, device):
    case = cases.make(1000, (4,), style=style, device=device)
    options = {"divergence": divergence, "entropy_weight": 0.3, "reduction": "sum"}
    gradient = case.hybrid_loss(backend=backend, **options).gradient.double()
    assert gradient.any(-1).all()
    assert (gradient.sum(-1).abs() < 1e-6 * (1 + gradient.abs().sum(-1))).all()


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype until the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.native
@every_divergence
@pytest.mark.parametrize("support", [None, "union"], ids=["full", "top-k"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_has_no_effect(
    dtype, support, divergence, backend, device, default_dtype
):
    case = cases.with_teachers(cases.make(100, masked=True, device=device), 2, support)
    temperatures = torch.tensor([[0.7], [1.3]], device=device)
    options = {"divergence": divergence, "backend": backend, "entropy_weight": 0.3}
    functions = {
        "mean": lambda: case.hybrid_loss(**options),
        "count": lambda: case.hybrid_loss(**options, num_tokens=70_000),
        "numbers": lambda: case.hybrid_loss(**options, dense_weight=0.3, advantages=1 / 3),
        "temperature": lambda: case.hybrid_loss(**options, temperature=temperatures),
    }
    expected = {name: function() for name, function in functions.items()}
    default_dtype(dtype)
    for name, function in functions.items():
        got = function()
        for field, value in got.result._asdict().items():
            torch.testing.assert_close(
                value, getattr(expected[name].result, field), rtol=0, atol=0, equal_nan=True
            )
        torch.testing.assert_close(got.gradient, expected[name].gradient, rtol=0, atol=0)


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_has_no_effect_on_hidden_states(dtype, backend, device, default_dtype):
    case = cases.make_linear(teacher="top-k", bias=True, softcap=5.0, masked=True, device=device)
    expected, gradients = case.ours(backend=backend, grad_filter=0.01)
    given = case.given(None)
    default_dtype(dtype)
    pairs = [(case.given(None).log_probs, given.log_probs)]  # of TopK.from_logits
    got, others = case.ours(backend=backend, grad_filter=0.01)
    pairs += [(got.loss, expected.loss), *zip(others, gradients, strict=True)]
    for value, alike in pairs:
        torch.testing.assert_close(value, alike, rtol=0, atol=0, equal_nan=True)


@every_divergence
@given(vocabulary=vocabularies, seed=seeds, noise=st.floats(1e-4, 10))
def test_divergences_are_not_negative(divergence, backend, device, vocabulary, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(4, vocabulary, generator=generator)
    teacher = student + noise * torch.randn(4, vocabulary, generator=generator)
    terms = token_terms(
        student.to(device), teacher.to(device), divergence=divergence, backend=backend
    )
    # Where they are small, the KLs and total variation are sums of positive terms.
    name, _ = divergence.canonical()
    exact = FAMILIES[name].one_sweep or name == "tv"
    slack = 0.0 if exact else 1e-6
    assert (terms.divergence >= -slack).all()
    assert (terms.entropy >= -1e-6).all()


@every_divergence
@given(vocabulary=vocabularies, seed=seeds)
def test_the_order_of_the_vocabulary_does_not_matter(divergence, backend, device, vocabulary, seed):
    case = cases.make(vocabulary, (3,), seed=seed, device=device)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed)).to(device)
    options = {"divergence": divergence, "backend": backend}
    value, gradient = divergence_and_gradient(case.student, case.teacher, **options)
    shuffled, shuffled_gradient = divergence_and_gradient(
        case.student[:, order], case.teacher[:, order], **options
    )
    torch.testing.assert_close(shuffled, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shuffled_gradient, gradient[:, order], rtol=1e-4, atol=1e-6)


@every_divergence
def test_rows_do_not_see_each_other(divergence, backend, device):
    case = cases.make(1000, (6,), device=device)
    value, gradient = divergence_and_gradient(case.student, case.teacher, divergence, backend)
    for row in range(6):
        alone = slice(row, row + 1)
        row_value, row_gradient = divergence_and_gradient(
            case.student[alone], case.teacher[alone], divergence, backend
        )
        torch.testing.assert_close(row_value, value[alone], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(row_gradient, gradient[alone], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature, backend, device):
    case = cases.make(1000, (4,), device=device)
    for divergence in DIVERGENCES:
        value, gradient = divergence_and_gradient(
            case.student, case.teacher, divergence, backend, temperature=temperature
        )
        scaled_value, scaled_gradient = divergence_and_gradient(
            case.student / temperature, case.teacher / temperature, divergence, backend
        )
        torch.testing.assert_close(value, scaled_value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, scaled_gradient / temperature, rtol=1e-4, atol=1e-7)


def test_sides_and_betas_are_not_swapped(backend, device):
    case = cases.make(127, (4,), device=device)

    def value(student, teacher, name, **parameters):
        divergence = Divergence(name, **parameters)
        return token_terms(student, teacher, divergence=divergence, backend=backend).divergence

    p, q = case.student, case.teacher
    close = {"rtol": 1e-5, "atol": 1e-6}
    reverse, forward = value(p, q, "reverse_kl"), value(p, q, "forward_kl")
    torch.testing.assert_close(reverse, value(q, p, "forward_kl"), **close)
    torch.testing.assert_close(reverse + forward, value(p, q, "jeffreys"), **close)
    torch.testing.assert_close(value(p, q, "jsd", beta=0.3), value(q, p, "jsd", beta=0.7), **close)
    assert torch.equal(value(p, q, "jsd", beta=0.0), forward)
    assert torch.equal(value(p, q, "jsd", beta=1.0), reverse)
    assert torch.equal(value(p, q, "jsd"), value(p, q, "jsd", beta=0.5))
    # If these were equal, a swap would pass unseen.
    assert ((reverse - forward).abs() > 1e-2).all()
    near = value(p, q, "jsd", beta=0.3) - value(p, q, "jsd", beta=0.7)
    assert (near.abs() > 1e-3).all()
