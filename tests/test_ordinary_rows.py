"""Long ordinary rows have a separate path in the torch backend, with the same results."""

import math

import pytest
import torch

import cases
from hybrid_kernels import Mixture, hybrid_loss, reference, token_terms
from hybrid_kernels.torch_backend import sweep
from hybrid_kernels.torch_backend.ordinary import OrdinaryRows
from tolerance import assert_close, assert_matches_reference, assert_near

pytestmark = pytest.mark.native


@pytest.fixture
def outcomes(monkeypatch):
    """Treats every row as a long one, and records which of them were ordinary."""
    monkeypatch.setattr(sweep, "LONG_ROW", 1)
    results, compute = [], OrdinaryRows.compute

    def recorded(*arguments):
        results.append(compute(*arguments))
        return results[-1]

    monkeypatch.setattr(OrdinaryRows, "compute", recorded)
    return results


@pytest.mark.parametrize("style", cases.STYLES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "one_row"])
def test_every_style(layout, dtype, style, outcomes, backend, device):
    options = {"style": style, "layout": layout, "dtype": cases.DTYPES[dtype]}
    case = cases.make(127, masked=layout != "one_row", device=device, **options)
    options = {"entropy_weight": 0.3, "reduction": "none"}
    assert_matches_reference(case, backend, **options)
    assert outcomes
    if style != "forbidden_by_student":
        assert all(outcomes)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 2.5, "entropy_weight": 0.2},
        {"dense_weight": 0.0, "entropy_weight": -0.5},
        {"dense_weight": 40.0, "reduction": "sum"},
        {"num_tokens": 3},
        {"inplace": True, "entropy_weight": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_options(dtype, options, outcomes, backend, device):
    case = cases.make(203, dtype=cases.DTYPES[dtype], device=device)
    assert_matches_reference(case, backend, **options)
    assert len(outcomes) == 10
    assert all(outcomes)


def test_without_a_teacher(outcomes, backend, device):
    case = cases.make(127, (6,), device=device)

    def gradient():
        leaf = case.student.clone().requires_grad_()
        options = {"dense_weight": 0, "entropy_weight": 0.1, "backend": backend}
        hybrid_loss(leaf, None, case.token_ids, case.advantages, **options).loss.backward()
        return leaf.grad

    got = gradient()
    assert len(outcomes) == 6
    z = case.student.double().requires_grad_()
    log_p = z.log_softmax(-1)
    chosen = log_p.gather(-1, case.token_ids[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (-(case.advantages * chosen) - 0.1 * entropy).mean().backward()
    torch.testing.assert_close(got.double(), z.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("masked", [(), (2,)], ids=["all rows", "a masked row"])
def test_tokens_and_masks_cost_no_pass_over_all_logits(masked, outcomes, backend, device):
    size = 4 * 4096
    case = cases.make(4096, (4,), device=device)
    student = case.student.requires_grad_()
    mask = torch.ones(4, dtype=torch.bool, device=device)
    mask[list(masked)] = False
    with torch.profiler.profile(record_shapes=True) as profile:
        arguments = (student, case.teacher, case.token_ids, case.advantages)
        options = {"mask": mask, "reduction": "none", "backend": backend}
        hybrid_loss(*arguments, **options).loss.sum().backward()
    whole = {
        event.name
        for event in profile.events()
        if any(isinstance(s, list) and math.prod(s) == size for s in event.input_shapes or ())
    }
    assert "aten::gather" in whole  # so the profile shows what the operators do inside
    assert not whole & {f"aten::{name}" for name in ("mul", "add", "where", "masked_fill_")}


@pytest.mark.parametrize("offset", [0.4, 3.0, -7.0, 40.0, -300.0, 2e4])
@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0])
def test_an_offset_between_the_models(noise, offset, outcomes, backend, device):
    """Softmax ignores it, so it must not cost digits of values or gradients."""
    case = cases.make(1000, (4,), device=device)
    generator = torch.Generator().manual_seed(0)
    teacher = case.student + noise * torch.randn(case.student.shape, generator=generator) + offset
    leaf = case.student.clone().requires_grad_()
    result = hybrid_loss(leaf, teacher, reduction="sum", backend=backend)
    result.loss.backward()
    z = case.student.double().requires_grad_()
    log_p, log_q = z.log_softmax(-1), teacher.double().log_softmax(-1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    value.sum().backward()
    assert len(outcomes) == 4
    assert all(outcomes)
    # Logits are rounded to fp32, at -7 by up to 1e-6, which is much next to log-ratios of 1e-4.
    torch.testing.assert_close(result.divergence.double(), value.detach(), rtol=3e-5, atol=0)
    tolerance = 3e-5 if (noise, offset) == (1e-4, -7.0) else 3e-7
    assert (leaf.grad.double() - z.grad).norm() < tolerance * z.grad.norm()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("style", ["typical", "offset"])
def test_digits_at_every_temperature(style, temperature, outcomes, backend, device):
    """Within three times what `test_precision.py` says of the reverse KL's own gradient."""
    case = cases.make(10_000, (4,), style=style, seed=3, device=device)
    case.scalar_upstream = 1.0
    options = {"advantages": None, "reduction": "sum", "temperature": temperature}
    truth = case.hybrid_loss(reference.hybrid_loss, torch.float64, **options).gradient
    assert_near(case.hybrid_loss(backend=backend, **options).gradient, truth, 3 * 4e-7)
    assert all(outcomes)


def test_other_problems_do_not_take_this_path(outcomes, backend, device):
    case = cases.make(127, (4,), device=device)
    mixture = Mixture([(1.0, case.teacher), (0.5, case.teacher.flip(0))])
    for teacher, options in (
        (case.teacher, {"divergence": "jsd"}),
        (case.teacher, {"teacher_floor": -20.0}),
        (mixture, {}),
    ):
        token_terms(case.student, teacher, backend=backend, **options)
    assert not outcomes


def test_a_row_that_is_not_ordinary_among_others(outcomes, backend, device):
    """Only this row is computed again; the others stay the same to the last bit."""
    case = cases.make(127, (5,), device=device)
    plain = case.hybrid_loss(backend=backend, reduction="none").gradient
    outcomes.clear()
    case.student[2, 7] = -torch.inf
    gradient = case.hybrid_loss(backend=backend, reduction="none").gradient
    assert outcomes == [True, True, False, True, True]
    others = torch.arange(5) != 2
    assert torch.equal(gradient[others], plain[others])
    assert gradient[2].isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e9, -1e9])
def test_values_that_are_not_ordinary(value, side, outcomes, backend, device):
    """They are what `blocks.py` makes of them, which `test_edges.py` tests."""
    case = cases.make(127, (4,), device=device)
    getattr(case, side)[1:3, 5:9] = value
    options = {"entropy_weight": 0.1, "reduction": "none", "backend": backend}
    got = case.hybrid_loss(**options)
    ordinary = list(outcomes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LONG_ROW", 10**9)
        expected = case.hybrid_loss(**options)
    assert ordinary[0]
    assert ordinary[3]
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(got.gradient, expected.gradient, **close)
    torch.testing.assert_close(got.result.divergence, expected.result.divergence, **close)
    torch.testing.assert_close(got.result.entropy, expected.result.entropy, **close)


@pytest.mark.parametrize("weight", [1e39, 1e30, -1e30, torch.inf, torch.nan])
def test_weights_that_are_not_ordinary(weight, outcomes, backend, device):
    case = cases.make(127, (4,), device=device)
    weights = torch.tensor([1.0, weight, 1.0, 0.5], device=device)
    options = {"dense_weight": weights, "reduction": "none", "backend": backend}
    got = case.hybrid_loss(**options).gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "LONG_ROW", 10**9)
        expected = case.hybrid_loss(**options).gradient
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("temperature", [0.1, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, -20.0])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.01])
def test_the_lowest_logits(entropy_weight, shift, temperature, outcomes, backend, device):
    """Enlarged by a weight, they must not become infinities that a probability of 0 multiplies."""
    case = cases.make(203, (4,), device=device)
    case.student += shift
    case.teacher += shift
    case.student[:, -5:] = torch.finfo(torch.float32).min
    options = {"entropy_weight": entropy_weight, "temperature": temperature}
    assert_matches_reference(case, backend, reduction="sum", **options)
    assert outcomes


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0.0, 5.0, 50.3, 1000.3])
def test_statistics_keep_their_digits(offset, temperature, outcomes, backend, device):
    """What `token_terms` and callable advantages read again are sums rounded to fp32."""
    case = cases.make(1000, (4,), device=device)
    teacher = case.teacher + offset
    leaf = case.student.clone().requires_grad_()
    terms = token_terms(leaf, teacher, case.token_ids, temperature=temperature, backend=backend)
    terms.divergence.sum().backward()
    z = case.student.double().requires_grad_()
    log_p = (z / temperature).log_softmax(-1)
    log_q = (teacher.double() / temperature).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    assert all(outcomes)
    assert (leaf.grad.double() - z.grad).norm() < 2e-6 * z.grad.norm()
    log_q = log_q.gather(-1, case.token_ids[:, None])[:, 0]
    torch.testing.assert_close(terms.teacher_log_prob.double(), log_q, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_a_teacher_that_rejects_the_only_token(temperature, outcomes, backend, device):
    student = torch.randn(1, 203, generator=torch.Generator().manual_seed(0)).to(device)
    student[0, 7] = 60
    teacher = student.clone()
    teacher[0, 7] = -1e4
    leaf = student.requires_grad_()
    hybrid_loss(leaf, teacher, temperature=temperature, backend=backend).loss.backward()
    assert leaf.grad.abs().max() < 1e-8


def test_a_weight_that_is_no_number_of_fp32(outcomes, backend, device):
    z = torch.zeros(1, 203, device=device, requires_grad=True)
    terms = token_terms(z, z.detach(), temperature=1e-5, backend=backend)
    (terms.divergence * 3e33).sum().backward()
    assert outcomes == [True, False]
    assert not z.grad.any()


@pytest.mark.parametrize("temperature", [1e8, 3e38])
def test_the_highest_temperatures(temperature, outcomes, backend, device):
    z = torch.zeros(1, 203, device=device)
    terms = token_terms(z, z + 1, temperature=temperature, backend=backend)
    assert outcomes == [True]
    assert_near(terms.logsumexp, torch.full_like(terms.logsumexp, math.log(203)), 1e-6)


@pytest.mark.parametrize("offset", [1.5e6, 1e7])
def test_offsets_too_large_for_a_reference(offset, outcomes, backend, device):
    case = cases.make(203, (2,), device=device)
    case.student *= 10
    case.teacher = case.teacher * 10 + offset
    assert_matches_reference(case, backend, temperature=20.0, reduction="sum")
    assert not any(outcomes)


@pytest.mark.parametrize("weight", [1.0, 2.0**122], ids=["ordinary", "by blocks"])
def test_a_gradient_after_the_statistics(weight, outcomes, backend, device):
    """Blocks read the statistics, whose reference may differ from the row's maximum."""
    case = cases.make(1000, (4,), device=device)
    case.student -= 12  # so that the normaliser, which divides a weight, is small
    leaf = case.student.clone().requires_grad_()
    terms = token_terms(leaf, case.teacher + 5, case.token_ids, backend=backend)
    (terms.divergence + terms.log_prob * case.advantages).sum().mul(weight).backward()
    z = case.student.double().requires_grad_()
    w = (case.teacher + 5).double()
    log_p = z.log_softmax(-1)
    value = (log_p.exp() * (log_p - w.log_softmax(-1))).sum(-1)
    chosen = log_p.gather(-1, case.token_ids[:, None])[:, 0]
    (value + chosen * case.advantages).sum().backward()
    assert outcomes == [True] * 4 + [weight == 1] * 4
    assert_close(leaf.grad / weight, z.grad, z.grad.float(), "gradient", scale=0.05)


@pytest.mark.parametrize("length", [1, 10**9], ids=["long rows", "blocks"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "renyi"])
def test_a_users_default_dtype_and_device(divergence, length, backend, device, monkeypatch):
    monkeypatch.setattr(sweep, "LONG_ROW", length)
    case = cases.make(203, (4,), masked=True, device=device)
    options = {"divergence": divergence, "backend": backend}
    expected = case.hybrid_loss(**options)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = case.hybrid_loss(**options)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert got.result.loss.dtype == torch.float32
    torch.testing.assert_close(got.gradient, expected.gradient, rtol=0, atol=0)
    torch.testing.assert_close(got.result.loss, expected.result.loss, rtol=0, atol=0)
