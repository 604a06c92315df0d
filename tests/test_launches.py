"""Everything that the public functions would launch on a GPU compiles.

The launchers are the real ones. Tensors have no values (`bench/standin.py`), but Triton specialises
kernels by their shapes, strides and dtypes, and by missing arguments, as on a GPU. CI also runs
this file on the oldest Triton that the package allows.
"""

from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton's compiler")

import triton
import triton.language as tl

from bench import standin
from hybrid_kernels import (
    LinearTeacher,
    Mixture,
    TopK,
    available_divergences,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    token_terms,
    triton_backend,
)
from hybrid_kernels.rows import Rows
from hybrid_kernels.triton_backend import launch, plan

pytestmark = pytest.mark.skipif(
    plan.INTERPRETED, reason="compiles ahead of time, which TRITON_INTERPRET=1 turns off"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


class Given:
    """The arguments of a loss: logits of both models, sampled tokens, advantages."""

    def __init__(self, *rows, vocabulary=10_000, dtype=BF16, teacher_dtype=None):
        shape = (*rows, vocabulary)
        self.student = meta(*shape, dtype=dtype).requires_grad_()
        self.teacher = meta(*shape, dtype=teacher_dtype or dtype)
        self.ids, self.advantages = meta(*rows, dtype=torch.int64), meta(*rows)

    def loss(self, teacher="logits", advantages="tensor", logits=None, **options):
        """A loss with all terms, forward and backward."""
        teacher = self.teacher if isinstance(teacher, str) else teacher
        advantages = self.advantages if isinstance(advantages, str) else advantages
        student = self.student if logits is None else logits
        options = {"entropy_weight": 0.1, **options}
        result = hybrid_loss(student, teacher, self.ids, advantages, **options)
        result.loss.sum().backward()

    def top_k(self, size):
        return TopK.from_logits(self.teacher, size, token_ids=self.ids)

    def two(self, *teachers):
        return Mixture([(1.0, teachers[0]), (0.5, teachers[1])])


def token_terms_of(given):
    terms = token_terms(given.student, given.teacher, given.ids)
    (terms.divergence + terms.log_prob + terms.entropy).sum().backward()


def entropy_alone(given):
    token_terms(given.student).entropy.sum().backward()


@torch.no_grad()
def scoring(given):
    token_terms(given.student, given.teacher, given.ids, divergence="jsd")


def distillation_alone(given):
    hybrid_loss(given.student, given.teacher).loss.backward()


def sliced(given):
    """Rows of a larger tensor, which have two strides and are not aligned."""
    view = (slice(None), slice(None, -1), slice(None, 50_257))
    given.ids, given.advantages = (t[:, :-1] for t in (given.ids, given.advantages))
    given.loss(given.teacher[view], logits=given.student[view])


def part_of_the_vocabulary(divergence):
    def run(given):
        logits = given.student.detach()[None]
        rows = Rows(
            logits, (given.teacher[None],), (1.0,), token_ids=given.ids, divergence=divergence
        )
        launch.row_values(rows, rows.statistics(), meta(3, rows.total))

    return run


def linear(dtype, **options):
    def run(_):
        hidden, weight = meta(64, 256, dtype=dtype), meta(32_000, 256, dtype=dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        teacher = LinearTeacher(meta(64, 128, dtype=dtype), meta(32_000, 128, dtype=dtype))
        ids, advantages = meta(64, dtype=torch.int64), meta(64)
        result = linear_hybrid_loss(*leaves, teacher, ids, advantages, **options)
        result.loss.backward()
        linear_token_terms(*leaves, teacher).divergence.sum().backward()

    return run


LAUNCHES = {
    "everything": (Given(8192, vocabulary=151_936), Given.loss),
    "distillation alone": (Given(8192), distillation_alone),
    "no teacher": (Given(8192), lambda g: g.loss(None, dense_weight=0.0)),
    "a teacher of weight 0": (Given(8192), lambda g: g.loss(dense_weight=0.0)),
    "weights per row": (Given(8192), lambda g: g.loss(dense_weight=meta(8192))),
    "a loss per row": (Given(8192), lambda g: g.loss(reduction="none")),
    "masked": (Given(8192), lambda g: g.loss(mask=meta(8192, dtype=torch.bool))),
    "in place": (Given(8192), lambda g: g.loss(logits=g.student.clone(), inplace=True)),
    "a floor": (Given(8192), lambda g: g.loss(teacher_floor=-20.0)),
    "advantages of the statistics": (Given(8192), lambda g: g.loss(advantages=lambda t: t.entropy)),
    "one row": (Given(1), Given.loss),
    "one row, not aligned": (Given(1, vocabulary=50_257), Given.loss),
    "a few rows": (Given(3, 5), Given.loss),
    "rows that are not aligned": (Given(3, 7, vocabulary=50_257), Given.loss),
    "rows of a larger tensor": (Given(2, 6, vocabulary=50_262), sliced),
    "a row in one program": (Given(8192, vocabulary=1000), Given.loss),
    "a single entry": (Given(7, vocabulary=1), Given.loss),
    "fp32": (Given(700, dtype=FP32), Given.loss),
    "fp16": (Given(700, dtype=FP16), Given.loss),
    "two dtypes": (Given(700, teacher_dtype=FP32), Given.loss),
    "top-K": (Given(8192, vocabulary=151_936), lambda g: g.loss(g.top_k(32))),
    "top-K, not aligned": (Given(3, 5, vocabulary=50_257), lambda g: g.loss(g.top_k(100))),
    "top-K, renormalized": (Given(700), lambda g: g.loss(g.top_k(64), tail="renormalize")),
    "top-K, jsd": (Given(700), lambda g: g.loss(g.top_k(64), divergence="jsd")),
    "two teachers": (Given(700), lambda g: g.loss(g.two(g.teacher, g.teacher))),
    "token_terms": (Given(8192), token_terms_of),
    "token_terms, top-K": (
        Given(700),
        lambda g: g.loss(g.top_k(32), advantages=lambda t: t.entropy),
    ),
    "token_terms, entropy alone": (Given(8192), entropy_alone),
    "scoring": (Given(8192), scoring),
    "from hidden states": (None, linear(BF16)),
    "from hidden states, fp16, chunks": (None, linear(FP16, chunk_rows=16)),
    "a part of the vocabulary": (Given(700), part_of_the_vocabulary("reverse_kl")),
    "a part of the vocabulary, jsd": (Given(700), part_of_the_vocabulary("jsd")),
    **{
        name: (Given(700), lambda g, name=name: g.loss(divergence=name))
        for name in available_divergences()
        if name != "reverse_kl"
    },
}


# Cases whose kernels differ in one argument from those of another case.
ALIKE = (
    "a teacher of weight 0",
    "weights per row",
    "a loss per row",
    "advantages of the statistics",
    "one row, not aligned",
    "a few rows",
    "two dtypes",
    "top-K, not aligned",
    "top-K, jsd",
    "token_terms, top-K",
    "token_terms, entropy alone",
    "from hidden states, fp16, chunks",
    "a part of the vocabulary",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name in ALIKE)) for name in LAUNCHES],
)
def test_compiles_what_is_launched(name, monkeypatch):
    given, run = LAUNCHES[name]
    if given is None or given.student.shape[-1] < 100_000:
        # Slices of two tiles compile in half the time of those of eight that ship.
        for itemsize, tuning in plan.DEFAULT_TUNING.items():
            monkeypatch.setitem(plan.DEFAULT_TUNING, itemsize, tuning._replace(tiles=2))
    with standin.gpu("sm_90") as gpu:
        run(given)
    assert gpu.launches


def test_the_stand_in_leaves_everything_as_it_was():
    logits = torch.randn(2, 9, requires_grad=True)
    with standin.gpu(compiles=False) as gpu:
        pass
    hybrid_loss(logits, torch.randn(2, 9)).loss.backward()
    assert gpu.launches == 0
    assert logits.grad.isfinite().all()
    assert not meta(2, 9).requires_grad
    with pytest.raises(ValueError, match="backend"):
        hybrid_loss(meta(2, 9), meta(2, 9), backend="triton")


@pytest.fixture
def reason():
    return launch.REFUSALS[0]


@pytest.fixture
def launched(reason, monkeypatch):
    """The forms that are launched on a device that refuses cooperative launches."""
    names = []

    def run(kernel, *_, **options):
        if (name := kernel.fn.__name__) in ("resident_kernel", "sweep_kernel"):
            names.append(name)
        if "launch_cooperative_grid" in options:
            raise RuntimeError(f"Triton Error [CUDA]: {reason}")

    monkeypatch.setattr(launch, "_refusing", set())
    # The stand-in patches `run`, too, so this patch must be undone first.
    with standin.gpu(compiles=False), mock.patch.object(triton.JITFunction, "run", run):
        yield names


def test_what_is_refused_is_swept(reason, launched):
    """One warning says so, and later long rows are swept without asking the device."""
    with pytest.warns(RuntimeWarning, match=f"refused.*{reason}"):
        distillation_alone(Given(64))
    distillation_alone(Given(64))  # a second warning would be an error
    Given(64).loss(Given(64).top_k(32))
    Given(64, vocabulary=1000).loss()
    # The last call has one program per row, which is not refused; the rows it declines are swept.
    assert launched == ["resident_kernel", *["sweep_kernel"] * 3, "resident_kernel", "sweep_kernel"]


def test_where_warnings_are_errors_nothing_is_swept(launched):
    """Else the sweeping form would be timed or tested in place of the other."""
    for _ in range(2):
        with pytest.raises(RuntimeWarning, match="refused"):
            distillation_alone(Given(64))
    assert launched == ["resident_kernel"] * 2


@pytest.mark.parametrize("reason", ["out of memory", "operation not supported on shared memory"])
def test_another_error_is_no_refusal(reason, launched):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=reason):
            distillation_alone(Given(64))
    assert launched == ["resident_kernel"] * 2


def test_a_kernel_that_does_not_compile_is_an_error(monkeypatch):
    """This shows that the tests above can fail."""
    monkeypatch.setattr(plan, "sweep", lambda *_, **__: plan.Sweep(block_v=3, num_warps=1))
    with standin.gpu("sm_90"), pytest.raises(triton.CompilationError):
        scoring(Given(2, vocabulary=1000))


def test_no_field_is_hidden_by_what_a_tuple_has_in_triton():
    """A kernel would find the tuple's attribute, where the interpreter finds the field."""
    attributes = set(vars(tl.tuple([])))
    classes = [
        value
        for path in Path(triton_backend.__file__).parent.glob("*.py")
        for value in vars(import_module(f"{triton_backend.__name__}.{path.stem}")).values()
        if isinstance(value, type) and hasattr(value, "_fields")
    ]
    assert attributes
    assert classes
    assert not [f"{c.__name__}.{name}" for c in classes for name in attributes & set(c._fields)]
