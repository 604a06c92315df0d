"""The inputs of the tests, from one factory, and the ways to run a function on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import Divergence, Mixture, TopK
from hybrid_kernels.types import Teacher

VOCABULARIES = (1, 7, 127, 128, 1000, 50257, 151936)
STYLES = ("typical", "close", "offset", "one_hot", "ties", "forbidden_by_student")
LAYOUTS = ("contiguous", "sliced", "expanded", "one_row")

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


class Outcome(NamedTuple):
    """What a function returned, and the gradient of what `student` stores."""

    result: Any
    gradient: Tensor


@dataclass
class Case:
    """One problem. `view` makes logits `[..., V]` of what `student` and `teacher` store; a teacher
    that is `given` takes the place of the latter.

    `upstream` is a random gradient per row, used where the loss is per row; `scalar_upstream` the
    one of a scalar loss. Advantages and upstream are NaN on masked rows.
    """

    student: Tensor
    teacher: Tensor | None
    token_ids: Tensor
    advantages: Tensor
    mask: Tensor | None
    upstream: Tensor
    view: Callable[[Tensor], Tensor]
    scalar_upstream: float = -1.7
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

    @property
    def valid(self) -> Tensor:
        named = self.token_ids != -100
        return named if self.mask is None else named & self.mask

    def hybrid_loss(
        self,
        function: Callable = hybrid_kernels.hybrid_loss,
        dtype: torch.dtype | None = None,
        **options,
    ) -> Outcome:
        """The outcome of `function`, with the student in `dtype` (default: its own)."""
        leaf, logits = self._leaf(dtype)
        advantages = options.pop("advantages", self.advantages)
        result = function(
            logits, self.any_teacher, self.token_ids, advantages, mask=self.mask, **options
        )
        per_row = options.get("reduction") == "none"
        upstream = self.upstream if per_row else torch.full_like(result.loss, self.scalar_upstream)
        result.loss.backward(upstream.to(result.loss))
        return Outcome(result._replace(loss=result.loss.detach()), leaf.grad)

    def token_terms(
        self,
        function: Callable = hybrid_kernels.token_terms,
        dtype: torch.dtype | None = None,
        **options,
    ) -> Outcome:
        """As `hybrid_loss`, with an upstream gradient into every differentiable field at once."""
        leaf, logits = self._leaf(dtype)
        terms = function(logits, self.any_teacher, self.token_ids, mask=self.mask, **options)
        fields = [terms.divergence, terms.log_prob, terms.entropy]
        upstreams = [self.upstream, 1 - self.upstream, 0.5 * self.upstream]
        pairs = [(f, u.to(f)) for f, u in zip(fields, upstreams, strict=True) if f is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return Outcome(type(terms)(*(None if t is None else t.detach() for t in terms)), leaf.grad)

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
    with), "ties" (few distinct values), "forbidden_by_student" (-inf, on the teacher's side too at
    some of these entries).

    Layouts: "contiguous"; "sliced", `[:, :-1, :V]` of a larger tensor that is NaN elsewhere, which
    has two row strides; "expanded", one row seen many times; "one_row", a single `[V]`.

    `masked`: some rows are masked by `mask`, others by the id -100; they hold NaN and infinities.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if layout == "one_row":
        rows = ()
    stored_rows = rows if layout != "expanded" else (1,) * len(rows)
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
        flat = torch.arange(token_ids.numel()).view(rows)
        mask = flat % 4 != 1
        token_ids = token_ids.masked_fill(flat % 5 == 2, -100).masked_fill(~mask, 10**9)
        hidden = ~mask | (token_ids == -100)
        student[hidden] = torch.nan
        teacher[hidden] = torch.inf
        advantages[hidden] = torch.nan
        upstream[hidden] = torch.nan
    student, teacher = student.to(dtype), teacher.to(teacher_dtype or dtype)

    def view(stored: Tensor) -> Tensor:
        if layout == "sliced":
            return stored[:, :-1, :vocabulary]
        return stored.expand(*rows, vocabulary)

    if layout == "sliced":
        student, teacher = _padded(student), _padded(teacher)
    tensors = (student, teacher, token_ids, advantages, mask, upstream)
    return Case(*(None if t is None else t.to(device) for t in tensors), view=view)


def with_teachers(case: Case, members: int, support: str | None, temperature: float = 1.0) -> Case:
    """The case with several weighted teachers, or with one known on a support.

    Supports: None for full teachers; "teacher", "student" (the best 5 entries of one side) and
    "union" (of both, with repetitions and padding). Garbage stands on masked rows.
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
        known = {"token_ids": tokens, "temperature": temperature}
        teachers = [TopK.from_logits(w, ids=ids, **known) for w in teachers]
        ids = teachers[0].ids.masked_fill(~case.valid[..., None], 10**9)
        teachers = [TopK(ids, t.log_probs, t.token_log_prob) for t in teachers]
    weights = [0.8 + 0.5 * i for i in range(members)]
    mixture = Mixture(list(zip(weights, teachers, strict=True)))
    return replace(case, given=teachers[0] if members == 1 else mixture)


def _padded(logits: Tensor) -> Tensor:
    batch, time, vocabulary = logits.shape
    padded = logits.new_full((batch, time + 1, vocabulary + 5), torch.nan)
    padded[:, :-1, :vocabulary] = logits
    return padded
