"""The operators: torch.library schemas, fakes, and the two autograd functions over them.

Three operators do all the work on rows of logits, each with a Triton and a torch implementation:

- `row_statistics`: one sweep (two for the divergences that need both normalisers first).
- `row_gradient`: the closed-form gradient from those statistics and three per-row coefficients.
- `hybrid_rows`: both in one launch.

With c_div, c_logp and c_ent the coefficients of a row, the gradient they write is

    dz = c_div * dD/dz + c_logp * dlog p(y)/dz + c_ent * dH(p)/dz

so that a new loss is a new choice of coefficients and never a new kernel. A fourth operator,
`scale_rows`, multiplies a finished gradient by the upstream one.

Shapes and names are those of `rows.py`.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import validate
from hybrid_kernels.rows import FIELDS, Coefficients, Rows, Support, statistics_size
from hybrid_kernels.sharded import Sharded


def implementation(backend: str, group: str, student: Tensor) -> ModuleType | Sharded:
    """What computes rows of logits: a backend, or one on each rank of a group that shares the
    vocabulary (`group` is its name, empty where there is none)."""
    if backend == "triton":
        from hybrid_kernels.kernels import rows as module
    else:
        from hybrid_kernels import cpu as module
    return Sharded(module, group, student) if group else module


def _rows(
    student, teachers, support, token_log_prob, token_ids, valid, shares, divergence, parameter,
    temperature, teacher_floor, tail, resolution,
) -> Rows:  # fmt: skip
    """The arguments that all operators share, as one problem."""
    return Rows(
        student,
        tuple(teachers),
        tuple(shares),
        None if support is None else Support(support, token_log_prob, tail, resolution),
        token_ids,
        valid,
        divergence,
        parameter,
        temperature,
        teacher_floor,
    )


def check_values(rows: Rows, group: str) -> None:
    """The checks that read tensors: on the CPU, and in debug mode. (Whether ids are in range, only
    the ranks that share the vocabulary know together: `sharded.py`.)"""
    if rows.student.device.type != "cpu" and not validate.debug():
        return
    support, vocabulary = rows.support, rows.student.shape[-1]
    if support is not None and support.token_log_prob is not None:
        validate.token_log_probs(support.token_log_prob, rows.valid)
    if group:
        return
    if rows.token_ids is not None:
        validate.token_ids_in_range(rows.token_ids, rows.valid, vocabulary)
    if support is not None:
        for log_probs in rows.teachers:
            resolution = support.resolution
            validate.support_values(support.ids, log_probs, rows.valid, vocabulary, resolution)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Leaves arithmetic on a device as it is written; some devices ("meta") have no autocast."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(operator: Callable) -> Callable:
    """An operator whose own arithmetic torch.autocast, which reaches into it, leaves alone."""

    @functools.wraps(operator)
    def wrapped(*args, **options):
        tensors = (t for a in args for t in (a if isinstance(a, list | tuple) else (a,)))
        first = next(t for t in tensors if isinstance(t, Tensor))
        with autocast_off(first.device):
            return operator(*args, **options)

    return wrapped


@torch.library.custom_op("hybrid_kernels::row_statistics", mutates_args=())
@without_autocast
def row_statistics(
    student: Tensor,
    teachers: Sequence[Tensor],
    support: Tensor | None,
    token_log_prob: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    shares: Sequence[float],
    divergence: str,
    parameter: float,
    temperature: float,
    teacher_floor: float | None,
    tail: str,
    resolution: float,
    group: str,
    backend: str,
) -> Tensor:
    rows = _rows(
        student, teachers, support, token_log_prob, token_ids, valid, shares, divergence, parameter,
        temperature, teacher_floor, tail, resolution,
    )  # fmt: skip
    check_values(rows, group)
    statistics = rows.statistics()
    implementation(backend, group, student).row_statistics(rows, statistics)
    return statistics


@row_statistics.register_fake
def _(student, teachers, *args) -> Tensor:
    return _fake_statistics(student, teachers)


def _fake_statistics(student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    count = student.shape[0] * student.shape[1]
    return student.new_empty((statistics_size(len(teachers)), count), dtype=torch.float32)


@torch.library.custom_op("hybrid_kernels::row_gradient", mutates_args=("gradient",))
@without_autocast
def row_gradient(
    gradient: Tensor,
    statistics: Tensor,
    divergence_coefficient: Tensor | None,
    log_prob_coefficient: Tensor | None,
    entropy_coefficient: Tensor | None,
    student: Tensor,
    teachers: Sequence[Tensor],
    support: Tensor | None,
    token_log_prob: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    shares: Sequence[float],
    divergence: str,
    parameter: float,
    temperature: float,
    teacher_floor: float | None,
    tail: str,
    resolution: float,
    group: str,
    backend: str,
) -> None:
    rows = _rows(
        student, teachers, support, token_log_prob, token_ids, valid, shares, divergence, parameter,
        temperature, teacher_floor, tail, resolution,
    )  # fmt: skip
    coefficients = Coefficients(divergence_coefficient, log_prob_coefficient, entropy_coefficient)
    own = implementation(backend, group, student)
    own.row_gradient(rows, statistics, coefficients, gradient)


@row_gradient.register_fake
def _(gradient, *args) -> None:
    return None


@torch.library.custom_op("hybrid_kernels::hybrid_rows", mutates_args=("gradient",))
@without_autocast
def hybrid_rows(
    gradient: Tensor,
    divergence_coefficient: Tensor | None,
    log_prob_coefficient: Tensor | None,
    entropy_coefficient: Tensor | None,
    student: Tensor,
    teachers: Sequence[Tensor],
    support: Tensor | None,
    token_log_prob: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    shares: Sequence[float],
    divergence: str,
    parameter: float,
    temperature: float,
    teacher_floor: float | None,
    tail: str,
    resolution: float,
    group: str,
    backend: str,
) -> Tensor:
    rows = _rows(
        student, teachers, support, token_log_prob, token_ids, valid, shares, divergence, parameter,
        temperature, teacher_floor, tail, resolution,
    )  # fmt: skip
    check_values(rows, group)
    coefficients = Coefficients(divergence_coefficient, log_prob_coefficient, entropy_coefficient)
    statistics = rows.statistics()
    own = implementation(backend, group, student)
    own.hybrid_rows(rows, statistics, coefficients, gradient)
    return statistics


@hybrid_rows.register_fake
def _(gradient, c_div, c_logp, c_ent, student, teachers, *args) -> Tensor:
    return _fake_statistics(student, teachers)


@torch.library.custom_op("hybrid_kernels::scale_rows", mutates_args=("gradient",))
def scale_rows(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """Multiplies each row of `gradient` by `factor` (`[N]` or one element); 1 touches nothing."""
    # (Logits are [O, I, V]. What is not: see `linear_ops`. A view outside would be a mutated view
    # of unknown size to the compiler.)
    rows = gradient if gradient.ndim == 3 else gradient.view(1, -1, gradient.shape[-1])
    implementation(backend, "", rows).scale_rows(rows, factor)


@scale_rows.register_fake
def _(gradient, *args) -> None:
    return None


class _NoSecondDerivative(torch.autograd.Function):
    """The identity, whose own derivative is an error."""

    @staticmethod
    def forward(ctx, gradient):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(
            "hybrid_kernels: the gradient is a closed form and has no second derivative; use "
            "hybrid_kernels.reference where you need one"
        )


def first_order(backward):
    """A backward whose results can't be differentiated again without an error.

    Under create_graph=True it would otherwise count as a constant, and silently so.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        keeps_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            found = backward(ctx, *upstream)
        if keeps_graph:
            found = tuple(
                None if gradient is None else _NoSecondDerivative.apply(gradient.requires_grad_())
                for gradient in found
            )
        return found

    return wrapped


class TokenTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient.

    Teachers come last, one by one, because autograd does not look into containers.
    """

    @staticmethod
    def forward(ctx, student, support, token_log_prob, token_ids, valid, config, *teachers):
        rows = (token_ids, valid)
        statistics = row_statistics(student, teachers, support, token_log_prob, *rows, *config)
        ctx.save_for_backward(student, support, *rows, statistics, *teachers)
        ctx.config = config
        return statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        student, support, token_ids, valid, statistics, *teachers = ctx.saved_tensors
        gradient = _gradient_of(student)
        row_gradient(
            gradient,
            statistics,
            upstream[FIELDS.divergence].contiguous() if teachers else None,
            upstream[FIELDS.log_prob].contiguous() if token_ids is not None else None,
            upstream[FIELDS.entropy].contiguous(),
            student,
            teachers,
            support,
            None,  # not log q(y): the gradient of the value needs no correction
            token_ids,
            valid,
            *ctx.config,
        )
        return gradient, *(None,) * (5 + len(teachers))


class HybridLossFunction(torch.autograd.Function):
    """The loss and its gradient in one forward; backward scales the gradient by the upstream one.
    In fp16 the gradient of a scalar loss is made in the backward, see `scales_late`.

    `scale` is the normaliser, a scalar tensor. `summed` tells a scalar loss from one per row.
    `statistics`, where given, are those of the same rows (a callable `advantages` needed them).
    """

    @staticmethod
    def forward(
        ctx,
        student,
        support,
        token_log_prob,
        token_ids,
        valid,
        dense,
        advantages,
        entropy,
        scale,
        statistics,
        summed,
        inplace,
        config,
        *teachers,
    ):
        weights = Weights(dense, advantages, entropy)
        own = coefficients(weights, scale)
        problem = (student, teachers, support, token_log_prob, token_ids, valid, *config)
        late = summed and scales_late(student)
        gradient = None if late else _gradient_of(student, inplace)
        if gradient is None:
            statistics = row_statistics(*problem) if statistics is None else statistics
        elif statistics is None:
            statistics = hybrid_rows(gradient, *own, *problem)
        else:
            row_gradient(gradient, statistics, *own, *problem)
        loss = row_losses(statistics, weights, valid)
        if summed:
            loss = (loss * scale).sum()
        inputs = (student, support, token_log_prob, token_ids, statistics, *own, *teachers)
        kept = inputs if late else ()
        ctx.save_for_backward(gradient, valid, *kept)
        ctx.config, ctx.inplace, ctx.inputs = config, inplace, 13 + len(teachers)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient, valid, *kept = ctx.saved_tensors
        if gradient is None:
            student, support, token_log_prob, token_ids, statistics, *rest = kept
            own = (None if c is None else c * upstream for c in rest[:3])
            teachers = rest[3:]
            gradient = _gradient_of(student, ctx.inplace and not graph_is_kept())
            rows = (student, teachers, support, token_log_prob, token_ids, valid)
            row_gradient(gradient, statistics, *own, *rows, *ctx.config)
            return gradient, *(None,) * (ctx.inputs - 1)
        if graph_is_kept():
            gradient = gradient.clone()
        upstream = upstream.reshape(-1)
        if valid is not None and upstream.shape == valid.shape:
            upstream = torch.where(valid, upstream, 0.0)
        scale_rows(gradient, upstream.contiguous(), ctx.config[-1])
        return gradient, *(None,) * (ctx.inputs - 1)


def scales_late(*tensors: Tensor) -> bool:
    """Whether a gradient has to wait for the upstream one: a mean over thousands of rows takes it
    below what fp16 can hold, and a loss scale would come too late."""
    return any(tensor.dtype == torch.float16 for tensor in tensors)


class Weights(NamedTuple):
    """Per-row weights of the three terms of the loss: a number, a tensor `[N]` or `[]`, or None."""

    dense: float | Tensor | None
    advantages: Tensor | None
    entropy: float | Tensor | None


def row_losses(statistics: Tensor, weights: Weights, valid: Tensor | None) -> Tensor:
    """`dense * D - advantages * log p(y) - entropy_weight * H` per row; 0 on masked rows.

    The correction for tokens sampled outside a top-K support is part of the advantages: it is 0
    where there is none.
    """
    loss = None
    if weights.dense is not None:
        tail = statistics[FIELDS.tail_correction]
        # (Not 0 * -inf, of a token that the student forbids.)
        corrected = torch.where(tail == 0, 0.0, tail * statistics[FIELDS.log_prob])
        loss = weights.dense * (statistics[FIELDS.divergence] + corrected)
        if isinstance(weights.dense, Tensor):
            # A weight of 0 leaves nothing of an infinite divergence.
            loss = torch.where(weights.dense == 0, 0.0, loss)
    if weights.advantages is not None:
        sparse = weights.advantages * statistics[FIELDS.log_prob]
        loss = -sparse if loss is None else loss - sparse
    if weights.entropy is not None:
        bonus = weights.entropy * statistics[FIELDS.entropy]
        loss = -bonus if loss is None else loss - bonus
    if loss is None:
        return torch.zeros_like(statistics[0])
    return loss if valid is None else torch.where(valid, loss, 0.0)


def coefficients(weights: Weights, scale: Tensor) -> Coefficients:
    """The gradient's coefficients: d(row loss)/d(term), times the normaliser of the reduction."""
    dense, advantages, entropy = weights
    return Coefficients(
        None if dense is None else (dense * scale).reshape(-1),
        None if advantages is None else -(advantages * scale).reshape(-1),
        None if entropy is None else -(entropy * scale).reshape(-1),
    )


def _gradient_of(student: Tensor, inplace: bool = False) -> Tensor:
    """Memory for a gradient."""
    # detach() shares storage and version counter: whoever saved the logits for their own backward
    # is told by autograd that they were overwritten.
    if inplace:
        return student.detach()
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def graph_is_kept() -> bool:
    """Whether backward may run again (retain_graph=True), so that its buffer must survive."""
    if torch.compiler.is_compiling():
        return False  # the compiler functionalises: the saved tensor is never written
    # What autograd's own compiler asks before it reuses a saved buffer.
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
