"""Memory: no copy of the logits, at most one gradient, and nothing else of that size."""

import gc

import pytest
import torch

import cases
from bench.measure import peak_bytes
from cases import every_divergence
from hybrid_kernels import (
    LinearTeacher,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    token_terms,
)
from hybrid_kernels.linear.chunks import BUDGET, chunk_size
from hybrid_kernels.torch_backend import sweep

pytestmark = pytest.mark.native

ROWS, VOCABULARY = 50, 25_000


@pytest.fixture(autouse=True, scope="module")
def fast_collections():
    """Keeps the objects of modules out of the collection that precedes each measurement."""
    gc.freeze()
    yield
    gc.unfreeze()


BLOCK_ELEMENTS = 40 * 1024


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes blocks of the torch backend small, since inputs here are smaller than real ones."""
    monkeypatch.setattr(sweep, "block_elements", lambda: BLOCK_ELEMENTS)


def size(case):
    return case.logits.numel() * case.logits.element_size()


def loss(case, logits, backend, **options):
    return hybrid_loss(
        logits, case.teacher_logits, case.token_ids, case.advantages, backend=backend, **options
    ).loss


def test_the_measure_sees_a_copy(device):
    case = cases.make(VOCABULARY, (ROWS,), device=device)
    assert peak_bytes(lambda: case.student.clone().exp(), device) >= 2 * size(case)


@every_divergence
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "expanded"])
def test_statistics_need_no_copy_and_no_gradient(layout, divergence, backend, device):
    case = cases.make(VOCABULARY, (2, ROWS // 2), layout=layout, device=device)
    options = {"backend": backend, "divergence": divergence}
    with torch.no_grad():
        stored = case.student.requires_grad_()
        for compute in (
            lambda: loss(case, case.view(stored), **options),
            lambda: token_terms(case.view(stored), case.teacher_logits, **options),
        ):
            assert peak_bytes(compute, device) < 0.5 * size(case)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("advantages", ["tensor", "function"])
def test_one_gradient_and_nothing_else(advantages, masked, layout, backend, device):
    case = cases.make(VOCABULARY, (2, ROWS // 2), layout=layout, masked=masked, device=device)
    logits = case.logits.detach().requires_grad_()
    if advantages == "function":
        given, case.advantages = case.advantages, lambda terms: given * terms.log_prob

    def forward():
        loss(case, logits, backend, mask=case.mask, entropy_weight=0.1)

    forward()
    assert size(case) <= peak_bytes(forward, device) < 1.5 * size(case)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_inplace_needs_no_gradient_buffer(layout, backend, device):
    case = cases.make(VOCABULARY, (2, ROWS // 2), layout=layout, device=device)
    logits = case.view(case.student.requires_grad_() * 1.0)
    peak = peak_bytes(lambda: loss(case, logits, backend, inplace=True), device)
    assert peak < 0.5 * size(case)


def test_backward_scales_in_place(backend, device):
    case = cases.make(VOCABULARY, (ROWS,), device=device)
    logits = case.student.requires_grad_()
    total = 3 * loss(case, logits, backend)
    assert peak_bytes(total.backward, device) < 0.5 * size(case)
    assert logits.grad is not None


def test_half_precision_is_widened_in_blocks(backend, device):
    case = cases.make(VOCABULARY, (ROWS,), dtype=torch.bfloat16, device=device)
    logits = case.student.requires_grad_()
    loss(case, logits, backend)
    assert peak_bytes(lambda: loss(case, logits, backend), device) < 1.5 * size(case)


# -- from hidden states ------------------------------------------------------------------------


def linear_problem(rows, vocabulary, width, device):
    options = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    hidden, teacher_hidden = torch.randn(2, rows, width, **options).unbind()
    weight, teacher_weight = torch.randn(2, vocabulary, width, **options).unbind()
    leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    return (*leaves, LinearTeacher(teacher_hidden.clone(), teacher_weight.clone()))


def test_chunks_stay_in_the_budget(backend, device, monkeypatch):
    """Besides the gradients there are two logits for each entry of a chunk, and little else."""
    hidden, weight, teacher = linear_problem(400, 20_000, 32, device)
    for kind in BUDGET:
        monkeypatch.setitem(BUDGET, kind, 8 << 20)  # of 64 MB of logits
    allowed = 8 << 20
    assert chunk_size(400, 8 * 20_000, 20_000, hidden.device) == 50

    def forward():
        linear_hybrid_loss(hidden, weight, teacher, backend=backend)

    forward()
    gradients = (hidden.numel() + weight.numel()) * 4
    assert 0.8 * allowed < peak_bytes(forward, device) - gradients < 1.4 * allowed


def test_a_single_chunk_lies_inside_the_gradient_of_the_weight(backend, device):
    """Outside of it are only a copy of N / D of dz and the buffers of the row kernels."""
    hidden, weight, teacher = linear_problem(64, 20_000, 512, device)

    def forward():
        linear_hybrid_loss(hidden, weight, teacher, backend=backend)

    forward()
    gradients, logits = (hidden.numel() + weight.numel()) * 4, 64 * 20_000 * 4
    assert peak_bytes(forward, device) - gradients < (64 / 512) * logits + (4 << 20)


def test_scoring_needs_two_chunks_of_logits(backend, device, monkeypatch):
    hidden, weight, teacher = linear_problem(400, 20_000, 32, device)
    for kind in BUDGET:
        monkeypatch.setitem(BUDGET, kind, 8 << 20)

    @torch.no_grad()
    def score():
        linear_token_terms(hidden, weight, teacher, backend=backend)

    score()
    assert peak_bytes(score, device) < 1.4 * (8 << 20)
