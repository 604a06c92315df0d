"""The problem of the operators on hidden states: rows, output layers, and how rows are chunked."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.linear.heads import Head
from hybrid_kernels.rows import Rows, unflatten

# The fields of `Heads` and `Chunking` as the operators declare them.
HEADS = (
    "Tensor[] adapter_hiddens, Tensor[] weights, Tensor? bias, Tensor?[] teacher_weights, "
    "Tensor?[] teacher_biases, float[] logit_scales, float[] softcaps"
)
CHUNKING = "int? chunk_rows, ScalarType logits_dtype, float grad_filter, bool drop_masked"


class Heads(NamedTuple):
    """The output layers of a call.

    Attributes:
        adapter_hiddens: the student's hidden states of all but the first product (`heads.Head`),
            `[N, r]` each.
        weights, bias: the student's.
        teacher_weights, teacher_biases: of each member; None for one given by logits.
        logit_scales, softcaps: the student's, then those of each member.
    """

    adapter_hiddens: Sequence[Tensor]
    weights: Sequence[Tensor]
    bias: Tensor | None
    teacher_weights: Sequence[Tensor | None]
    teacher_biases: Sequence[Tensor | None]
    logit_scales: Sequence[float]
    softcaps: Sequence[float]

    @classmethod
    def of(cls, student: Head, members: Sequence[Any]) -> "Heads":
        """From the student's output layer and the teachers, some of which may be a `Head`."""
        sides = [member if isinstance(member, Head) else None for member in (student, *members)]
        teachers = sides[1:]
        return cls(
            student.hiddens[1:],
            student.weights,
            student.bias,
            [None if head is None else head.weights[0] for head in teachers],
            [None if head is None else head.bias for head in teachers],
            [1.0 if head is None else head.logit_scale for head in sides],
            [0.0 if head is None else head.softcap for head in sides],
        )


class Chunking(NamedTuple):
    """How rows are taken in chunks; see the arguments of `linear_hybrid_loss`."""

    chunk_rows: int | None
    logits_dtype: torch.dtype
    grad_filter: float
    drop_masked: bool


class LinearRows(NamedTuple):
    """A problem whose student is given by hidden states, and whose teachers may be.

    Attributes:
        rows: here `student` are hidden states `[1, N, D]`, and a teacher may be `[N, D_t]`.
        heads: the output layers.
        chunking: how its rows are taken in chunks.
    """

    rows: Rows
    heads: Heads
    chunking: Chunking

    @classmethod
    def of(cls, fields: Iterable) -> "LinearRows":
        """From the arguments of an operator."""
        return cls(*unflatten(fields, Rows, Heads, Chunking))

    def flat(self) -> tuple:
        """As the arguments of an operator."""
        return (*self.rows, *self.heads, *self.chunking)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The student's tensors: hidden states and weights of each product, bias."""
        heads = self.heads
        return (self.rows.student, *heads.adapter_hiddens, *heads.weights, heads.bias)

    def student(self) -> Head:
        heads = self.heads
        hiddens = [self.rows.student[0], *heads.adapter_hiddens]
        return Head(hiddens, heads.weights, heads.bias, heads.logit_scales[0], heads.softcaps[0])

    def members(self) -> list[Tensor | Head]:
        """The teachers; a `Head` where they are given by hidden states."""
        heads = self.heads
        layers = zip(
            self.rows.teachers,
            heads.teacher_weights,
            heads.teacher_biases,
            heads.logit_scales[1:],
            heads.softcaps[1:],
            strict=True,
        )
        return [
            teacher if weight is None else Head([teacher], [weight], bias, scale, softcap)
            for teacher, weight, bias, scale, softcap in layers
        ]
