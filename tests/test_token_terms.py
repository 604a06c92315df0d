"""`token_terms`: values, and gradients through all of its fields at once."""

import pytest
import torch

import cases
from cases import every_divergence
from hybrid_kernels import TokenTerms, reference, token_terms
from tolerance import assert_close, assert_matches_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@every_divergence
@pytest.mark.parametrize(
    ("temperature", "teacher_floor"),
    [(1.0, None), pytest.param(0.7, None, marks=pytest.mark.smoke), (1.0, -4.0), (0.7, -4.0)],
)
def test_any_upstream_through_every_field(divergence, temperature, teacher_floor, backend, device):
    case = cases.make(127, masked=True, device=device)
    assert_matches_reference(
        case,
        backend,
        "token_terms",
        divergence=divergence,
        temperature=temperature,
        teacher_floor=teacher_floor,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("style", cases.STYLES)
def test_styles(style, backend, device):
    case = cases.make(1000, (4,), style=style, device=device)
    assert_matches_reference(case, backend, "token_terms")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.smoke), torch.float16],
    ids=str,
)
def test_layouts_and_dtypes(layout, dtype, backend, device):
    case = cases.make(1000, layout=layout, dtype=dtype, device=device)
    assert_matches_reference(case, backend, "token_terms")


@pytest.mark.smoke
@pytest.mark.parametrize("missing", ["teacher", "token_ids", "both"])
def test_fields_without_their_inputs_are_none(missing, backend, device):
    case = cases.make(127, device=device)
    if missing in ("teacher", "both"):
        case.teacher = None
    if missing in ("token_ids", "both"):
        case.token_ids = None
    terms = assert_matches_reference(case, backend, "token_terms").result
    assert isinstance(terms, TokenTerms)
    assert (terms.divergence is None) == (missing in ("teacher", "both"))
    assert (terms.log_prob is None) == (missing in ("token_ids", "both"))
    assert terms.teacher_log_prob is None


@pytest.mark.smoke
def test_one_field_alone(backend, device):
    """With an upstream gradient into one field only, the others add nothing."""
    case = cases.make(127, masked=True, device=device)

    def gradient(function, dtype, field):
        leaf = case.student.to(dtype, copy=True).requires_grad_()
        terms = function(leaf, case.teacher, case.token_ids, mask=case.mask)
        getattr(terms, field).sum().backward()
        return leaf.grad

    for field in ("divergence", "log_prob", "entropy"):
        got = gradient(lambda *a, **k: token_terms(*a, backend=backend, **k), torch.float32, field)
        truth = gradient(reference.token_terms, torch.float64, field)
        eager = gradient(reference.token_terms, torch.float32, field)
        assert_close(got, truth, eager, f"gradient of {field}")


@pytest.mark.smoke
def test_only_the_student_side_is_differentiable(backend, device):
    case = cases.make(127, device=device)
    logits = case.student.requires_grad_()
    terms = token_terms(logits, case.teacher, case.token_ids, backend=backend)
    expected = {"divergence", "log_prob", "entropy"}
    fields = terms._asdict().items()
    assert {name for name, field in fields if field is not None and field.requires_grad} == expected
    terms = token_terms(logits.detach(), None, backend=backend)
    assert not any(t.requires_grad for t in terms if t is not None)


@pytest.mark.smoke
def test_a_clipped_policy_loss(backend, device):
    """`token_terms` is meant for this: a loss written in torch on top of the terms."""
    case = cases.make(127, masked=True, device=device)
    old = (case.upstream * 0.1).nan_to_num()
    advantages = case.advantages.nan_to_num()

    def gradient(function, dtype):
        leaf = case.student.to(dtype, copy=True).requires_grad_()
        terms = function(leaf, case.teacher, case.token_ids, mask=case.mask)
        ratio = (terms.log_prob - terms.log_prob.detach() + old).exp()
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages)
        (terms.divergence.square() - clipped - 0.1 * terms.entropy).mean().backward()
        return leaf.grad

    got = gradient(lambda *a, **k: token_terms(*a, backend=backend, **k), torch.float32)
    truth = gradient(reference.token_terms, torch.float64)
    assert_close(got, truth, gradient(reference.token_terms, torch.float32), "gradient")


def test_backward_twice(backend, device):
    case = cases.make(127, device=device)
    leaf = case.student.requires_grad_()
    total = token_terms(leaf, case.teacher, backend=backend).divergence.sum()
    (once,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * total, leaf)
    assert once.any()
    assert torch.equal(2 * once, twice)


def layouts(ids):
    """The same ids in memory that is not contiguous."""
    padded = torch.full((6, 3), 7, device=ids.device)
    padded[:, 1] = ids
    return {
        "column": padded[:, 1],
        "last": torch.stack([ids + 1, ids], 1)[:, -1:],
        "expanded": ids[:1].expand(6),
    }


@pytest.mark.parametrize("layout", ["column", "last", "expanded"])
def test_token_ids_of_any_stride(layout, backend, device):
    student, teacher = torch.randn(2, 6, 150, device=device)
    ids = layouts(torch.randint(149, (6,), device=device))[layout]
    student, teacher = student.view(*ids.shape, -1), teacher.view(*ids.shape, -1)
    got = token_terms(student, teacher, ids, backend=backend).log_prob
    expected = student.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sliced", ["student", "teacher", "both"])
def test_rows_of_different_layouts(sliced, backend, device):
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(2, 4, 6, 16, generator=generator).to(device)
    student, teacher = (logits[:, 1:-1] for logits in padded)
    expected = token_terms(student.contiguous(), teacher.contiguous(), backend=backend)
    if sliced == "student":
        teacher = teacher.contiguous()
    elif sliced == "teacher":
        student = student.contiguous()
    student = student.detach().requires_grad_()
    got = token_terms(student, teacher, backend=backend)
    assert torch.equal(got.divergence, expected.divergence)
    got.divergence.sum().backward()
    twin = student.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    token_terms(twin, teacher.contiguous(), backend=backend).divergence.sum().backward()
    assert torch.equal(student.grad, twin.grad)
