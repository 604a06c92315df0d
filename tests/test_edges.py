"""Infinities, NaN, masks and empty inputs have the same results on every backend."""

import itertools
import math

import pytest
import torch

import cases
from cases import DIVERGENCES, divergence_id, every_divergence
from hybrid_kernels import hybrid_loss, reference, token_terms
from hybrid_kernels.divergences import FAMILIES
from tolerance import assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "small_tiles")


def diverges(divergence):
    """Whether a token that only the teacher forbids makes the divergence infinite."""
    return FAMILIES[divergence.name].student_d or divergence.params.get("alpha", 0) > 1


DIVERGING = [d for d in DIVERGENCES if diverges(d)]
BOUNDED = [d for d in DIVERGENCES if d not in DIVERGING]
INF, NAN = math.inf, math.nan


def run(student, teacher, backend, **options):
    """The loss per row of `[N, V]` logits, its terms and its gradient."""
    leaf = student.clone().requires_grad_()
    result = hybrid_loss(leaf, teacher, reduction="none", backend=backend, **options)
    result.loss.backward(torch.linspace(0.5, 2.0, len(student), device=student.device))
    return result, leaf.grad


@every_divergence
@pytest.mark.parametrize("teacher_value", [0.5, -INF], ids=["allowed", "forbidden"])
def test_an_entry_that_the_student_forbids(teacher_value, divergence, backend, device):
    """Results are the limit as its logit falls to -inf: its gradient is 0, or -q for divergences
    with log p where q > 0. If the teacher forbids it, too, leaving it out changes nothing."""
    case = cases.make(7, (3,), device=device)
    case.student[:, 2] = -INF
    case.teacher[:, 2] = teacher_value
    case.token_ids[:] = 1
    options = {"divergence": divergence, "entropy_weight": 0.3, "reduction": "none"}
    outcome = assert_matches_reference(case, backend, **options)
    infinite = FAMILIES[divergence.name].teacher_d and teacher_value > -INF
    assert outcome.gradient[:, 2].any() == infinite
    assert outcome.gradient.isfinite().all()
    assert (outcome.result.loss == INF).all() if infinite else outcome.result.loss.isfinite().all()
    almost = cases.make(7, (3,), device=device)
    almost.student[:, 2], almost.teacher[:, 2] = -1e4, max(teacher_value, -1e4)
    almost.token_ids[:] = 1
    nearby = almost.hybrid_loss(backend=backend, **options)
    torch.testing.assert_close(outcome.gradient, nearby.gradient)
    if not infinite:
        torch.testing.assert_close(outcome.result.loss, nearby.result.loss)
    if teacher_value == -INF:
        rest = [0, 1, 3, 4, 5, 6]
        case.student, case.teacher = case.student[:, rest], case.teacher[:, rest]
        case.view = lambda stored: stored
        without = case.hybrid_loss(backend=backend, **options)
        torch.testing.assert_close(outcome.result.loss, without.result.loss)
        torch.testing.assert_close(outcome.gradient[:, rest], without.gradient)


def test_a_sampled_token_that_the_student_forbids(backend, device):
    case = cases.make(7, (3,), device=device)
    case.student[1, 2] = -INF
    case.token_ids[:] = 2
    terms = token_terms(case.student, case.teacher, case.token_ids, backend=backend)
    assert terms.log_prob[1] == -INF
    assert terms.log_prob[[0, 2]].isfinite().all()
    assert terms.divergence.isfinite().all()


@pytest.mark.parametrize("given", ["tensor", "callable"])
def test_an_advantage_of_zero_cancels_an_infinite_log_prob(given, backend, device):
    case = cases.make(7, (3,), device=device)
    case.student[:, 2] = -INF
    case.token_ids[:] = 2
    case.advantages = torch.tensor([0.0, 1.0, -1.0], device=device)
    options = {}
    if given == "callable":
        options["advantages"] = lambda terms: case.advantages
    outcome = assert_matches_reference(case, backend, reduction="none", **options)
    assert outcome.result.loss[0].isfinite()
    assert outcome.result.loss[1:].tolist() == [INF, -INF]
    assert outcome.gradient.isfinite().all()


@every_divergence
def test_an_upstream_gradient_of_zero_gives_a_gradient_of_zero(divergence, backend, device):
    """A row that `torch.where` leaves out of the loss has no gradient, not even a NaN."""
    student, teacher = torch.randn(2, 3, 127, device=device)
    teacher[1, 5] = -INF
    for dtype in (torch.float32, torch.float16):
        leaf = student.to(dtype, copy=True).requires_grad_()
        result = hybrid_loss(
            leaf, teacher, divergence=divergence, reduction="none", backend=backend
        )
        in_loss = torch.tensor([True, False, True], device=device)
        torch.where(in_loss, result.loss, 0.0).sum().backward()
        assert not leaf.grad[1].any()
        assert leaf.grad[[0, 2]].isfinite().all()
        assert leaf.grad[[0, 2]].any()


@pytest.mark.parametrize("divergence", DIVERGING, ids=divergence_id)
@pytest.mark.parametrize("vocabulary", [7, 127])
@pytest.mark.parametrize("gap", [0.0, 40.0, 500.0], ids=["likely", "unlikely", "underflows"])
def test_a_token_that_only_the_teacher_forbids_costs_infinity(
    gap, vocabulary, divergence, backend, device
):
    """However small its probability under the student is, it is never free."""
    case = cases.make(vocabulary, (3,), device=device)
    case.student[1, 2] = case.student[1].max() - gap
    case.teacher[1, 2] = -INF
    result, gradient = run(case.student, case.teacher, backend, divergence=divergence)
    assert result.divergence[1] == INF
    assert result.loss[1] == INF
    assert not gradient[1].isfinite().all()
    for row in (0, 2):
        assert result.loss[row].isfinite()
        assert gradient[row].isfinite().all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_a_weight_of_zero_cancels_an_infinite_divergence(divergence, backend, device):
    student, teacher = torch.randn(2, 6, 150, device=device)
    teacher[:, 5] = -INF
    ids = torch.arange(6, device=device) + 10
    weights = torch.tensor([0.0, 0, 1, 0, 0, 0], device=device)
    student.requires_grad_()
    terms = token_terms(student, teacher, ids, divergence=divergence, backend=backend)
    terms.log_prob.sum().backward()
    assert student.grad.isfinite().all()
    student.grad = None
    result = hybrid_loss(
        student,
        teacher,
        ids,
        torch.ones(6, device=device),
        dense_weight=weights,
        divergence=divergence,
        reduction="none",
        backend=backend,
    )
    result.loss.sum().backward()
    infinite = weights != 0
    assert result.loss[~infinite].isfinite().all()
    assert student.grad[~infinite].isfinite().all()
    assert (result.loss[infinite] == INF).all()
    assert not student.grad[infinite].isfinite().any()


@every_divergence
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_a_weight_of_zero_cancels_a_teacher_that_is_nan(value, divergence, backend, device):
    student, teacher = torch.randn(2, 3, 127, device=device)
    teacher[1, 5] = value
    ids = torch.tensor([0, 1, 2], device=device)
    gradients = []
    for given in (teacher, None):
        leaf = student.clone().requires_grad_()
        terms = token_terms(leaf, given, ids, divergence=divergence, backend=backend)
        (terms.log_prob + terms.entropy).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@every_divergence
def test_a_teacher_floor_makes_the_divergence_finite(divergence, backend, device):
    case = cases.make(127, (3,), device=device)
    case.teacher[1, 2] = -INF
    options = {"divergence": divergence, "teacher_floor": -20.0, "reduction": "none"}
    outcome = assert_matches_reference(case, backend, **options)
    assert outcome.result.loss.isfinite().all()
    assert outcome.gradient.isfinite().all()
    if FAMILIES[divergence.name].student_d:
        options["teacher_floor"] = -40.0
        lower = case.hybrid_loss(backend=backend, **options).result.divergence[1]
        p = case.student[1].softmax(-1)[2]
        torch.testing.assert_close(
            lower - outcome.result.divergence[1], 20 * p, rtol=0.01, atol=1e-6
        )


def test_a_teacher_floor_bounds_the_sampled_log_prob_too(backend, device):
    case = cases.make(127, (3,), device=device)
    case.teacher[1, 2] = -INF
    case.token_ids[1] = 2
    terms = token_terms(case.student, case.teacher, case.token_ids, backend=backend)
    assert terms.teacher_log_prob[1] == -INF
    terms = token_terms(
        case.student, case.teacher, case.token_ids, teacher_floor=-20.0, backend=backend
    )
    assert terms.teacher_log_prob[1] == -20


@pytest.mark.parametrize("divergence", BOUNDED, ids=divergence_id)
def test_bounded_divergences_of_a_token_that_only_the_teacher_forbids(divergence, backend, device):
    """They stay finite, since they have no log q where q = 0."""
    case = cases.make(127, (3,), device=device)
    case.teacher[:, 2] = -INF
    options = {"divergence": divergence, "reduction": "none", "advantages": None}
    outcome = assert_matches_reference(case, backend, **options)
    assert outcome.result.loss.isfinite().all()
    assert outcome.gradient.isfinite().all()
    almost = cases.make(127, (3,), device=device)
    almost.teacher[:, 2] = -80.0
    nearby = almost.hybrid_loss(backend=backend, **options)
    torch.testing.assert_close(outcome.gradient, nearby.gradient, rtol=1e-4, atol=1e-6)


@every_divergence
@pytest.mark.parametrize(
    ("side", "value"), [*itertools.product(["student", "teacher"], [NAN, INF])], ids=str
)
@pytest.mark.parametrize("position", [5, 126])
def test_nan_and_plus_infinity_make_their_own_row_nan(
    position, side, value, divergence, backend, device
):
    case = cases.make(127, (3,), device=device)
    clean, clean_gradient = run(case.student, case.teacher, backend, divergence=divergence)
    getattr(case, side)[1, position] = value
    result, gradient = run(case.student, case.teacher, backend, divergence=divergence)
    assert result.loss[1].isnan()
    assert result.divergence[1].isnan()
    assert gradient[1].isnan().all()
    assert result.entropy[1].isnan() == (side == "student")
    for row in (0, 2):
        torch.testing.assert_close(result.loss[row], clean.loss[row])
        torch.testing.assert_close(gradient[row], clean_gradient[row])


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_nan_and_plus_infinity_in_the_policy_gradient(value, backend, device):
    case = cases.make(127, (3,), device=device)
    case.student[1, 5] = value
    case.teacher = None
    outcome = case.hybrid_loss(backend=backend, dense_weight=0, reduction="none")
    assert outcome.result.loss.isnan().tolist() == [False, True, False]
    assert outcome.gradient.isnan().all(-1).tolist() == [False, True, False]
    assert outcome.gradient[[0, 2]].isfinite().all()


@every_divergence
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_whole_row_of_minus_infinity_is_nan(side, divergence, backend, device):
    case = cases.make(127, (3,), device=device)
    for name in ("student", "teacher") if side == "both" else (side,):
        getattr(case, name)[1] = -INF
    result, gradient = run(case.student, case.teacher, backend, divergence=divergence)
    assert result.loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@every_divergence
@pytest.mark.parametrize("hidden", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("by", "dtype"), [("mask", torch.float32), ("id", torch.bfloat16)], ids=["mask", "id"]
)
def test_a_masked_row_is_exactly_zero(dtype, by, hidden, divergence, backend, device):
    case = cases.make(127, (3,), dtype=dtype, device=device)
    case.student[1] = hidden
    case.teacher[1] = hidden
    weight = torch.ones(3, device=device)
    for tensor in (case.advantages, case.upstream, weight):
        tensor[1] = NAN
    if by == "mask":
        case.mask = torch.tensor([True, False, True], device=device)
        case.token_ids[1] = -(10**9)
    else:
        case.token_ids[1] = -100
    for floor in (None, -5.0):
        outcome = case.hybrid_loss(
            backend=backend,
            divergence=divergence,
            dense_weight=weight,
            entropy_weight=weight,
            teacher_floor=floor,
            reduction="none",
        )
        for name, field in outcome.result._asdict().items():
            if field is not None:
                assert field[1] == 0, name
                assert field[[0, 2]].isfinite().all(), name
        assert not outcome.gradient[1].any()
        assert outcome.gradient[[0, 2]].isfinite().all()
        assert outcome.gradient[[0, 2]].any()
    terms = case.token_terms(backend=backend, divergence=divergence)
    assert all(field[1] == 0 for field in terms.result if field is not None)
    assert not terms.gradient[1].any()
    assert terms.gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_masked(reduction, backend, device):
    case = cases.make(127, (3,), device=device)
    case.student[:] = NAN
    case.mask = torch.zeros(3, dtype=torch.bool, device=device)
    outcome = case.hybrid_loss(backend=backend, reduction=reduction, entropy_weight=1.0)
    assert not outcome.result.loss.any()
    assert not outcome.gradient.any()


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(inplace, reduction, rows, backend, device):
    case = cases.make(127, rows, device=device)
    outcome = case.hybrid_loss(backend=backend, reduction=reduction, inplace=inplace)
    assert outcome.result.loss.shape == (rows if reduction == "none" else ())
    assert not outcome.result.loss.any()
    assert outcome.result.log_prob.shape == rows
    assert outcome.gradient.shape == (*rows, 127)
    terms = case.token_terms(backend=backend)
    assert terms.result.divergence.shape == rows


@every_divergence
def test_a_vocabulary_of_one(divergence, backend, device):
    case = cases.make(1, (3,), device=device)
    for offset in (0.0, 1e4):
        case.student += offset
        outcome = case.hybrid_loss(backend=backend, divergence=divergence, reduction="none")
        assert all((t.abs() < 1e-6).all() for t in outcome.result if t is not None)
        assert (outcome.gradient.abs() < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [3e9, -3e9, 1e11, -1e15])
def test_rows_so_far_from_zero_that_they_are_flat(offset, dtype, backend, device):
    """Rounding at such an offset leaves a few distinct logits, or only one."""
    case = cases.make(67, (3,), dtype=dtype, device=device)
    case.student, case.teacher = case.student + offset, case.teacher + offset
    assert_matches_reference(case, backend, entropy_weight=0.3)


@pytest.mark.parametrize(
    ("sides", "divergence"),
    [("student", "reverse_kl"), ("teacher", "reverse_kl"), ("both", "reverse_kl"), ("both", "jsd")],
)
def test_a_large_weight_and_a_low_logit(sides, divergence, backend, device):
    """An overflow times a probability of 0 must not become a gradient."""
    for position in (5, 66):  # in the body of a row, and in its edges
        case = cases.make(67, (3,), dtype=torch.bfloat16, device=device)
        case.student[:, position] = -300.0 if sides == "teacher" else -3e38
        if sides != "student":
            case.teacher[:, position] = -3e38
        options = {"dense_weight": 1e4, "entropy_weight": 100.0, "divergence": divergence}
        outcome = case.hybrid_loss(backend=backend, temperature=2.0, **options)
        assert outcome.gradient.isfinite().all()
        assert (outcome.gradient[:, position] == 0).all()


@pytest.mark.parametrize(
    "options", [{"teacher_floor": -20.0}, {"divergence": "jeffreys"}, {}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_low_logit_under_weights_that_are_large_together(dtype, options, backend, device):
    case = cases.make(67, (3,), dtype=dtype, device=device)
    case.student[:, 5] = torch.finfo(dtype).min
    options = {"entropy_weight": 0.3, "reduction": "sum", **options}
    outcome = case.hybrid_loss(backend=backend, **options)
    assert outcome.gradient.isfinite().all()


@pytest.mark.native
def test_more_rows_than_a_grid_dimension_holds(backend, device):
    case = cases.make(3, (70_000,), device=device)
    assert_matches_reference(case, backend, reduction="none")


@every_divergence
def test_the_reference_agrees_about_infinite_values(divergence, backend, device):
    """Values alone: autograd's gradients through infinities are not a specification."""
    student = [[0.0, 1.0, -INF], [0.0, 1.0, 2.0], [0.0, NAN, 1.0], [0.0, INF, 1.0]]
    teacher = [[0.0, 2.0, -INF], [-INF, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    student, teacher = (torch.tensor(side, device=device) for side in (student, teacher))
    got = token_terms(student, teacher, divergence=divergence, backend=backend)
    expected = reference.token_terms(student.double(), teacher, divergence=divergence)
    for value, truth in zip(got, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value, truth.float(), equal_nan=True)
