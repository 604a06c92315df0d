"""The operators on hidden states: torch.library schemas, fakes, and the autograd functions.

As in `ops.py`, which has them for logits: `linear_statistics` measures all rows, and
`linear_gradient` gives the gradients of the student's hidden states, weights and bias for three
per-row coefficients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_kernels import ops
from hybrid_kernels.linear import HIDDEN, Gradients, Hidden, Problem
from hybrid_kernels.rows import COEFFICIENTS, ROWS_BUT_STUDENT, Coefficients, Rows


@ops.without_autocast
def keep_logits(hidden: Hidden, rows: Rows) -> tuple[Tensor, list[Tensor]]:
    """As `linear_statistics`, and the buffers with the logits where one chunk holds all rows: a
    gradient that depends on the statistics then needs no second computation."""
    problem = Problem(hidden, rows, gradient=False)
    for chunk in problem.chunks():
        chunk.measure()
    single = 0 < problem.count <= problem.size
    return problem.statistics, problem.buffers if single else []


@ops.without_autocast
def gradients_of_kept(
    kept: list[Tensor],
    statistics: Tensor,
    coefficients: Coefficients,
    bound: Tensor | None,
    wanted: Sequence[bool],
    hidden: Hidden,
    rows: Rows,
) -> list[Tensor]:
    """As `linear_gradient`, from logits that `keep_logits` has kept, which are written over."""
    problem = Problem(hidden, rows, gradient=True, kept=kept)
    return _differentiate(problem, statistics, coefficients, bound, wanted)


def _differentiate(
    problem: Problem,
    statistics: Tensor | None,
    coefficients: Coefficients,
    bound: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    gradients = Gradients(problem, wanted, bound)
    for chunk in problem.chunks():
        gradients.add(chunk, chunk.differentiate(coefficients, statistics))
    dropped, found = gradients.finish()
    # (An operator's result may not be one of its arguments.)
    own = problem.statistics if statistics is None else statistics.new_empty(0)
    return [own, dropped, *found]


@torch.library.custom_op(
    "hybrid_kernels::linear_statistics",
    mutates_args=(),
    schema=f"({HIDDEN}, {ROWS_BUT_STUDENT}) -> Tensor",
)
@ops.without_autocast
def linear_statistics(*args):
    problem = Problem(*Hidden.split(args), gradient=False)
    for chunk in problem.chunks():
        chunk.measure()
    return problem.statistics


@linear_statistics.register_fake
def _(*args) -> Tensor:
    return Hidden.split(args)[1].statistics()


@torch.library.custom_op(
    "hybrid_kernels::linear_gradient",
    mutates_args=(),
    schema=f"(Tensor? statistics, {COEFFICIENTS}, Tensor? bound, bool[] wanted, {HIDDEN}, "
    f"{ROWS_BUT_STUDENT}) -> Tensor[]",
)
@ops.without_autocast
def linear_gradient(statistics, c_div, c_logp, c_ent, bound, wanted, *args):
    """Statistics (those given, where they are), what the filter dropped, and the gradients that are
    `wanted`, of hiddens, weights and bias."""
    hidden, rows = Hidden.split(args)
    # The gradient of the weight is free memory until it is written.
    room = hidden.weights[0].nbytes if wanted[len(hidden.hiddens)] else 0
    problem = Problem(hidden, rows, gradient=True, room=room)
    return _differentiate(problem, statistics, Coefficients(c_div, c_logp, c_ent), bound, wanted)


@linear_gradient.register_fake
def _(statistics, c_div, c_logp, c_ent, bound, wanted, *args):
    hidden, rows = Hidden.split(args)
    measured = rows.statistics() if statistics is None else statistics.new_empty(0)
    pairs = zip(hidden.differentiable(), wanted, strict=True)
    plain = torch.contiguous_format
    gradients = (torch.empty_like(t, memory_format=plain) for t, w in pairs if w and t is not None)
    return [measured, measured.new_empty(()), *gradients]


def _spread(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients, and None where none is wanted."""
    rest = iter(gradients)
    return tuple(next(rest) if w else None for w in wanted)


class LinearTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient: the backward
    computes the logits again. `known` are the statistics, where they are.

    The tensors are those of `Hidden.differentiable`, which autograd looks for one by one.
    """

    @staticmethod
    def forward(ctx, hidden, rows, bound, known, *tensors):
        fields = rows[1:]
        statistics = linear_statistics(*hidden, *fields) if known is None else known.clone()
        # Not log q(y): the gradient of the value needs no correction.
        ops.keep(ctx, hidden, rows._replace(token_log_prob=None)[1:], statistics, bound)
        return statistics

    @staticmethod
    @ops.first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, fields, statistics, bound = ops.kept(ctx)
        coefficients = ops.upstream_coefficients(upstream, hidden.rows(*fields))
        wanted = list(ctx.needs_input_grad[4:])
        _, _, *gradients = linear_gradient(
            statistics, *coefficients, bound, wanted, *hidden, *fields
        )
        return *(None,) * 4, *_spread(wanted, gradients)


class LinearLossFunction(torch.autograd.Function):
    """The loss and its gradients in one forward; backward scales them by the upstream one.

    As `ops.HybridLossFunction`. A loss per row has a gradient for the hidden states alone. `kept`
    are buffers of `keep_logits`; tensors as in `LinearTermsFunction`.
    """

    @staticmethod
    def forward(ctx, hidden, rows, weights, scale, bound, statistics, kept, summed, *tensors):
        wanted, late = list(ctx.needs_input_grad[8:]), None
        if ops.scales_late(*hidden.hiddens, *hidden.weights):
            late, bound = scale, None if bound is None else bound / scale
        coefficients = ops.coefficients(weights, scale if late is None else torch.ones_like(scale))
        if kept:
            measured, dropped, *gradients = gradients_of_kept(
                kept, statistics, coefficients, bound, wanted, hidden, rows
            )
        else:
            measured, dropped, *gradients = linear_gradient(
                statistics, *coefficients, bound, wanted, *hidden, *rows[1:]
            )
        statistics = measured if statistics is None else statistics
        loss = ops.row_losses(statistics, weights, rows.valid)
        if summed:
            loss = (loss * scale).sum()
        ctx.save_for_backward(rows.valid, late, *gradients)
        ctx.wanted, ctx.backend = wanted, rows.backend
        ctx.mark_non_differentiable(statistics, dropped)
        return loss, statistics, dropped

    @staticmethod
    @ops.first_order
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        valid, late, *gradients = ctx.saved_tensors
        if ops.graph_is_kept():
            gradients = [gradient.clone() for gradient in gradients]
        upstream = ops.row_upstream(upstream, valid)
        if late is not None:
            upstream = upstream * late
        for gradient in gradients:
            ops.scale_rows(gradient, upstream, ctx.backend)
        return *(None,) * 8, *_spread(ctx.wanted, gradients)
