"""What only a GPU can show. The tests that take a backend run there too: `pytest -m gpu`."""

import pytest
import torch

import cases
from hybrid_kernels import hybrid_loss, token_terms
from tolerance import assert_matches_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_auto_is_triton():
    case = cases.make(1000, device="cuda")
    auto, triton = (case.hybrid_loss(backend=backend) for backend in ("auto", "triton"))
    assert torch.equal(auto.gradient, triton.gradient)


def test_nothing_waits_for_the_device():
    case = cases.make(1000, masked=True, device="cuda")
    count = case.valid.sum()
    case.hybrid_loss(num_tokens=count)
    leaf = case.student.clone().requires_grad_()
    upstream = torch.full((), 1.7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = hybrid_loss(
            leaf, case.teacher, case.token_ids, case.advantages, mask=case.mask, num_tokens=count
        ).loss
        loss.backward(upstream)
        token_terms(leaf, case.teacher, case.token_ids, mask=case.mask).entropy.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A wait would have raised above; what was not waited for must still be right.
    assert loss.isfinite()
    assert leaf.grad is not None


def test_more_than_two_to_the_31_entries():
    """Offsets are 64 bits wide: the last rows are what they are alone."""
    vocabulary = 151_936
    rows = 2**31 // vocabulary + 8
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": "cuda", "generator": generator}
    student = torch.randn(rows, vocabulary, **options).requires_grad_()
    teacher = torch.randn(rows, vocabulary, **options)
    loss = hybrid_loss(student, teacher, reduction="none").loss
    loss.sum().backward()
    tail = student[-4:].detach().clone().requires_grad_()
    alone = hybrid_loss(tail, teacher[-4:].clone(), reduction="none").loss
    alone.sum().backward()
    torch.testing.assert_close(loss[-4:], alone)
    torch.testing.assert_close(student.grad[-4:], tail.grad)


def test_a_whole_batch_in_half_precision():
    case = cases.make(151_936, (2, 64), layout="sliced", dtype=torch.bfloat16, device="cuda")
    for divergence in cases.DIVERGENCES:
        assert_matches_reference(case, "triton", divergence=divergence)
