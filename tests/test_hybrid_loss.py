"""Values and gradients of `hybrid_loss` against the float64 specification."""

import itertools

import numpy as np
import pytest
import torch

import cases
from cases import DTYPES, every_divergence
from hybrid_kernels import (
    Divergence,
    HybridLoss,
    checks,
    hybrid_loss,
    reference,
    token_terms,
)
from tolerance import assert_close, assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

one_of_each_kind = pytest.mark.parametrize(
    "divergence", ["reverse_kl", Divergence("jsd", beta=0.3)], ids=["one_sweep", "two_sweeps"]
)


@every_divergence
@pytest.mark.parametrize("teacher_floor", [None, -4.0])
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.7, marks=pytest.mark.smoke), 2.0])
def test_every_term_at_once(divergence, temperature, teacher_floor, backend, device):
    case = cases.make(127, masked=True, device=device)
    weight = case.upstream.cos()
    assert_matches_reference(
        case,
        backend,
        divergence=divergence,
        temperature=temperature,
        teacher_floor=teacher_floor,
        dense_weight=weight,
        entropy_weight=0.3,
        reduction="none",
    )


@one_of_each_kind
@pytest.mark.parametrize("vocabulary", cases.VOCABULARIES[1:])  # of one: test_edges.py
def test_vocabularies(vocabulary, divergence, backend, device):
    case = cases.make(vocabulary, (3,), device=device)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@every_divergence
@pytest.mark.parametrize("style", cases.STYLES)
def test_styles(style, divergence, backend, device):
    case = cases.make(1000, (4,), style=style, device=device)
    options = {"divergence": divergence, "reduction": "none"}
    assert_matches_reference(case, backend, entropy_weight=0.3, temperature=1.3, **options)
    assert_matches_reference(case, backend, teacher_floor=-6.0, **options)


@every_divergence
@pytest.mark.parametrize("order", ["rising", "falling", "late", "apart"])
def test_running_maxima(order, divergence, backend, device, small_tiles):
    """Rows whose maximum moves with every tile, comes after tiles of -inf, or differs by side."""
    case = cases.make(150, (2,), device=device)
    ramp = torch.linspace(-15, 15, 150, device=device)
    case.student += {"rising": 1, "falling": -1, "late": 1, "apart": 0.5}[order] * ramp
    case.teacher += {"rising": 1, "falling": -1, "late": 1, "apart": -0.5}[order] * ramp
    if order == "falling":
        case.student += 1e4
    elif order == "late":
        case.student[:, :100] = -torch.inf
        case.teacher[:, :70] = -torch.inf
        case.token_ids[:] = 120
    options = {"divergence": divergence, "reduction": "none"}
    assert_matches_reference(case, backend, entropy_weight=0.3, **options)
    assert_matches_reference(case, backend, teacher_floor=-9.0, **options)


@every_divergence
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [*itertools.product(DTYPES, DTYPES)])
def test_dtypes(dtype, teacher_dtype, divergence, backend, device):
    case = cases.make(
        128, (3,), dtype=DTYPES[dtype], teacher_dtype=DTYPES[teacher_dtype], device=device
    )
    options = {"divergence": divergence, "reduction": "sum"}
    assert_matches_reference(case, backend, entropy_weight=0.3, **options)


@pytest.mark.smoke
@one_of_each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("layout", "masked"),
    [*((layout, False) for layout in cases.LAYOUTS), ("contiguous", True), ("sliced", True)],
)
def test_layouts(layout, reduction, masked, divergence, backend, device):
    case = cases.make(1000, layout=layout, masked=masked, device=device)
    outcome = assert_matches_reference(case, backend, divergence=divergence, reduction=reduction)
    if layout == "sliced":
        for outside in (outcome.gradient[:, -1], outcome.gradient[..., 1000:]):
            torch.testing.assert_close(outside, torch.zeros_like(outside), rtol=0, atol=0)


@one_of_each_kind
@pytest.mark.parametrize("support", [None, "union"], ids=["full", "top-k"])
@pytest.mark.parametrize("expanded", ["both", "student", "teacher"])
@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_time"])
def test_rows_expanded_along_one_dimension(layout, expanded, support, divergence, backend, device):
    """One of both row strides is 0."""
    case = cases.make(127, layout=layout, device=device)
    if expanded == "student":
        case.given = case.teacher_logits.contiguous()
    elif expanded == "teacher":
        case.given, case.student = case.teacher_logits, case.logits.contiguous()
    if support is not None:
        case = cases.with_teachers(case, 2, support)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("reduction", "num_tokens"),
    [("sum", None), ("none", None), *(("mean", n) for n in (None, 23, 7.5, "tensor"))],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_reductions(reduction, num_tokens, masked, backend, device):
    if num_tokens == "tensor":
        num_tokens = torch.tensor(23, device=device)
    case = cases.make(128, masked=masked, device=device)
    outcome = assert_matches_reference(case, backend, reduction=reduction, num_tokens=num_tokens)
    assert outcome.result.loss.shape == (case.token_ids.shape if reduction == "none" else ())


# In what kinds weights and temperatures may be given.
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("number", marks=pytest.mark.native),
        pytest.param("numpy", marks=pytest.mark.native),
        pytest.param("scalar tensor", marks=pytest.mark.native),
        "per sequence",
        "per token",
    ],
)


def of_kind(kind, values):
    """Values `[B, T]` for the tokens as an argument; those that the kind can't tell apart are one.
    What belongs to masked tokens alone is NaN."""
    if kind == "number":
        return float(values[0, 0])
    if kind == "numpy":
        return np.float32(values[0, 0].cpu())
    if kind == "scalar tensor":
        return values[0, 0]
    return values[:, :1] if kind == "per sequence" else values


def with_a_masked_sequence(device):
    """A case, and values for its tokens, NaN for those that are masked."""
    case = cases.make(128, (3, 5), masked=True, device=device)
    case.mask[1] = False
    values = torch.linspace(0.4, 2.1, 15, device=device).view(3, 5)
    values[~case.valid] = torch.nan
    assert values[:2, 0].isnan().tolist() == [False, True]
    return case, values


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights(reduction, kind, backend, device):
    case, values = with_a_masked_sequence(device)
    weights = {"dense_weight": values, "entropy_weight": values.cos(), "advantages": 1 - values}
    weights = {name: of_kind(kind, weight) for name, weight in weights.items()}
    assert_matches_reference(case, backend, reduction=reduction, **weights)


@every_kind
@pytest.mark.parametrize("support", [None, "union"], ids=["full", "top-k"])
@pytest.mark.parametrize("method", ["hybrid_loss", "token_terms"])
def test_temperatures(method, support, kind, backend, device):
    case, values = with_a_masked_sequence(device)
    # Not so low that a support leaves a tail whose mass is a difference of fp32 numbers near 1.
    temperature = of_kind(kind, 0.8 + values)
    case = cases.with_teachers(case, 1, support, temperature)
    assert_matches_reference(case, backend, method, temperature=temperature)


def test_advantages_of_a_function_may_be_shared(backend, device):
    case, values = with_a_masked_sequence(device)
    given = case.hybrid_loss(backend=backend, advantages=values[:, :1])
    returned = case.hybrid_loss(backend=backend, advantages=lambda terms: values[:, :1])
    torch.testing.assert_close(returned.gradient, given.gradient)


@pytest.mark.smoke
@pytest.mark.parametrize("terms", ["dense", "sparse", "entropy"])
def test_each_term_alone(terms, backend, device):
    case = cases.make(128, masked=True, device=device)
    options = {"dense_weight": 1.0 if terms == "dense" else 0.0}
    if terms != "sparse":
        options["advantages"] = None
    if terms == "entropy":
        options["entropy_weight"] = 0.5
    assert_matches_reference(case, backend, **options)


def test_without_any_term(backend, device):
    case = cases.make(128, masked=True, device=device)
    outcome = case.hybrid_loss(backend=backend, dense_weight=0, advantages=None)
    assert outcome.result.loss == 0
    assert not outcome.gradient.any()


@pytest.mark.smoke
def test_without_a_teacher(backend, device):
    case = cases.make(128, masked=True, device=device)
    case.teacher = None
    result = assert_matches_reference(case, backend, dense_weight=0, entropy_weight=0.1).result
    assert result.divergence is None
    assert result.teacher_log_prob is None


def test_without_token_ids(backend, device):
    case = cases.make(128, device=device)
    case.token_ids = None
    result = assert_matches_reference(case, backend, advantages=None, entropy_weight=0.1).result
    assert result.log_prob is None
    assert result.teacher_log_prob is None


@pytest.mark.smoke
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_advantages_as_a_function(masked, backend, device):
    case = cases.make(128, masked=masked, device=device)

    def clipped_cost(terms):
        assert not any(t.requires_grad for t in terms if t is not None)
        log_ratio = terms.log_prob - terms.teacher_log_prob
        return 0.1 * log_ratio.clamp(-1, 1) - 0.1 * terms.divergence

    for reduction in ("mean", "none"):
        assert_matches_reference(case, backend, advantages=clipped_cost, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16])
def test_int32_ids_and_masks_of_numbers(dtype, backend, device):
    case = cases.make(128, masked=True, device=device)
    expected = case.hybrid_loss(backend=backend)
    case.token_ids, case.mask = case.token_ids.int(), case.mask.to(dtype)
    got = case.hybrid_loss(backend=backend)
    torch.testing.assert_close(got.result.loss, expected.result.loss, rtol=0, atol=0)
    torch.testing.assert_close(got.gradient, expected.gradient, rtol=0, atol=0)


def test_everything_but_the_loss_is_detached(backend, device):
    case = cases.make(7, device=device)
    logits = case.student.requires_grad_()
    result = hybrid_loss(logits, case.teacher, case.token_ids, case.advantages, backend=backend)
    assert isinstance(result, HybridLoss)
    assert result.loss.requires_grad
    assert not any(t.requires_grad for t in result[1:] if t is not None)
    assert result.student_mass is None
    assert result.teacher_mass is None


def test_the_loss_is_the_same_without_a_gradient(backend, device):
    case = cases.make(128, masked=True, device=device)
    for reduction in ("mean", "none"):
        with_gradient = case.hybrid_loss(backend=backend, reduction=reduction).result
        with torch.no_grad():
            without = hybrid_loss(
                case.logits,
                case.teacher_logits,
                case.token_ids,
                case.advantages,
                mask=case.mask,
                reduction=reduction,
                backend=backend,
            )
        for got, expected in zip(without, with_gradient, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("upstream", [1.0, 0.0, 0.3])
def test_scalar_upstream(upstream, backend, device):
    case = cases.make(128, masked=True, device=device)
    case.scalar_upstream = upstream
    assert_matches_reference(case, backend)


@pytest.mark.smoke
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_twice(inplace, backend, device):
    case = cases.make(128, masked=True, device=device)
    leaf = case.student.clone().requires_grad_()
    loss = hybrid_loss(
        leaf.clone(),
        case.teacher,
        case.token_ids,
        case.advantages,
        mask=case.mask,
        inplace=inplace,
        backend=backend,
    ).loss
    gradients = [
        torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream), retain_graph=True)[0]
        for upstream in (-1.7, 0.5, 1.0)
    ]
    truth = case.hybrid_loss(reference.hybrid_loss, torch.float64).gradient
    eager = case.hybrid_loss(reference.hybrid_loss, torch.float32).gradient
    for gradient, share in zip(gradients, (1.0, 0.5 / -1.7, 1 / -1.7), strict=True):
        assert_close(gradient, truth * share, eager * share, "gradient")


@pytest.mark.smoke
def test_gradients_accumulate_over_losses(backend, device):
    """Two micro-batches with the count of both add up to the whole."""
    case = cases.make(128, (6,), masked=True, device=device)
    whole = case.hybrid_loss(backend=backend)
    leaf = case.student.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 2), slice(2, 6)):
        loss = hybrid_loss(
            leaf[part],
            case.teacher[part],
            case.token_ids[part],
            case.advantages[part],
            mask=case.mask[part],
            num_tokens=case.valid.sum(),
            backend=backend,
        ).loss
        (case.scalar_upstream * loss).backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.result.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaf.grad, whole.gradient, rtol=1e-5, atol=1e-8)


@one_of_each_kind
@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.smoke), "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace(dtype, layout, divergence, backend, device):
    case = cases.make(1000, masked=True, layout=layout, dtype=DTYPES[dtype], device=device)
    options = {"divergence": divergence, "inplace": True}
    assert_matches_reference(case, backend, **options)
    assert_matches_reference(case, backend, reduction="none", **options)
    assert_matches_reference(case, backend, advantages=lambda t: t.entropy, **options)


def test_inplace_overwrites_the_logits_and_invalidates_other_uses(backend, device):
    case = cases.make(128, device=device)
    leaf = case.student.requires_grad_()
    logits = leaf.clone()
    other = logits.square().sum()  # needs the logits for its own backward
    address = logits.data_ptr()
    loss = hybrid_loss(logits, case.teacher, backend=backend, inplace=True).loss
    assert logits.data_ptr() == address
    written = logits.detach().clone()
    loss.backward()
    assert torch.equal(leaf.grad, written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_keeps_the_logits_where_no_gradient_is_needed(backend, device):
    case = cases.make(128, device=device)
    logits = case.student.clone()
    hybrid_loss(logits, case.teacher, backend=backend, inplace=True)
    with torch.no_grad():
        tracked = logits.clone().requires_grad_().clone()
        hybrid_loss(tracked, case.teacher, backend=backend, inplace=True)
    assert torch.equal(logits, case.student)
    assert torch.equal(tracked, case.student)


def test_inputs_are_not_written(backend, device):
    case = cases.make(128, masked=True, device=device)
    inputs = (case.student, case.teacher, case.token_ids, case.advantages, case.mask)
    before = [(t.clone(), t._version) for t in inputs]
    student, *others, mask = inputs
    loss = hybrid_loss(student.requires_grad_(), *others, mask=mask, backend=backend).loss
    (2 * loss).backward()
    for tensor, (copy, version) in zip(inputs, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())


@pytest.mark.parametrize("function", [hybrid_loss, token_terms])
def test_autocast_changes_nothing(function, backend, device):
    """It rounds the factors of GEMMs, but here it would round probabilities."""
    case = cases.make(1000, device=device)
    results = []
    for enabled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            results.append(function(case.logits, case.teacher_logits, backend=backend).divergence)
    assert torch.equal(*results)


@pytest.mark.parametrize("count", [0.0, -3.0, torch.inf, torch.nan])
def test_a_count_that_is_none_where_only_the_device_sees_it(count, monkeypatch):
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    student, mask = torch.randn(2, 5, requires_grad=True), torch.tensor([True, False])
    num_tokens = torch.tensor(count)
    result = hybrid_loss(student, torch.randn(2, 5), mask=mask, num_tokens=num_tokens)
    result.loss.backward()
    assert result.loss.isnan()
    assert student.grad[0].isnan().all()
    assert not student.grad[1].any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.inf, torch.nan])
def test_a_temperature_that_is_none_where_only_the_device_sees_it(temperature, monkeypatch):
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    temperatures = torch.tensor([temperature, 2.0])
    terms = token_terms(torch.randn(2, 5), torch.randn(2, 5), temperature=temperatures)
    assert terms.divergence.isnan().tolist() == [True, False]


def test_a_teacher_from_inference_mode():
    with torch.inference_mode():
        teacher = torch.randn(2, 5)
    student = torch.randn(2, 5, requires_grad=True)
    hybrid_loss(student, teacher).loss.backward()
    with pytest.raises(ValueError, match=r"teacher: made under torch.inference_mode.*no_grad"):
        token_terms(student, teacher)
