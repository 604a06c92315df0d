"""The inputs of the tests, from one factory, and the ways to run a function on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import Divergence, LinearTeacher, Mixture, TopK, reference
from hybrid_kernels.call import Comparison, Context, LogitCall
from hybrid_kernels.rows import Rows
from hybrid_kernels.types import Teacher

VOCABULARIES = (1, 7, 127, 128, 1000, 50257, 151936)
STYLES = ("typical", "close", "offset", "one_hot", "ties", "forbidden_by_student")
LAYOUTS = ("contiguous", "sliced", "expanded", "one_row")
LINEAR_TEACHERS = ("linear", "logits", "two-strides", "top-k", "mixture", "mixed")
# `forbidding` replaces LOWEST by the lowest number of a dtype; other logits are within ±SPREAD.
LOWEST, SPREAD = "lowest", 9.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_PARAMETERS = {
    "jsd": [{"beta": 0.3}],
    "skew_reverse_kl": [{"alpha": 0.3}],
    "skew_forward_kl": [{"alpha": 0.3}],
    "alpha": [{"alpha": 0.3}, {"alpha": 1.7}],
    "renyi": [{"alpha": 0.3}, {"alpha": 1.7}],
}
DIVERGENCES = [
    Divergence(name, **parameters)
    for name in hybrid_kernels.available_divergences()
    for parameters in _PARAMETERS.get(name, [{}])
]


def divergence_id(divergence: Divergence) -> str:
    return divergence.name + "".join(f"-{value}" for value in divergence.params.values())


# These share their arithmetic with another parameter or divergence.
_TWINS = ("skew_forward_kl-0.3", "alpha-0.3", "renyi-0.3")
every_divergence = pytest.mark.parametrize(
    "divergence",
    [pytest.param(d, marks=[pytest.mark.twin] * (divergence_id(d) in _TWINS)) for d in DIVERGENCES],
    ids=divergence_id,
)


class Outcome(NamedTuple):
    """The result of a function, and the gradient of the tensor `student`."""

    result: Any
    gradient: Tensor


@dataclass(kw_only=True)
class Tokens:
    """The inputs that each token has, and the ways to run a function on them.

    `upstream` is the random upstream gradient of a loss per row, `scalar_upstream` that of a scalar
    loss. Advantages and `upstream` are NaN on masked rows.
    """

    token_ids: Tensor
    advantages: Tensor
    mask: Tensor | None
    upstream: Tensor
    scalar_upstream: float = -1.7

    @property
    def valid(self) -> Tensor:
        has_id = self.token_ids != -100
        return has_id if self.mask is None else has_id & self.mask.bool()

    def _hybrid_loss(self, function: Callable, *sides: Any, **options) -> Any:
        """Returns the result of `function` after its backward."""
        advantages = options.pop("advantages", self.advantages)
        result = function(*sides, self.token_ids, advantages, mask=self.mask, **options)
        per_row = options.get("reduction") == "none"
        upstream = self.upstream if per_row else torch.full_like(result.loss, self.scalar_upstream)
        result.loss.backward(upstream.to(result.loss))
        return result._replace(loss=result.loss.detach())

    def _token_terms(self, function: Callable, *sides: Any, **options) -> Any:
        """As `_hybrid_loss`, with an upstream gradient into every differentiable field at once."""
        terms = function(*sides, self.token_ids, mask=self.mask, **options)
        fields = [terms.divergence, terms.log_prob, terms.entropy]
        upstreams = [self.upstream, 1 - self.upstream, 0.5 * self.upstream]
        pairs = [(f, u.to(f)) for f, u in zip(fields, upstreams, strict=True) if f is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return type(terms)(*(None if t is None else t.detach() for t in terms))


@dataclass(kw_only=True)
class Case(Tokens):
    """The inputs of a loss. `view` makes logits `[..., V]` of the tensors `student` and `teacher`;
    `given`, if there is one, is the teacher instead."""

    student: Tensor
    teacher: Tensor | None
    view: Callable[[Tensor], Tensor]
    given: Teacher | None = None

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    @property
    def logits(self) -> Tensor:
        return self.view(self.student)

    @property
    def teacher_logits(self) -> Tensor | None:
        return None if self.teacher is None else self.view(self.teacher)

    @property
    def any_teacher(self) -> Teacher | None:
        return self.teacher_logits if self.given is None else self.given

    def hybrid_loss(
        self,
        function: Callable = hybrid_kernels.hybrid_loss,
        dtype: torch.dtype | None = None,
        **options,
    ) -> Outcome:
        """The outcome of `function`, with the student in `dtype` (default: its own)."""
        leaf, logits = self._leaf(dtype)
        return Outcome(self._hybrid_loss(function, logits, self.any_teacher, **options), leaf.grad)

    def token_terms(
        self,
        function: Callable = hybrid_kernels.token_terms,
        dtype: torch.dtype | None = None,
        **options,
    ) -> Outcome:
        """As `hybrid_loss`, with an upstream gradient into every differentiable field at once."""
        leaf, logits = self._leaf(dtype)
        return Outcome(self._token_terms(function, logits, self.any_teacher, **options), leaf.grad)

    def _leaf(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        leaf = self.student.detach().to(dtype or self.student.dtype, copy=True).requires_grad_()
        return leaf, self.view(leaf.clone())  # never a leaf, so that inplace is allowed


def make(
    vocabulary: int = 127,
    rows: tuple[int, ...] = (2, 5),
    *,
    style: str = "typical",
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    masked: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Random logits of a style, stored in a layout.

    Styles: "typical" (standard deviations of 3 nats, and of 1 between the models), "close" (1e-4
    between them), "offset" (1e4 on the student, -1e4 on the teacher), "one_hot" (one entry with all
    but 1e-3 of the mass; with much less left, float64 itself would lose the digits to compare
    with), "ties" (few distinct values), "forbidden_by_student" (-inf, at some of these entries on
    the teacher's side, too).

    Layouts: "contiguous"; "sliced", `[:, :-1, :V]` of a larger tensor that is NaN elsewhere, which
    has two row strides; "expanded", one row repeated without a copy, and "expanded_batch" and
    "expanded_time", along one dimension alone; "one_row", a single `[V]`.

    `masked`: some rows are masked by `mask`, others by the id -100; they hold NaN and infinities.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if layout == "one_row":
        rows = ()
    expanded = {"expanded_batch": (1, *rows[1:]), "expanded_time": (*rows[:-1], 1)}
    stored_rows = (1,) * len(rows) if layout == "expanded" else expanded.get(layout, rows)
    student = 3 * normal(*stored_rows, vocabulary)
    teacher = student + normal(*stored_rows, vocabulary)
    token_ids = torch.randint(0, vocabulary, rows, generator=generator)
    if style == "close":
        teacher = student + 1e-4 * normal(*stored_rows, vocabulary)
    elif style == "offset":
        student, teacher = student + 1e4, teacher - 1e4
    elif style == "one_hot":
        student[..., vocabulary // 2] = student.logsumexp(-1) + 7
        teacher[..., vocabulary // 2] = teacher.logsumexp(-1) + 6
    elif style == "ties":
        student, teacher = student.round(), teacher.round()
    elif style == "forbidden_by_student":
        forbidden = torch.rand(student.shape, generator=generator) < 0.3
        forbidden[..., 0] = False
        student = student.masked_fill(forbidden, -torch.inf)
        teacher = teacher.masked_fill(forbidden & (normal(*teacher.shape) > 0), -torch.inf)
        token_ids = student.isfinite().float().argmax(-1).expand(rows).contiguous()
    advantages, upstream = normal(*rows), normal(*rows)
    mask = None
    if masked:
        token_ids, mask, masked_rows = _masked(token_ids)
        teacher[masked_rows] = torch.inf
        for tensor in (student, advantages, upstream):
            tensor[masked_rows] = torch.nan
    student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)

    def view(stored: Tensor) -> Tensor:
        if layout == "sliced":
            return stored[:, :-1, :vocabulary]
        return stored.expand(*rows, vocabulary)

    if layout == "sliced":
        student, teacher = _padded(student), _padded(teacher)
    return Case(
        student=student.to(device),
        teacher=teacher.to(device),
        view=view,
        token_ids=token_ids.to(device),
        advantages=advantages.to(device),
        mask=None if mask is None else mask.to(device),
        upstream=upstream.to(device),
    )


def forbidding(
    masks: Sequence[tuple[float | str | None, float | str | None]],
    dtype: torch.dtype,
    vocabulary: int,
    seed: int,
    share: float = 0.2,
) -> Case:
    """One row for each pair of values with which the student and the teacher forbid tokens: a
    number, `LOWEST`, or None to forbid none. Each side forbids tokens of its own, never the first.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(masks), vocabulary)
    sides = torch.randn(2, *shape, generator=generator).mul(3).clamp(-SPREAD, SPREAD).to(dtype)
    hidden = torch.rand(2, *shape, generator=generator) < share
    hidden[:, :, 0] = False
    lowest = torch.finfo(dtype).min
    for row, pair in enumerate(masks):
        for side, mask in enumerate(pair):
            if mask is not None:
                finite = mask != -torch.inf
                value = max(lowest, lowest if mask == LOWEST else mask) if finite else mask
                sides[side, row, hidden[side, row]] = value
    tokens = torch.randint(0, vocabulary, (len(masks),), generator=generator)
    is_hidden = hidden[0].gather(1, tokens[:, None])[:, 0]
    return Case(
        student=sides[0],
        teacher=sides[1],
        view=lambda stored: stored,
        token_ids=tokens.masked_fill(is_hidden, 0),
        advantages=torch.randn(len(masks), generator=generator),
        mask=None,
        upstream=torch.rand(len(masks), generator=generator) + 0.5,
    )


def with_teachers(case: Case, members: int, support: str | None, temperature: float = 1.0) -> Case:
    """The case with several weighted teachers, or with one known on a support.

    Supports: None for full teachers; "teacher", "student" (the best 5 entries of one side) and
    "union" (of both, with repetitions and padding). Ids of masked rows are invalid.
    """
    generator = torch.Generator().manual_seed(members)
    logits, device = case.teacher_logits, case.student.device
    assert logits is not None
    noise = [torch.randn(logits.shape, generator=generator).to(device) for _ in range(members)]
    noise[0] *= 0
    teachers: list[Any] = [(logits + step).to(logits.dtype) for step in noise]
    if support is not None:
        best = min(5, case.vocabulary)
        ids = {
            "teacher": logits.topk(best).indices,
            "student": case.logits.topk(best).indices,
            "union": torch.cat(
                [case.logits.topk(best).indices, logits.topk(best).indices[..., :3]], -1
            ),
        }[support]
        if support == "union":
            ids[..., 1] = -1
        tokens = torch.where(case.valid, case.token_ids, 0)
        options = {"token_ids": tokens, "temperature": temperature}
        teachers = [TopK.from_logits(t, ids=ids, **options) for t in teachers]
        ids = teachers[0].ids.masked_fill(~case.valid[..., None], 10**9)
        teachers = [TopK(ids, t.log_probs, t.token_log_prob) for t in teachers]
    weights = [0.8 + 0.5 * i for i in range(members)]
    mixture = Mixture(list(zip(weights, teachers, strict=True)))
    return replace(case, given=teachers[0] if members == 1 else mixture)


def rows_of(
    case: Case,
    backend: str,
    *,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    tail: str = "bucket",
    process_group: object | None = None,
) -> Rows:
    """The arguments of the operators for a case."""
    comparison = Comparison(case.any_teacher, divergence, temperature, tail, None)
    context = Context(case.token_ids, case.mask, process_group, backend)
    return LogitCall(case.logits, comparison, context).rows


def in_runs(values: Tensor, count: int) -> Tensor:
    """`[N]`: each of `[R]` values, repeated for N/R consecutive rows."""
    return values[torch.arange(count, device=values.device) * len(values) // count]


def _padded(logits: Tensor) -> Tensor:
    batch, time, vocabulary = logits.shape
    padded = logits.new_full((batch, time + 1, vocabulary + 5), torch.nan)
    padded[:, :-1, :vocabulary] = logits
    return padded


def _masked(token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and a mask, each of which masks some rows; and which rows are masked."""
    index = torch.arange(token_ids.numel()).view(token_ids.shape)
    mask = index % 4 != 1
    token_ids = token_ids.masked_fill(index % 5 == 2, -100).masked_fill(~mask, 10**9)
    return token_ids, mask, ~mask | (token_ids == -100)


# -- from hidden states ---------------------------------------------------------------------------


@dataclass
class Head:
    """An output layer: logits from hidden states, in any dtype."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        logits = hidden.to(dtype) @ self.weight.to(dtype).T
        logits = logits if self.bias is None else logits + self.bias.to(dtype)
        logits = self.logit_scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(kw_only=True)
class LinearCase(Tokens):
    """A student and a teacher given by hidden states `[..., D]`, NaN on masked rows. `teacher` is
    one of `LINEAR_TEACHERS`."""

    hidden: Tensor
    head: Head
    teacher_hidden: Tensor
    teacher_head: Head
    teacher: str
    fixed: object = None  # if not None, the teacher for every dtype

    def given(self, dtype: torch.dtype | None):
        """The teacher: logits in `dtype` for the reference, or for None what our functions take."""
        if self.fixed is not None:
            return self.fixed
        head = self.teacher_head
        logits = head.logits(self.teacher_hidden, dtype or torch.float32)
        flipped = head.logits(self.teacher_hidden.flip(-1), dtype or torch.float32)
        if dtype is None and self.teacher in ("linear", "mixture", "mixed"):
            full = LinearTeacher(
                self.teacher_hidden, head.weight, head.bias, head.softcap, head.logit_scale
            )
        else:
            full = logits
        if self.teacher == "mixture":
            if isinstance(full, LinearTeacher):
                flipped = replace(full, hidden=full.hidden.flip(-1))
            return Mixture([(0.8, full), (0.5, flipped)])
        if self.teacher == "mixed":
            return Mixture([(0.8, logits.flip(-1)), (0.5, full)])
        if self.teacher == "two-strides" and dtype is None:
            return torch.cat([logits, logits[:, :1]], 1)[:, :-1]
        if self.teacher == "top-k":
            tokens = self.token_ids.clamp(0, logits.shape[-1] - 1)
            # The ids must be the same in every dtype.
            ids = head.logits(self.teacher_hidden, torch.float64).topk(min(5, logits.shape[-1]))
            return TopK.from_logits(logits.float(), ids=ids.indices, token_ids=tokens)
        return full

    def leaves(self, dtype: torch.dtype | None) -> list[Tensor]:
        tensors = [self.hidden, *self.head.tensors]
        return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]

    def reference(self, dtype: torch.dtype, method: str = "hybrid_loss", **options):
        """The fields, and the gradients of hidden states, weight and bias."""
        hidden, weight, *bias = leaves = self.leaves(dtype)
        head = replace(self.head, weight=weight, bias=bias[0] if bias else None)
        # A GEMM would spread the NaN of masked rows over the weight's gradient.
        logits = head.logits(torch.where(self.valid[..., None], hidden, 0.0), dtype)
        run, function = getattr(self, f"_{method}"), getattr(reference, method)
        result = run(function, logits, self.given(dtype), **options)
        return result, [leaf.grad for leaf in leaves]

    def ours(self, method: str = "hybrid_loss", **options) -> tuple[Any, list[Tensor]]:
        hidden, weight, *bias = leaves = self.leaves(None)
        run, function = getattr(self, f"_{method}"), getattr(hybrid_kernels, f"linear_{method}")
        options |= {"softcap": self.head.softcap, "logit_scale": self.head.logit_scale}
        options |= {"student_bias": bias[0] if bias else None}
        result = run(function, hidden, weight, self.given(None), **options)
        return result, [leaf.grad for leaf in leaves]


def make_linear(
    vocabulary: int = 131,
    size: int = 24,
    rows: tuple[int, ...] = (2, 5),
    *,
    dtype: torch.dtype = torch.float32,
    teacher: str = "linear",
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    masked: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> LinearCase:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def head(width: int, scale: float, cap: float | None) -> Head:
        weight = (normal(vocabulary, width) * 2 / width**0.5).to(dtype).to(device)
        offsets = normal(vocabulary).to(dtype).to(device) if bias else None
        return Head(weight, offsets, cap, scale)

    hidden, teacher_hidden = normal(*rows, size).to(dtype), normal(*rows, size + 3).to(dtype)
    token_ids = torch.randint(0, vocabulary, rows, generator=generator)
    advantages, upstream = normal(*rows), normal(*rows)
    mask = None
    if masked:
        token_ids, mask, masked_rows = _masked(token_ids)
        for tensor in (hidden, teacher_hidden, advantages, upstream):
            tensor[masked_rows] = torch.nan
    # The teacher has a scale and a softcap of its own, so that a mix-up of the two would show.
    return LinearCase(
        hidden=hidden.to(device),
        head=head(size, logit_scale, softcap),
        teacher_hidden=teacher_hidden.to(device),
        teacher_head=head(size + 3, 1.3 * logit_scale, None if softcap is None else 1.5 * softcap),
        teacher=teacher,
        token_ids=token_ids.to(device),
        advantages=advantages.to(device),
        mask=None if mask is None else mask.to(device),
        upstream=upstream.to(device),
    )
