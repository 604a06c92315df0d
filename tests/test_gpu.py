"""Tests that need a GPU. Those with a backend as argument run there, too: `pytest -m gpu`.

Triton compiles the same kernel for all multiples of 16 rows. So with such numbers most of these
tests launch kernels that the benchmarks launch, too.
"""

import contextlib
import itertools

import pytest
import torch

import cases
from bench.gpu import hangs
from bench.providers import random_options
from hybrid_kernels import (
    LinearTeacher,
    Mixture,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    token_terms,
)
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.triton_backend import launch as launchers
from hybrid_kernels.triton_backend import plan
from tolerance import assert_matches_reference, assert_near

pytestmark = pytest.mark.gpu

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)
EXACTLY = {"rtol": 0, "atol": 0}


@pytest.fixture
def device(pytestconfig):
    """A GPU, or "meta" where `bench/standin.py` replaces it."""
    return "meta" if pytestconfig.getoption("--backend") == "meta" else "cuda"


@contextlib.contextmanager
def nothing_waits(device):
    """Makes it an error to wait for the device."""
    if device == "meta":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradient(student, teacher, **options):
    student.grad = None
    loss = hybrid_loss(student, teacher, **options).loss
    loss.sum().backward()
    return student.grad


@pytest.mark.smoke
def test_auto_is_triton(device):
    case = cases.make(1000, device=device)
    auto, triton = (case.hybrid_loss(backend=backend) for backend in ("auto", "triton"))
    torch.testing.assert_close(auto.gradient, triton.gradient, **EXACTLY)


@pytest.mark.smoke
def test_nothing_waits_for_the_device(device):
    case = cases.make(1000, masked=True, device=device)
    count = case.valid.sum()
    expected = case.hybrid_loss(num_tokens=count)
    leaf = case.student.clone().requires_grad_()
    upstream = torch.full((), case.scalar_upstream, device=device)
    mixtures = [cases.with_teachers(case, 2, support).given for support in (None, "union")]
    with nothing_waits(device):
        loss = hybrid_loss(
            leaf, case.teacher, case.token_ids, case.advantages, mask=case.mask, num_tokens=count
        ).loss
        (got,) = torch.autograd.grad(loss, leaf, upstream)
        token_terms(leaf, case.teacher, case.token_ids, mask=case.mask).entropy.sum().backward()
        for teacher in mixtures:
            hybrid_loss(leaf, teacher, case.token_ids, mask=case.mask, num_tokens=count)
    # A wait would have raised above; without one the results must still be right.
    torch.testing.assert_close(loss.detach(), expected.result.loss, **EXACTLY)
    torch.testing.assert_close(got, expected.gradient, **EXACTLY)


# -- programs that meet ----------------------------------------------------------------------------


KINDS = [d for d in cases.DIVERGENCES if FAMILIES[d.name].resident]
AT_SIZES = [
    *(pytest.param(50_257, d, marks=pytest.mark.smoke) for d in KINDS),
    *itertools.product([v for v in VOCABULARIES if v != 50_257], KINDS),
]


@pytest.mark.parametrize(("vocabulary", "divergence"), AT_SIZES)
def test_both_forms_agree(vocabulary, divergence, device, monkeypatch):
    student, teacher = hangs.logits(48, device, vocabulary)
    options = {"divergence": divergence, "reduction": "none"}
    resident = gradient(student, teacher, **options)
    values = hybrid_loss(student, teacher, **options).loss
    monkeypatch.setattr(plan, "resident", lambda *args, **others: None)
    swept = gradient(student, teacher, **options)
    torch.testing.assert_close(resident, swept, rtol=1e-2, atol=1e-6)
    # Statistics without a gradient are always swept.
    with torch.no_grad():
        terms = token_terms(student, teacher, divergence=divergence)
    torch.testing.assert_close(values.detach(), terms.divergence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tuning", plan.CANDIDATES, ids=str)
def test_every_candidate_is_right(tuning, dtype, divergence, device, monkeypatch):
    monkeypatch.setattr(plan, "tuned", lambda *_: tuning)
    case = cases.make(50_257, (2, 40), masked=True, dtype=dtype, device=device)
    assert_matches_reference(case, "triton", divergence=divergence)


@pytest.mark.parametrize("check", hangs.CHECKS)
def test_launches_on_a_busy_device(check, device):
    assert hangs.CHECKS[check](device)


@pytest.mark.smoke
def test_results_are_the_same_from_run_to_run(device):
    student, teacher = hangs.logits(704, device, 128_256)
    first = gradient(student, teacher, divergence="jsd").clone()
    for _ in range(5):
        again = gradient(student, teacher, divergence="jsd")
        torch.testing.assert_close(again, first, **EXACTLY)


@pytest.mark.smoke
def test_which_form_runs(device):
    student, teacher = hangs.logits(4, device)
    logits_of = (student.detach()[None], (teacher[None],), (1.0,))
    rows = launchers.Rows(*logits_of)
    launch = launchers.form(rows, student.detach()[None])
    assert isinstance(launch, plan.Resident)
    assert launch.splits > 1


@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
@pytest.mark.parametrize("kind", ["32", "128", "1024", "two", "three", "two of 128"])
def test_other_teachers_at_full_size(kind, vocabulary, device):
    """The sweeping form agrees with the torch backend."""
    student, teacher = hangs.logits(48, device, vocabulary)
    logits = [teacher, teacher.flip(-1), teacher.roll(7, -1)]
    ids = torch.randint(vocabulary, (48,), device=device)
    if kind in ("two", "three"):
        members = logits[: 2 if kind == "two" else 3]
        given = Mixture([(1.0 + i, w) for i, w in enumerate(members)])
    else:
        size = int(kind.split()[-1])
        support = teacher.topk(size).indices
        top_k = [TopK.from_logits(w, ids=support, token_ids=ids) for w in logits[:2]]
        top_k = [TopK(support, k.log_probs, k.token_log_prob) for k in top_k]
        given = Mixture([(1.0, top_k[0]), (0.5, top_k[1])]) if "two" in kind else top_k[0]
    options = {"token_ids": ids, "advantages": torch.randn(48, device=device), "reduction": "sum"}
    swept = gradient(student, given, **options)
    expected = gradient(student, given, backend="torch", **options)
    torch.testing.assert_close(swept, expected, rtol=1e-2, atol=1e-6)


# -- sizes ---------------------------------------------------------------------------------------


def assert_the_last_rows_do_not_depend_on_the_others(student, teacher):
    tail = student[-16:].detach().clone().requires_grad_()
    losses = []
    for leaf, logits in ((student, teacher), (tail, teacher[-16:].clone())):
        losses.append(hybrid_loss(leaf, logits, reduction="none").loss)
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[0][-16:], losses[1])
    torch.testing.assert_close(student.grad[-16:], tail.grad)


def test_more_than_two_to_the_31_entries(device):
    """Offsets must be 64 bits wide."""
    rows, vocabulary = 14_144, 151_936
    assert rows * vocabulary > 2**31
    student, teacher = (
        torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device).normal_()
        for _ in range(2)
    )
    assert_the_last_rows_do_not_depend_on_the_others(student.requires_grad_(), teacher)


@pytest.mark.smoke
def test_more_than_65535_rows(device):
    assert_the_last_rows_do_not_depend_on_the_others(*hangs.logits(70_000, device, 1000))


@pytest.mark.parametrize("divergence", cases.DIVERGENCES, ids=cases.divergence_id)
def test_a_whole_batch_in_half_precision(divergence, device):
    case = cases.make(151_936, (2, 64), layout="sliced", dtype=torch.bfloat16, device=device)
    assert_matches_reference(case, "triton", divergence=divergence)


# -- from hidden states ------------------------------------------------------------------------


def linear(rows, vocabulary, width, dtype, device):
    options = random_options(device)
    hidden, teacher_hidden = torch.randn(2, rows, width, **options).to(dtype).unbind()
    weight = (2 / width**0.5) * torch.randn(vocabulary, width, **options)
    teacher_weight = weight + 0.2 / width**0.5 * torch.randn(weight.shape, **options)
    leaves = (hidden.clone().requires_grad_(), weight.to(dtype).requires_grad_())
    return (*leaves, LinearTeacher(teacher_hidden.clone(), teacher_weight.to(dtype)))


@pytest.mark.parametrize("chunk_rows", [None, 192, 512])
@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        pytest.param(50_257, torch.bfloat16, marks=pytest.mark.smoke),
        *itertools.product([50_257], [torch.float16, torch.float32]),
        *itertools.product([151_936], [torch.bfloat16, torch.float16, torch.float32]),
    ],
    ids=str,
)
def test_linear_equals_fp32_logits(vocabulary, dtype, chunk_rows, device):
    """GEMMs of 16-bit factors sum in fp32, so that rounding dz is the largest error."""
    hidden, weight, teacher = linear(704, vocabulary, 512, dtype, device)
    ids = torch.randint(0, vocabulary, (704,), device=device)
    advantages = torch.randn(704, device=device)
    got = linear_hybrid_loss(
        hidden, weight, teacher, ids, advantages, chunk_rows=chunk_rows, reduction="sum"
    )
    got.loss.backward()
    leaves = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    teacher_logits = teacher.hidden.float() @ teacher.weight.float().T
    logits = leaves[0] @ leaves[1].T
    expected = hybrid_loss(logits, teacher_logits, ids, advantages, reduction="sum")
    expected.loss.backward()
    torch.testing.assert_close(got.divergence, expected.divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    allowed = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for leaf, fp32_leaf in zip((hidden, weight), leaves, strict=True):
        assert_near(leaf.grad, fp32_leaf.grad, allowed)


@pytest.mark.smoke
def test_linear_memory(device):
    """A forward needs the budget of 2 GiB, the fp32 sum of dW, and the gradients."""
    hidden, weight, teacher = linear(8192, 151_936, 1024, torch.bfloat16, device)

    def forward():
        return linear_hybrid_loss(hidden, weight, teacher).loss

    forward()
    if device == "meta":
        return  # tensors without values need no memory
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    sums = 4 * weight.numel()
    gradients = 2 * (weight.numel() + hidden.numel())
    assert peak < 1.05 * (2 << 30) + sums + gradients


@pytest.mark.smoke
def test_linear_waits_for_nothing_that_it_need_not(device):
    hidden, weight, teacher = linear(256, 1000, 256, torch.bfloat16, device)
    mask = torch.arange(256, device=device) % 4 > 0
    count, upstream = mask.sum(), torch.full((), 1.7, device=device)
    loss = linear_hybrid_loss(hidden, weight, teacher, mask=mask, num_tokens=count).loss
    loss.backward(upstream)
    expected, hidden.grad = hidden.grad.clone(), None
    with nothing_waits(device):
        linear_hybrid_loss(
            hidden, weight, teacher, mask=mask, num_tokens=count, drop_masked=False
        ).loss.backward(upstream)
        terms = linear_token_terms(hidden.detach(), weight, teacher)
        terms.divergence.sum().backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-2, atol=1e-5)


def test_linear_rows_do_not_depend_on_the_chunk(device):
    hidden, weight, teacher = linear(1024, 50_257, 256, torch.bfloat16, device)
    gradients = []
    for chunk_rows in (1024, 256, 96):
        hidden.grad = None
        linear_hybrid_loss(
            hidden, weight, teacher, chunk_rows=chunk_rows, reduction="sum"
        ).loss.backward()
        gradients.append(hidden.grad)
    for other in gradients[1:]:
        assert_near(other, gradients[0], 4e-3)
