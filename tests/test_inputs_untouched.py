"""What the caller passes in stays as it was, in whatever layout it comes."""

import pytest
import torch

from hybrid_kernels import hybrid_loss, token_terms

ROWS, VOCABULARY = 6, 150


def layouts(ids):
    """The same ids in memory that is not contiguous."""
    padded = torch.full((ROWS, 3), 7, device=ids.device)
    padded[:, 1] = ids
    return {
        "column": padded[:, 1],
        "last": torch.stack([ids + 1, ids], 1)[:, -1:],
        "expanded": ids[:1].expand(ROWS),
    }


@pytest.mark.parametrize("layout", ["column", "last", "expanded"])
def test_token_ids_of_any_stride(layout, backend, device):
    student, teacher = torch.randn(2, ROWS, VOCABULARY, device=device)
    ids = layouts(torch.randint(VOCABULARY - 1, (ROWS,), device=device))[layout]
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


def test_nothing_is_written_into(backend, device):
    student, teacher = torch.randn(2, ROWS, VOCABULARY, device=device)
    ids = torch.tensor([3, -100, 2, -100, 0, 149], device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], device=device)
    advantages = torch.randn(ROWS, device=device)
    student.requires_grad_()
    inputs = (student, teacher, ids, mask, advantages)
    copies = [tensor.detach().clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    loss = hybrid_loss(student, teacher, ids, advantages, mask=mask, backend=backend).loss
    (2 * loss).backward()
    assert [tensor._version for tensor in inputs] == versions
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_a_weight_of_zero_leaves_nothing_of_an_infinite_divergence(divergence, backend, device):
    student, teacher = torch.randn(2, ROWS, VOCABULARY, device=device)
    teacher[:, 5] = -torch.inf
    ids = torch.arange(ROWS, device=device) + 10
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
        torch.ones(ROWS, device=device),
        dense_weight=weights,
        divergence=divergence,
        reduction="none",
        backend=backend,
    )
    result.loss.sum().backward()
    infinite = weights != 0
    assert result.loss[~infinite].isfinite().all()
    assert student.grad[~infinite].isfinite().all()
    assert (result.loss[infinite] == torch.inf).all()
    assert not student.grad[infinite].isfinite().any()


def test_infinite_costs_stay_where_they_belong():
    from hybrid_kernels import returns_to_go, sparse_advantages

    costs = torch.tensor([[0.0, torch.inf, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    options = {"reward_weight": 1.0, "baseline": "none"}
    got = sparse_advantages(costs, torch.ones(1), mask, gamma=0.0, **options)
    assert got.tolist() == [[1.0, 1.0, 1.0]]
    got = sparse_advantages(costs, torch.ones(1), mask, gamma=1.0, **options)
    assert got.tolist() == [[-torch.inf, 0.0, 1.0]]
    assert returns_to_go(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    empty = sparse_advantages(torch.zeros(2, 0), torch.ones(2), torch.zeros(2, 0).bool(), **options)
    assert empty.shape == (2, 0)


def test_no_tokens_counted_on_the_device():
    student = torch.randn(2, 5, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool)
    result = hybrid_loss(student, torch.randn(2, 5), mask=mask, num_tokens=mask.sum())
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros(2, 5))


def test_a_teacher_from_inference_mode():
    with torch.inference_mode():
        teacher = torch.randn(2, 5)
    student = torch.randn(2, 5, requires_grad=True)
    hybrid_loss(student, teacher).loss.backward()
    with pytest.raises(ValueError, match=r"teacher: made under torch.inference_mode.*no_grad"):
        token_terms(student, teacher)
