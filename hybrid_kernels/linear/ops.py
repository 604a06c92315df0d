"""The operators on hidden states: torch.library schemas, fakes, and the autograd functions.

As in `hybrid_kernels/ops.py`, which has them for logits: `linear_statistics` measures all rows, and
`linear_gradient` gives the gradients of the student's hidden states, weights and bias for three
per-row coefficients. They take the fields of `LinearRows` one by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_kernels import ops
from hybrid_kernels.autograd import (
    anchors,
    first_order,
    graph_is_kept,
    row_upstream,
    save,
    saved,
    scales_late,
)
from hybrid_kernels.linear.chunks import Chunks
from hybrid_kernels.linear.gradients import Gradients
from hybrid_kernels.linear.rows import CHUNKING, HEADS, Chunking, Heads, LinearRows
from hybrid_kernels.objective import RowLoss
from hybrid_kernels.rows import COEFFICIENTS, ROWS, Coefficients, Rows, unflatten

PROBLEM = f"{ROWS}, {HEADS}, {CHUNKING}"


def keep_logits(problem: LinearRows) -> tuple[Tensor, list[Tensor]]:
    """As `linear_statistics`, and the buffers with the logits where one chunk holds all rows: a
    gradient that depends on the statistics then needs no second computation."""
    with ops.autocast_off(problem.rows.student.device):
        chunks = Chunks(problem, gradient=False)
        for chunk in chunks:
            chunk.measure()
    single = 0 < chunks.count <= chunks.size
    return chunks.statistics, chunks.buffers if single else []


def gradients_of_kept(
    logits: list[Tensor],
    statistics: Tensor,
    unit: Tensor,
    wanted: Sequence[bool],
    coefficients: Coefficients,
    problem: LinearRows,
) -> list[Tensor]:
    """As `linear_gradient`, from the buffers that `keep_logits` returned, which are overwritten."""
    with ops.autocast_off(problem.rows.student.device):
        chunks = Chunks(problem, gradient=True, logits=logits)
        return _gradients(chunks, statistics, unit, wanted, coefficients)


def _gradients(
    chunks: Chunks,
    statistics: Tensor | None,
    unit: Tensor,
    wanted: Sequence[bool],
    coefficients: Coefficients,
) -> list[Tensor]:
    gradients = Gradients(chunks, wanted, unit)
    for chunk in chunks:
        gradients.add(chunk, chunk.differentiate(coefficients, statistics))
    dropped, results = gradients.finish()
    # An operator's result may not be one of its arguments.
    measured = chunks.statistics if statistics is None else statistics.new_empty(0)
    return [measured, dropped, *results]


@torch.library.custom_op(
    "hybrid_kernels::linear_statistics", mutates_args=(), schema=f"({PROBLEM}) -> Tensor"
)
@ops.without_autocast
def linear_statistics(*fields):
    chunks = Chunks(LinearRows.of(fields), gradient=False)
    for chunk in chunks:
        chunk.measure()
    return chunks.statistics


@linear_statistics.register_fake
def _(*fields) -> Tensor:
    return LinearRows.of(fields).rows.statistics()


@torch.library.custom_op(
    "hybrid_kernels::linear_gradient",
    mutates_args=(),
    schema=f"(Tensor? statistics, Tensor unit, bool[] wanted, {COEFFICIENTS}, {PROBLEM}) "
    "-> Tensor[]",
)
@ops.without_autocast
def linear_gradient(statistics, unit, wanted, *fields):
    """The statistics, the share of the gradient's norm that the filter dropped, and the gradients.

    Args:
        statistics: those of the same rows, where they are known; what is returned is then empty.
        unit: scalar, the coefficient of one token's loss, in which `grad_filter` is measured.
        wanted: for each tensor of `LinearRows.differentiable`, whether to return its gradient.
        fields: those of `Coefficients` and `LinearRows`.
    """
    coefficients, *parts = unflatten(fields, Coefficients, Rows, Heads, Chunking)
    problem = LinearRows(*parts)
    # The gradient of the weight is free memory until it is written.
    heads = problem.heads
    room = heads.weights[0].nbytes if wanted[1 + len(heads.adapter_hiddens)] else 0
    chunks = Chunks(problem, gradient=True, room=room)
    return _gradients(chunks, statistics, unit, wanted, coefficients)


@linear_gradient.register_fake
def _(statistics, unit, wanted, *fields):
    problem = LinearRows(*unflatten(fields, Coefficients, Rows, Heads, Chunking)[1:])
    measured = problem.rows.statistics() if statistics is None else statistics.new_empty(0)
    tensors = zip(problem.differentiable(), wanted, strict=True)
    plain = torch.contiguous_format
    gradients = (
        torch.empty_like(t, memory_format=plain) for t, w in tensors if w and t is not None
    )
    return [measured, measured.new_empty(()), *gradients]


def _spread(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients, and None where none is wanted."""
    remaining = iter(gradients)
    return tuple(next(remaining) if w else None for w in wanted)


class LinearTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient: the backward
    computes the logits again. `statistics`, where given, are known from before.

    The tensors are those of `LinearRows.differentiable`, which autograd looks for one by one.
    """

    @staticmethod
    def forward(ctx, problem: LinearRows, statistics, *tensors):
        ctx.anchors = anchors(tensors)
        if statistics is None:
            statistics = linear_statistics(*problem.flat())
        else:
            statistics = statistics.clone()  # a result may not be an argument
        # Without log q(y), which would correct the gradient: this one is that of the value.
        rows = problem.rows._replace(token_log_prob=None)
        save(ctx, problem._replace(rows=rows), statistics)
        return statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        problem, statistics = saved(ctx)
        coefficients = ops.upstream_coefficients(upstream, problem.rows)
        wanted, unit = list(ctx.needs_input_grad[2:]), statistics.new_ones(())
        _, _, *gradients = linear_gradient(statistics, unit, wanted, *coefficients, *problem.flat())
        return None, None, *_spread(wanted, gradients)


class LinearLossFunction(torch.autograd.Function):
    """The loss and its gradients in one forward; backward scales them by the upstream one.

    As `ops.HybridLossFunction`. A loss per row has a gradient for the hidden states alone.
    `statistics` and `logits`, where given, come from `keep_logits`; the tensors are as in
    `LinearTermsFunction`.
    """

    @staticmethod
    def forward(ctx, problem: LinearRows, loss: RowLoss, statistics, logits, *tensors):
        ctx.wanted, ctx.backend = list(ctx.needs_input_grad[4:]), problem.rows.backend
        ctx.anchors = anchors(tensors)
        # The factor that waits for the upstream gradient, and the one that does not.
        late, scale = None, loss.scale
        if scales_late(*tensors[:-1]):  # all but the bias
            late, scale = scale, torch.ones_like(scale)
        coefficients = loss.coefficients(scale)
        if logits:
            results = gradients_of_kept(
                logits, statistics, scale, ctx.wanted, coefficients, problem
            )
        else:
            results = linear_gradient(statistics, scale, ctx.wanted, *coefficients, *problem.flat())
        measured, dropped, *gradients = results
        statistics = measured if statistics is None else statistics
        ctx.save_for_backward(problem.rows.valid, late, *gradients)
        ctx.mark_non_differentiable(statistics, dropped)
        return loss.value(statistics, problem.rows.valid), statistics, dropped

    @staticmethod
    @first_order
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        valid, late, *gradients = ctx.saved_tensors
        if graph_is_kept():
            gradients = [gradient.clone() for gradient in gradients]
        # A weight that is not finite makes a NaN of a masked row's 0.
        upstream = row_upstream(upstream, valid, on_masked=0.0)
        if late is not None:
            upstream = upstream * late
        for gradient in gradients:
            ops.scale_rows(gradient, upstream, ctx.backend)
        return None, None, None, None, *_spread(ctx.wanted, gradients)
