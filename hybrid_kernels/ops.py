"""The operators on logits: torch.library schemas, fakes, and the two autograd functions over them.

Three operators do all the work on rows of logits, each with a Triton and a torch implementation:

- `row_statistics`: one sweep (two for the divergences that need both normalisers first).
- `row_gradient`: the closed-form gradient from those statistics and three per-row coefficients.
- `hybrid_rows`: both in one launch.

With c_div, c_logp and c_ent the coefficients of a row, the gradient they write is

    dz = c_div * dD/dz + c_logp * dlog p(y)/dz + c_ent * dH(p)/dz

so that a new loss is a new choice of coefficients and never a new kernel. A fourth operator,
`scale_rows`, multiplies a finished gradient by the upstream one.

Operators take the fields of `Rows` and `Coefficients` one by one, in their order; shapes and names
are those of `rows.py`.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hybrid_kernels import backends, checks, validate
from hybrid_kernels.autograd import (
    anchors,
    first_order,
    graph_is_kept,
    row_upstream,
    save,
    saved,
    scales_late,
)
from hybrid_kernels.objective import RowLoss
from hybrid_kernels.rows import COEFFICIENTS, FIELDS, ROWS, Coefficients, Rows, unflatten


def check_values(rows: Rows) -> None:
    """The checks that read tensors: on the CPU, and in debug mode. Where several ranks share the
    vocabulary, `sharded.py` checks whether ids are in range."""
    if rows.student.device.type != "cpu" and not checks.debug():
        return
    support, vocabulary = rows.support, rows.student.shape[-1]
    if rows.token_log_prob is not None:
        validate.token_log_probs(rows.token_log_prob, rows.valid)
    if rows.group:
        return
    if rows.token_ids is not None:
        validate.token_ids_in_range(rows.token_ids, rows.valid, vocabulary)
    if support is not None:
        for log_probs in rows.teachers:
            validate.support_values(support, log_probs, rows.valid, vocabulary, rows.resolution)


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


@torch.library.custom_op(
    "hybrid_kernels::row_statistics", mutates_args=(), schema=f"({ROWS}) -> Tensor"
)
@without_autocast
def row_statistics(*fields):
    (rows,) = unflatten(fields, Rows)
    check_values(rows)
    statistics = rows.statistics()
    backends.launchers(rows).row_statistics(rows, statistics)
    return statistics


@row_statistics.register_fake
def _(*fields) -> Tensor:
    return Rows(*fields).statistics()


@torch.library.custom_op(
    "hybrid_kernels::row_gradient",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!) gradient, Tensor statistics, {COEFFICIENTS}, {ROWS}) -> ()",
)
@without_autocast
def row_gradient(gradient, statistics, *fields):
    coefficients, rows = unflatten(fields, Coefficients, Rows)
    backends.launchers(rows).row_gradient(rows, statistics, coefficients, gradient)


@row_gradient.register_fake
def _(*fields) -> None:
    return None


@torch.library.custom_op(
    "hybrid_kernels::hybrid_rows",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!) gradient, {COEFFICIENTS}, {ROWS}) -> Tensor",
)
@without_autocast
def hybrid_rows(gradient, *fields):
    coefficients, rows = unflatten(fields, Coefficients, Rows)
    check_values(rows)
    statistics = rows.statistics()
    backends.launchers(rows).hybrid_rows(rows, statistics, coefficients, gradient)
    return statistics


@hybrid_rows.register_fake
def _(gradient, *fields) -> Tensor:
    return unflatten(fields, Coefficients, Rows)[1].statistics()


@torch.library.custom_op("hybrid_kernels::scale_rows", mutates_args=("gradient",))
def scale_rows(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """Multiplies each row of `gradient` by `factor` (`[N]` or one element); 1 touches nothing."""
    # Logits are [O, I, V]; gradients of hidden states and weights are not. They get that shape in
    # here: to the compiler, a view made outside would be a mutated view of unknown size.
    rows = gradient if gradient.ndim == 3 else gradient.view(1, -1, gradient.shape[-1])
    backends.module(backend).scale_rows(rows, factor)


@scale_rows.register_fake
def _(*arguments) -> None:
    return None


class TokenTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient."""

    @staticmethod
    def forward(ctx, student, rows):
        ctx.anchors = anchors([student])
        statistics = row_statistics(*rows)
        # Without log q(y), which would correct the gradient: this one is that of the value.
        save(ctx, rows._replace(token_log_prob=None), statistics)
        return statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, statistics = saved(ctx)
        gradient = gradient_memory(rows.student)
        row_gradient(gradient, statistics, *upstream_coefficients(upstream, rows), *rows)
        return gradient, None


def upstream_coefficients(upstream: Tensor, rows: Rows) -> Coefficients:
    """The upstream gradients of the differentiable statistics, as coefficients."""
    return Coefficients(
        upstream[FIELDS.divergence].contiguous() if rows.teachers else None,
        upstream[FIELDS.log_prob].contiguous() if rows.token_ids is not None else None,
        upstream[FIELDS.entropy].contiguous(),
    )


class HybridLossFunction(torch.autograd.Function):
    """The loss and its gradient in one forward; backward scales the gradient by the upstream one.

    In fp16 the gradient of a scalar loss is made in the backward, see `scales_late`. `statistics`,
    where given, are those of the same rows, measured for a callable `advantages`.
    """

    @staticmethod
    def forward(ctx, student, rows: Rows, loss: RowLoss, statistics, inplace):
        ctx.late = is_late(loss, student)
        ctx.inplace, ctx.backend, ctx.anchors = inplace, rows.backend, anchors([student])
        coefficients = loss.coefficients()
        if ctx.late:
            statistics = row_statistics(*rows) if statistics is None else statistics
            save(ctx, rows, coefficients, statistics)
        else:
            gradient = gradient_memory(student, inplace)
            if statistics is None:
                statistics = hybrid_rows(gradient, *coefficients, *rows)
            else:
                row_gradient(gradient, statistics, *coefficients, *rows)
            ctx.save_for_backward(gradient, rows.valid)
        ctx.mark_non_differentiable(statistics)
        return loss.value(statistics, rows.valid), statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.late:
            rows, coefficients, statistics = saved(ctx)
            coefficients = (None if c is None else c * upstream for c in coefficients)
            gradient = gradient_memory(rows.student, ctx.inplace and not graph_is_kept())
            row_gradient(gradient, statistics, *coefficients, *rows)
        else:
            gradient, valid = ctx.saved_tensors
            if graph_is_kept():
                gradient = gradient.clone()
            # Masked rows have a gradient of 0 already.
            scale_rows(gradient, row_upstream(upstream, valid, on_masked=1.0), ctx.backend)
        return gradient, None, None, None, None


def is_late(loss: RowLoss, student: Tensor) -> bool:
    """Whether the gradient of a loss is computed in the backward, for which its rows are kept."""
    return loss.summed and scales_late(student)


def gradient_memory(student: Tensor, inplace: bool = False) -> Tensor:
    """Memory for the gradient of logits: new, or that of the logits themselves."""
    # detach() shares storage and version counter: whoever saved the logits for their own backward
    # gets autograd's error that they were overwritten.
    if inplace:
        return student.detach()
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)
