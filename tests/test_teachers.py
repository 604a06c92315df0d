"""Top-K teachers and several teachers, against the float64 specification."""

import math
from dataclasses import replace

import pytest
import torch

import cases
from cases import DIVERGENCES, divergence_id, every_divergence
from hybrid_kernels import Mixture, TopK, hybrid_loss, reference, token_terms
from hybrid_kernels.validate import TAILS
from tolerance import assert_close, assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

every_tail = pytest.mark.parametrize("tail", TAILS)
KINDS = ["full", *TAILS]


def case_of(kind, members, temperature=1.0, support="union", **options):
    case = cases.make(127, (1, 6), masked=True, **options)
    return cases.with_teachers(case, members, None if kind == "full" else support, temperature)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=divergence_id)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_every_divergence_and_teacher(members, kind, divergence, backend, device):
    """All terms at once, a random upstream gradient for each row."""
    if (kind, members) == ("full", 1):
        members = 4
    case = case_of(kind, members, temperature=1.3, device=device)
    assert_matches_reference(
        case,
        backend,
        divergence=divergence,
        tail="bucket" if kind == "full" else kind,
        dense_weight=case.upstream.cos(),
        entropy_weight=0.3,
        temperature=1.3,
        reduction="none",
    )


@every_divergence
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_teacher_has_a_weight(kind, divergence, backend, device):
    case = case_of(kind, 1, device=device)
    case = replace(case, given=Mixture([(0.7, case.given)]))
    options = {"divergence": divergence, "tail": "bucket" if kind == "full" else kind}
    assert_matches_reference(case, backend, entropy_weight=0.3, **options)


@every_divergence
@pytest.mark.parametrize("kind", KINDS)
def test_a_floor(kind, divergence, backend, device):
    tail = "bucket" if kind == "full" else kind
    options = {"divergence": divergence, "tail": tail, "teacher_floor": -4.0, "reduction": "none"}
    assert_matches_reference(case_of(kind, 2, device=device), backend, **options)


@pytest.mark.parametrize("style", cases.STYLES)
@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_styles_and_supports(divergence, support, style, backend, device):
    case = case_of("bucket", 1, support=support, style=style, device=device)
    if style == "one_hot":
        # Tails of 1e-5 are known to four digits only, and a correction is in proportion to them.
        case = replace(case, given=replace(case.given, token_log_prob=None))
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("vocabulary", [1, 7, 136, 203])
@pytest.mark.parametrize("kind", ["full", "bucket"])
def test_layouts(kind, vocabulary, layout, backend, device, small_tiles):
    case = cases.make(vocabulary, (2, 3), layout=layout, device=device)
    case = cases.with_teachers(case, 2, None if kind == "full" else "student")
    assert_matches_reference(case, backend, entropy_weight=0.3)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["full", "bucket"])
def test_dtypes(kind, dtype, backend, device):
    case = cases.make(128, (3,), dtype=dtype, device=device)
    case = cases.with_teachers(case, 2, None if kind == "full" else "student")
    assert_matches_reference(case, backend, entropy_weight=0.3, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "divergence", [pytest.param("reverse_kl", marks=pytest.mark.smoke), "alpha"]
)
def test_token_terms(divergence, kind, backend, device):
    tail = "bucket" if kind == "full" else kind
    case = case_of(kind, 2, device=device)
    assert_matches_reference(case, backend, "token_terms", divergence=divergence, tail=tail)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_callable_advantages(kind, backend, device):
    case = case_of(kind, 2, device=device)
    tail = "bucket" if kind == "full" else kind

    def advantages(terms):
        return (terms.teacher_log_prob - terms.log_prob).exp().clamp(max=2)

    options = {"tail": tail, "advantages": advantages, "entropy_weight": 0.1}
    assert_matches_reference(case, backend, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_inplace(kind, backend, device):
    tail = "bucket" if kind == "full" else kind
    assert_matches_reference(case_of(kind, 2, device=device), backend, tail=tail, inplace=True)


@pytest.mark.parametrize("kind", ["full", "bucket"])
def test_no_rows(kind, backend, device):
    logits = torch.zeros(0, 3, 20, device=device, requires_grad=True)
    ids = torch.zeros(0, 3, 4, dtype=torch.long, device=device)
    teacher = logits.detach()
    if kind == "bucket":
        teacher = TopK(ids, torch.zeros(0, 3, 4, device=device))
    result = hybrid_loss(logits, Mixture([(1.0, teacher), (1.0, teacher)]), backend=backend)
    result.loss.backward()
    assert result.loss == 0
    assert result.divergence.shape == (0, 3)


def test_a_support_without_advantages_or_tokens(backend, device):
    case = case_of("bucket", 1, device=device)
    assert_matches_reference(case, backend, advantages=None)
    without = replace(case, token_ids=None, mask=case.valid)
    leaf = case.student.nan_to_num(0, 0, 0).requires_grad_()
    result = hybrid_loss(leaf, without.given, mask=case.valid, backend=backend)
    assert result.log_prob is None
    assert result.teacher_log_prob is None
    result.loss.backward()
    assert leaf.grad.isfinite().all()


# -- properties of supports -----------------------------------------------------------------------


def gradient_of(student, teacher, backend, **options):
    leaf = student.clone().requires_grad_()
    result = hybrid_loss(leaf, teacher, reduction="sum", backend=backend, **options)
    result.loss.backward()
    return result, leaf.grad


@every_divergence
@every_tail
def test_the_whole_vocabulary_is_the_full_teacher(tail, divergence, backend, device):
    case = cases.make(24, (4,), device=device)
    order = torch.rand(4, 24, generator=torch.Generator().manual_seed(0)).argsort(-1).to(device)
    top_k = TopK.from_logits(case.teacher, ids=order)
    options = {"divergence": divergence, "tail": tail}
    got, gradient = gradient_of(case.student, top_k, backend, **options)
    truth, expected = gradient_of(case.student, case.teacher, backend, **options)
    assert_close(got.divergence, truth.divergence.double(), truth.divergence, scale=4)
    assert_close(gradient, expected.double(), expected, scale=0.2)
    torch.testing.assert_close(got.student_mass, torch.ones_like(got.student_mass))
    torch.testing.assert_close(got.teacher_mass, torch.ones_like(got.teacher_mass))
    assert truth.student_mass is None
    assert truth.teacher_mass is None


@every_divergence
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_no_gradient_where_the_teacher_is_the_student(tail, divergence, backend, device):
    """Unlike the truncated loss, whose gradient pushes mass out of the support."""
    case = cases.make(200, (5,), device=device)
    top_k = TopK.from_logits(case.student, 20)
    result, gradient = gradient_of(case.student, top_k, backend, divergence=divergence, tail=tail)
    assert result.divergence.abs().max() < 1e-6
    if divergence.name != "tv":  # whose gradient has the sign of p - q, even of a rounding
        assert gradient.abs().max() < 2e-6


@every_divergence
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_rows_sum_to_zero_and_mask_stays_inside(tail, divergence, backend, device):
    case = cases.make(200, (5,), device=device)
    top_k = TopK.from_logits(case.teacher, 20)
    _, gradient = gradient_of(case.student, top_k, backend, divergence=divergence, tail=tail)
    assert gradient.sum(-1).abs().max() < 2e-6
    _, bucket = gradient_of(case.student, top_k, backend, divergence=divergence)
    _, masked = gradient_of(case.student, top_k, backend, divergence=divergence, tail="mask")
    inside = torch.zeros_like(masked, dtype=torch.bool).scatter_(-1, top_k.ids, True)
    torch.testing.assert_close(masked[inside], bucket[inside], atol=1e-7, rtol=1e-5)
    assert (masked[~inside] == 0).all()


@every_divergence
def test_the_bucket_is_a_lower_bound(divergence, backend, device):
    case = cases.make(200, (6,), device=device)
    full, _ = gradient_of(case.student, case.teacher, backend, divergence=divergence)
    for k in (1, 40):
        top_k = TopK.from_logits(case.teacher, k)
        part, _ = gradient_of(case.student, top_k, backend, divergence=divergence)
        assert (part.divergence <= full.divergence + 1e-5).all()


def two_sides(student_tail, teacher_tail, device):
    """Four entries, two in the support, with given masses outside."""
    tails = torch.tensor([[student_tail], [teacher_tail]], dtype=torch.float64)
    inside = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    outside = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    if student_tail < 1e-6:
        inside = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    masses = torch.cat([inside * (1 - tails), outside * tails], -1)
    return masses.to(device)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "alpha"])
def test_masses_beyond_the_digits_of_one(divergence, backend, device):
    """P = 1 - 1e-9 and Q = 1 - 1e-12: 1 - sum would be noise, or 0."""
    student_tail, teacher_tail = 1e-9, 1e-12
    logits = torch.tensor([[0.0, -30.0, math.log(2.5e-10), math.log(7.5e-10)]], device=device)
    # log q of the first entry is -(1e-12 + 1e-14), which fp32 holds to seven digits.
    second = 1e-14
    log_probs = torch.tensor([[-(teacher_tail + second), math.log(second)]], device=device)
    ids = torch.tensor([[0, 1]], device=device)
    top_k = TopK(ids, log_probs)
    result, gradient = gradient_of(logits, top_k, backend, divergence=divergence)
    truth = reference.token_terms(logits.double(), top_k, divergence=divergence).divergence
    leaf = logits.double().requires_grad_()
    reference.token_terms(leaf, top_k, divergence=divergence).divergence.sum().backward()
    assert result.divergence.isfinite().all()
    torch.testing.assert_close(result.divergence.double(), truth, rtol=1e-4, atol=1e-15)
    # The first entry's gradient is a difference of numbers around 1.
    torch.testing.assert_close(gradient[:, 0].double(), leaf.grad[:, 0], rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient[:, 1:].double(), leaf.grad[:, 1:], rtol=1e-4, atol=1e-16)
    if divergence == "reverse_kl":
        rho = math.log(student_tail / teacher_tail)
        tail = gradient[0, 2:].double()
        expected = torch.tensor([2.5e-10, 7.5e-10]).double().to(device) * rho
        torch.testing.assert_close(tail, expected, rtol=1e-3, atol=0)


@every_divergence
@every_tail
@pytest.mark.parametrize("side", ["nan", "inf", "-inf"])
def test_rows_that_are_not_finite_are_nan(side, tail, divergence, backend, device):
    """A NaN or +inf among the student's logits, in the support or outside, or a row of -inf."""
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(device)
    top_k = TopK.from_logits(logits.flip(-1), 3)
    clean, expected = gradient_of(logits, top_k, backend, divergence=divergence, tail=tail)
    if side == "-inf":
        logits[1] = -torch.inf
    else:
        logits[1, 7] = float(side)
    result, gradient = gradient_of(logits, top_k, backend, divergence=divergence, tail=tail)
    assert result.divergence[1].isnan()
    assert result.loss.isnan()
    torch.testing.assert_close(result.divergence[[0, 2]], clean.divergence[[0, 2]])
    torch.testing.assert_close(gradient[[0, 2]], expected[[0, 2]])
    inside = top_k.ids[1] if tail == "mask" else slice(None)
    assert gradient[1][inside].isnan().all()


@every_divergence
def test_a_whole_vocabulary_of_rounded_log_probs(divergence, backend, device):
    """If rounding makes their mass less than 1, the rest must not count as a tail."""
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(device)
    top_k = TopK.from_logits(logits.flip(-1), 8)
    top_k = TopK(top_k.ids, top_k.log_probs.bfloat16())
    got, _ = gradient_of(logits, top_k, backend, divergence=divergence)
    truth = reference.token_terms(logits.double(), top_k, divergence=divergence).divergence
    torch.testing.assert_close(got.divergence.double(), truth, atol=1e-5, rtol=1e-5)


def test_a_teacher_that_rounds_to_one_stays_finite(backend, device):
    """The log-probabilities leave no mass, but the tail is hidden by rounding, not impossible."""
    logits = torch.randn(3, 50, device=device)
    ids = torch.arange(4, device=device).expand(3, 4)
    log_probs = torch.tensor([0.0, -20.0, -25.0, -30.0], device=device).expand(3, 4)
    result, gradient = gradient_of(logits, TopK(ids, log_probs), backend)
    assert result.divergence.isfinite().all()
    assert gradient.isfinite().all()


@every_tail
def test_padding_and_repetitions_do_not_count(tail, backend, device):
    case = cases.make(60, (3,), device=device)
    ids = case.teacher.topk(6).indices
    plain = TopK.from_logits(case.teacher, ids=ids)
    padded_ids = torch.cat([ids[:, :4], ids[:, :2], ids[:, 4:], torch.full_like(ids, -1)], -1)
    padded = TopK.from_logits(case.teacher, ids=padded_ids)
    # Of repeated ids the first one counts; the others and padding may have any log-probability.
    log_probs = padded.log_probs.clone()
    log_probs[:, 4:6], log_probs[:, 8:] = -7.0, torch.nan
    padded = TopK(padded_ids, log_probs)
    a, gradient_a = gradient_of(case.student, plain, backend, tail=tail)
    b, gradient_b = gradient_of(case.student, padded, backend, tail=tail)
    torch.testing.assert_close(a.divergence, b.divergence)
    torch.testing.assert_close(gradient_a, gradient_b)
    torch.testing.assert_close(a.teacher_mass, b.teacher_mass)


def test_an_entry_of_a_support_may_have_probability_zero(backend, device):
    """Unlike padding, it is forbidden: a cost of infinity, or of the floor."""
    student = cases.make(20, (1,), device=device).student
    ids = torch.tensor([[1, 3, 5]], device=device)
    log_probs = torch.tensor([[-1.0, -torch.inf, -2.0]], device=device)
    for floor in (None, -20.0):
        for divergence in ("reverse_kl", "jsd"):
            options = {"divergence": divergence, "teacher_floor": floor}
            teacher = TopK(ids, log_probs)
            got = token_terms(student, teacher, backend=backend, **options).divergence
            expected = reference.token_terms(student.double(), teacher, **options).divergence
            assert expected.isinf().any() == (divergence == "reverse_kl" and floor is None)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_empty_support_has_no_gradient(backend, device):
    case = cases.make(60, (3,), device=device)
    top_k = TopK(torch.full((3, 2), -1, device=device), torch.zeros(3, 2, device=device))
    result, gradient = gradient_of(case.student, top_k, backend)
    assert result.divergence.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    assert (result.student_mass == 0).all()


def test_log_q_of_tokens_outside_the_support_is_nan(backend, device):
    """It is NaN unless the teacher has a `token_log_prob`."""
    case = cases.make(60, (4,), device=device)
    ids = case.teacher.topk(5).indices
    tokens = torch.stack([ids[0, 0], ids[1, 4], case.teacher[2].argmin(), case.teacher[3].argmin()])
    top_k = TopK.from_logits(case.teacher, ids=ids)
    log_q = token_terms(case.student, top_k, tokens, backend=backend).teacher_log_prob
    expected = case.teacher.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_q[:2], expected[:2])
    assert log_q[2:].isnan().all()
    top_k = TopK.from_logits(case.teacher, ids=ids, token_ids=tokens)
    log_q = token_terms(case.student, top_k, tokens, backend=backend).teacher_log_prob
    torch.testing.assert_close(log_q, expected)


@every_tail
@pytest.mark.parametrize("teacher_floor", [None, -4.0])
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("method", ["hybrid_loss", "token_terms"])
def test_log_q_unknown_in_some_rows(method, members, teacher_floor, tail, backend, device):
    """If one of the members does not know it, the mean over all is unknown, too."""
    case = cases.make(127, (12,), device=device)
    case = cases.with_teachers(case, members, "teacher")
    pairs = case.given.members if members > 1 else [(1.0, case.given)]
    weight, last = pairs[-1]
    unknown = torch.arange(12, device=device) % 2 == 0
    log_q = last.token_log_prob.masked_fill(unknown, torch.nan)
    case.given = Mixture([*pairs[:-1], (weight, replace(last, token_log_prob=log_q))])
    options = {"tail": tail, "teacher_floor": teacher_floor}
    outcome = assert_matches_reference(case, backend, method, **options)
    assert outcome.result.teacher_log_prob[unknown].isnan().any()
    assert outcome.result.teacher_log_prob[~unknown].isfinite().all()
    assert outcome.gradient.isfinite().all()


@pytest.mark.parametrize("members", [1, 2])
def test_the_terms_have_the_masses_of_a_support(members, backend, device):
    case = case_of("bucket", members, device=device)
    seen = []

    def advantages(terms):
        seen.append(terms)
        return torch.zeros_like(terms.entropy)

    result = case.hybrid_loss(backend=backend, advantages=advantages).result
    logits = case.student.nan_to_num(0, 0, 0).requires_grad_()
    terms = token_terms(logits, case.given, case.token_ids, mask=case.mask, backend=backend)
    for name in ("student_mass", "teacher_mass"):
        mass = getattr(terms, name)
        assert not mass.requires_grad
        for other in (getattr(result, name), getattr(seen[0], name)):
            torch.testing.assert_close(mass, other)
    full = token_terms(logits, case.teacher_logits, backend=backend)
    assert full.student_mass is full.teacher_mass is None


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("members", [1, 2])
def test_the_corrected_bucket_is_unbiased(members, k, backend, device):
    """The mean over every token, weighted by its probability, is the full gradient."""
    vocabulary = 6
    case = cases.make(vocabulary, (1,), device=device)
    generator = torch.Generator().manual_seed(7)
    teachers = [torch.randn(1, vocabulary, generator=generator).to(device) for _ in range(members)]
    weights = [1.0, 0.6][:members]
    ids = teachers[0].topk(k).indices
    student = case.student.expand(vocabulary, -1).contiguous()
    tokens = torch.arange(vocabulary, device=device)

    def expected_gradient(top_k):
        """sum_y p(y) gradient(y), all tokens as rows of one batch."""
        p = student.softmax(-1)[0]
        leaf = student.clone().requires_grad_()
        options = {"reduction": "none", "backend": backend}
        loss = hybrid_loss(leaf, top_k, tokens, torch.zeros_like(p), **options)
        loss.loss.backward(p)
        return leaf.grad.sum(0)

    def mixture(with_tokens):
        rows = [t.expand(vocabulary, -1) for t in teachers]
        same = ids.expand(vocabulary, -1).contiguous()
        top_ks = [
            TopK.from_logits(w, ids=same, token_ids=tokens if with_tokens else None) for w in rows
        ]
        return Mixture(list(zip(weights, top_ks, strict=True)))

    leaf = case.student.double().requires_grad_()
    truth = Mixture([(w, t.double()) for w, t in zip(weights, teachers, strict=True)])
    reference.hybrid_loss(leaf, truth, reduction="sum").loss.backward()
    torch.testing.assert_close(
        expected_gradient(mixture(True)).double(), leaf.grad[0], atol=2e-6, rtol=0
    )
    biased = expected_gradient(mixture(False)).double()
    assert (biased - leaf.grad[0]).norm() > 1e-3 * leaf.grad.norm()


# -- several teachers -----------------------------------------------------------------------------


def test_a_mixture_is_the_geometric_mean_of_its_teachers(backend, device):
    """This holds for the reverse KL, up to the normaliser of the mean."""
    case = cases.make(60, (4,), device=device)
    teachers = [case.teacher, case.student + 1, case.teacher.flip(-1)]
    weights = [0.5, 1.5, 1.0]
    mixture = Mixture(list(zip(weights, teachers, strict=True)))
    got, gradient = gradient_of(case.student, mixture, backend)
    pairs = list(zip(weights, teachers, strict=True))
    logits = sum(w / 3 * t.log_softmax(-1) for w, t in pairs)
    mean, expected = gradient_of(case.student, logits, backend, dense_weight=3.0)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got.divergence, 3 * (mean.divergence - logits.logsumexp(-1)))
    tokens = case.token_ids
    log_q = token_terms(case.student, mixture, tokens, backend=backend).teacher_log_prob
    torch.testing.assert_close(log_q, logits.gather(-1, tokens[:, None])[:, 0])


# -- supports from logits -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 7), (70, 7), (2, 3, 7), (0, 7)])
def test_from_logits(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    top_k = TopK.from_logits(logits, 3)
    assert top_k.ids.shape == (*shape[:-1], 3)
    torch.testing.assert_close(top_k.log_probs, logits.log_softmax(-1).topk(3).values)
    ids = torch.tensor([6, -1]).expand(*shape[:-1], 2)
    union = TopK.from_logits(logits, 3, ids=ids, temperature=2.0)
    assert union.ids.shape == (*shape[:-1], 5)
    assert (union.log_probs[..., 1] == -torch.inf).all()
    log_q = (logits / 2).log_softmax(-1)
    torch.testing.assert_close(union.log_probs[..., 0], log_q[..., 6])
    assert union.token_log_prob is None


def test_from_logits_keeps_a_small_tail():
    logits = torch.tensor([[0.0, -28.0, -30.0]])
    top_k = TopK.from_logits(logits, 1)
    truth = -torch.tensor([-28.0, -30.0]).double().exp().sum()
    torch.testing.assert_close(top_k.log_probs[0, 0].double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.3, 1.0, 3.0])], ids=["one", "rows"])
def test_from_logits_does_not_see_an_offset(temperature):
    """Logits are multiples of 1/64, so that the offset rounds none of them."""
    logits = (64 * torch.randn(3, 7, generator=torch.Generator().manual_seed(0))).round() / 64
    expected = TopK.from_logits(logits, 3, temperature=temperature).log_probs
    for offset in (1e4, -1e4):
        got = TopK.from_logits(logits + offset, 3, temperature=temperature).log_probs
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_from_logits_makes_a_row_with_nan_or_infinity_nan(value):
    logits = torch.tensor([[0.0, value, 1.0], [0.0, 2.0, 1.0]])
    top_k = TopK.from_logits(logits, ids=torch.tensor([[0, 2], [0, 2]]))
    assert top_k.log_probs.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("tail", TAILS)
def test_the_reference_agrees_about_nan_and_infinities_on_a_support(tail, backend, device):
    """NaN in a student whose support is empty, and a weight of 0 for an infinite correction."""
    student = torch.tensor([[math.nan, 0.0, 1.0], [0.0, 1.0, 2.0]], device=device)
    ids = torch.tensor([[-1], [0]], device=device)
    log_probs = torch.full((2, 1), -math.inf, device=device)
    teacher = TopK(ids, log_probs, torch.tensor([-1.0, -math.inf], device=device))
    options = {"dense_weight": torch.tensor([1.0, 0.0], device=device), "advantages": 1.0}
    options |= {"token_ids": torch.tensor([1, 1], device=device), "reduction": "none", "tail": tail}
    got = hybrid_loss(student, teacher, backend=backend, **options)
    expected = reference.hybrid_loss(student.double(), teacher, **options)
    for name in ("loss", "divergence", "log_prob", "student_mass"):
        value, truth = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(value, truth.float(), equal_nan=True)
