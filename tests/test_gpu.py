"""What only a GPU can show. The tests that take a backend run there too: `pytest -m gpu`."""

import itertools

import pytest
import torch

import cases
from bench.gpu import hangs
from hybrid_kernels import (
    Divergence,
    LinearTeacher,
    Mixture,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    token_terms,
)
from hybrid_kernels.kernels import config
from hybrid_kernels.kernels import rows as launchers
from tolerance import assert_matches_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 262_144)


def logits(rows, vocabulary, seed=0):
    return hangs.logits(rows, "cuda", vocabulary, seed)


def gradient(student, teacher, **options):
    student.grad = None
    loss = hybrid_loss(student, teacher, **options).loss
    loss.sum().backward()
    return student.grad


@pytest.mark.smoke
def test_auto_is_triton():
    case = cases.make(1000, device="cuda")
    auto, triton = (case.hybrid_loss(backend=backend) for backend in ("auto", "triton"))
    assert torch.equal(auto.gradient, triton.gradient)


@pytest.mark.smoke
def test_nothing_waits_for_the_device():
    case = cases.make(1000, masked=True, device="cuda")
    count = case.valid.sum()
    case.hybrid_loss(num_tokens=count)
    leaf = case.student.clone().requires_grad_()
    upstream = torch.full((), 1.7, device="cuda")
    others = [cases.with_teachers(case, 2, support).given for support in (None, "union")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = hybrid_loss(
            leaf, case.teacher, case.token_ids, case.advantages, mask=case.mask, num_tokens=count
        ).loss
        loss.backward(upstream)
        token_terms(leaf, case.teacher, case.token_ids, mask=case.mask).entropy.sum().backward()
        for teacher in others:
            hybrid_loss(leaf, teacher, case.token_ids, mask=case.mask, num_tokens=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A wait would have raised above; what was not waited for must still be right.
    assert loss.isfinite()
    assert leaf.grad is not None


# -- programs that meet ----------------------------------------------------------------------------


KINDS = [Divergence(name) for name in ("reverse_kl", "forward_kl", "jeffreys", "jsd")]
AT_SIZES = [
    *itertools.product(VOCABULARIES, KINDS),
    *((151_936, d) for d in cases.DIVERGENCES if d.name not in {k.name for k in KINDS}),
]


@pytest.mark.parametrize(("vocabulary", "divergence"), AT_SIZES)
def test_both_forms_agree(vocabulary, divergence, monkeypatch):
    student, teacher = logits(50, vocabulary)
    options = {"divergence": divergence, "reduction": "none"}
    resident = gradient(student, teacher, **options)
    values = hybrid_loss(student, teacher, **options).loss
    monkeypatch.setattr(config, "resident", lambda *args, **others: None)
    swept = gradient(student, teacher, **options)
    torch.testing.assert_close(resident, swept, rtol=1e-2, atol=1e-6)
    # (Of the statistics alone, which are always swept.)
    with torch.no_grad():
        terms = token_terms(student, teacher, divergence=divergence)
    torch.testing.assert_close(values, terms.divergence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuning", config.CANDIDATES, ids=str)
def test_every_candidate_is_right(tuning, monkeypatch):
    monkeypatch.setattr(config, "tuned", lambda *_: tuning)
    for dtype in (torch.bfloat16, torch.float32):
        case = cases.make(50_257, (2, 40), masked=True, dtype=dtype, device="cuda")
        for divergence in ("reverse_kl", "jsd"):
            assert_matches_reference(case, "triton", divergence=divergence)


@pytest.mark.parametrize("check", hangs.CHECKS)
def test_launches_beside_other_work(check):
    assert hangs.CHECKS[check]("cuda")


@pytest.mark.smoke
def test_results_are_the_same_from_run_to_run():
    student, teacher = logits(700, 128_256)
    first = gradient(student, teacher, divergence="jsd").clone()
    for _ in range(5):
        assert torch.equal(gradient(student, teacher, divergence="jsd"), first)


def test_masked_rows_are_not_read():
    """Half of the rows: half of the time, about. (And zeros, which other tests see.)"""
    student, teacher = logits(4096, 151_936)
    mask = torch.rand(4096, device="cuda") < 0.5

    def median(**options):
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            hybrid_loss(student, teacher, **options)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[10]

    assert median(mask=mask) < 0.85 * median()


@pytest.mark.smoke
def test_which_form_runs():
    student, teacher = logits(4, 151_936)
    constants = ("reverse_kl", 0.0, 1.0, None)
    logits_of = (student.detach()[None], (teacher[None],), (1.0,))
    rows = launchers.Rows(*logits_of, None, None, None, *constants)
    launch = launchers.form(rows)
    assert isinstance(launch, config.Resident)
    assert launch.splits > 1


@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
@pytest.mark.parametrize("kind", ["32", "128", "1024", "two", "three", "two of 128"])
def test_other_teachers_at_full_size(kind, vocabulary, monkeypatch):
    """Both forms, and the torch backend."""
    student, teacher = logits(40, vocabulary)
    others = [teacher, teacher.flip(-1), teacher.roll(7, -1)]
    ids = torch.randint(vocabulary, (40,), device="cuda")
    if kind in ("two", "three"):
        members = others[: 2 if kind == "two" else 3]
        given = Mixture([(1.0 + i, w) for i, w in enumerate(members)])
    else:
        size = int(kind.split()[-1])
        support = teacher.topk(size).indices
        known = [TopK.from_logits(w, ids=support, token_ids=ids) for w in others[:2]]
        known = [TopK(support, k.log_probs, k.token_log_prob) for k in known]
        given = Mixture([(1.0, known[0]), (0.5, known[1])]) if "two" in kind else known[0]
    options = {"token_ids": ids, "advantages": torch.randn(40, device="cuda"), "reduction": "sum"}
    resident = gradient(student, given, **options)
    torch.testing.assert_close(
        resident, gradient(student, given, backend="torch", **options), rtol=1e-2, atol=1e-6
    )
    monkeypatch.setattr(config, "resident", lambda *args, **others: None)
    torch.testing.assert_close(resident, gradient(student, given, **options), rtol=1e-2, atol=1e-6)


# -- sizes ---------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_entries():
    """Offsets are 64 bits wide: the last rows are what they are alone."""
    vocabulary = 151_936
    rows = 2**31 // vocabulary + 8
    student, teacher = (
        torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="cuda").normal_()
        for _ in range(2)
    )
    student.requires_grad_()
    loss = hybrid_loss(student, teacher, reduction="none").loss
    loss.sum().backward()
    tail = student[-4:].detach().clone().requires_grad_()
    alone = hybrid_loss(tail, teacher[-4:].clone(), reduction="none").loss
    alone.sum().backward()
    torch.testing.assert_close(loss[-4:], alone)
    torch.testing.assert_close(student.grad[-4:], tail.grad)


@pytest.mark.smoke
def test_more_than_65535_rows():
    student, teacher = logits(70_000, 1000)
    assert gradient(student, teacher, reduction="sum").isfinite().all()


def test_a_whole_batch_in_half_precision():
    case = cases.make(151_936, (2, 64), layout="sliced", dtype=torch.bfloat16, device="cuda")
    for divergence in cases.DIVERGENCES:
        assert_matches_reference(case, "triton", divergence=divergence)


# -- from hidden states ------------------------------------------------------------------------


def linear(rows, vocabulary, width, dtype):
    options = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(0)}
    hidden, theirs = torch.randn(2, rows, width, **options).to(dtype).unbind()
    weight = (2 / width**0.5) * torch.randn(vocabulary, width, **options)
    other = weight + 0.2 / width**0.5 * torch.randn(weight.shape, **options)
    leaves = (hidden.clone().requires_grad_(), weight.to(dtype).requires_grad_())
    return (*leaves, LinearTeacher(theirs.clone(), other.to(dtype)))


@pytest.mark.parametrize("chunk_rows", [None, 200, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [50_257, 151_936])
def test_linear_equals_fp32_logits(vocabulary, dtype, chunk_rows):
    """16-bit factors, fp32 sums: against the same in fp32, with dz rounded once."""
    hidden, weight, teacher = linear(700, vocabulary, 512, dtype)
    ids = torch.randint(0, vocabulary, (700,), device="cuda")
    advantages = torch.randn(700, device="cuda")
    got = linear_hybrid_loss(
        hidden, weight, teacher, ids, advantages, chunk_rows=chunk_rows, reduction="sum"
    )
    got.loss.backward()
    leaves = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    theirs = teacher.hidden.float() @ teacher.weight.float().T
    expected = hybrid_loss(leaves[0] @ leaves[1].T, theirs, ids, advantages, reduction="sum")
    expected.loss.backward()
    torch.testing.assert_close(got.divergence, expected.divergence, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    allowed = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for own, plain in zip((hidden, weight), leaves, strict=True):
        assert (own.grad - plain.grad).norm() < allowed * plain.grad.norm()


@pytest.mark.smoke
def test_linear_memory():
    """The budget of 2 GiB, the fp32 sum of dW, and the gradients."""
    hidden, weight, teacher = linear(8192, 151_936, 1024, torch.bfloat16)

    def forward():
        return linear_hybrid_loss(hidden, weight, teacher).loss

    forward()
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
def test_linear_waits_for_nothing_that_it_need_not():
    hidden, weight, teacher = linear(256, 32_000, 256, torch.bfloat16)
    mask = torch.arange(256, device="cuda") % 3 > 0
    count, upstream = mask.sum(), torch.full((), 1.7, device="cuda")
    own = linear_hybrid_loss(hidden, weight, teacher, mask=mask, num_tokens=count).loss
    own.backward(upstream)
    expected, hidden.grad = hidden.grad.clone(), None
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_hybrid_loss(
            hidden, weight, teacher, mask=mask, num_tokens=count, drop_masked=False
        ).loss.backward(upstream)
        terms = linear_token_terms(hidden.detach(), weight, teacher)
        terms.divergence.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-2, atol=1e-5)


def test_linear_rows_do_not_depend_on_the_chunk():
    hidden, weight, teacher = linear(1000, 50_257, 256, torch.bfloat16)
    gradients = []
    for chunk_rows in (1000, 256, 96):
        hidden.grad = None
        linear_hybrid_loss(
            hidden, weight, teacher, chunk_rows=chunk_rows, reduction="sum"
        ).loss.backward()
        gradients.append(hidden.grad)
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 4e-3 * gradients[0].norm()
