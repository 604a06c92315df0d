"""The operators on hidden states: torch.library schemas, fakes, and the autograd functions.

As in `ops.py`, which has them for logits: `linear_statistics` measures all rows, and
`linear_gradient` gives the gradients of the student's hidden states, weights and bias for three
per-row coefficients. The sides' tensors come as flat lists, student first:

    hiddens, weights, bias           the student's, as in `heads.Head`
    teachers                         a member's logits [O, I, V], log-probabilities [N, K] on a
                                     support, or hidden states [N, D]
    teacher_weights, teacher_biases  a member's; None where it is not given by hidden states
    logit_scales, softcaps           of the student, then of each member
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import ops
from hybrid_kernels.heads import Head
from hybrid_kernels.linear import Gradients, Options, Problem
from hybrid_kernels.rows import FIELDS, Coefficients, Support, statistics_size


def _problem(
    hiddens, weights, bias, teachers, teacher_weights, teacher_biases, support, token_log_prob,
    token_ids, valid, logit_scales, softcaps, chunk_rows, logits_dtype, drop_masked, shares,
    divergence, parameter, temperature, teacher_floor, tail, resolution, group, backend,
    **options,
) -> Problem:  # fmt: skip
    """The arguments that both operators share."""
    sides: list[Tensor | Head] = []
    for i, (teacher, weight) in enumerate(zip(teachers, teacher_weights, strict=True)):
        if weight is None:
            sides.append(teacher)
        else:
            own = (teacher_biases[i], logit_scales[i + 1], softcaps[i + 1])
            sides.append(Head([teacher], [weight], *own))
    return Problem(
        Head(hiddens, weights, bias, logit_scales[0], softcaps[0]),
        sides,
        None if support is None else Support(support, token_log_prob, tail, resolution),
        token_ids,
        valid,
        (shares, divergence, parameter, temperature, teacher_floor),
        group,
        backend,
        Options(chunk_rows, logits_dtype, drop_masked),
        **options,
    )


@ops.without_autocast
def keep_logits(*arguments) -> tuple[Tensor, list[Tensor]]:
    """As `linear_statistics`, and the buffers with the logits where one chunk holds all rows: a
    gradient that depends on the statistics then needs no second computation."""
    problem = _problem(*arguments, gradient=False)
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
    *arguments,
) -> list[Tensor]:
    """As `linear_gradient`, from logits that `keep_logits` has kept, which are written over."""
    problem = _problem(*arguments, gradient=True, kept=kept)
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


@torch.library.custom_op("hybrid_kernels::linear_statistics", mutates_args=())
@ops.without_autocast
def linear_statistics(
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    teachers: Sequence[Tensor],
    teacher_weights: Sequence[Tensor | None],
    teacher_biases: Sequence[Tensor | None],
    support: Tensor | None,
    token_log_prob: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
    chunk_rows: int,
    logits_dtype: torch.dtype,
    drop_masked: bool,
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
    problem = _problem(
        hiddens, weights, bias, teachers, teacher_weights, teacher_biases, support, token_log_prob,
        token_ids, valid, logit_scales, softcaps, chunk_rows, logits_dtype, drop_masked, shares,
        divergence, parameter, temperature, teacher_floor, tail, resolution, group, backend,
        gradient=False,
    )  # fmt: skip
    for chunk in problem.chunks():
        chunk.measure()
    return problem.statistics


@linear_statistics.register_fake
def _(hiddens, weights, bias, teachers, *args) -> Tensor:
    return _fake_statistics(hiddens, teachers)


def _fake_statistics(hiddens: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    size = (statistics_size(len(teachers)), hiddens[0].shape[0])
    return hiddens[0].new_empty(size, dtype=torch.float32)


@torch.library.custom_op("hybrid_kernels::linear_gradient", mutates_args=())
@ops.without_autocast
def linear_gradient(
    statistics: Tensor | None,
    divergence_coefficient: Tensor | None,
    log_prob_coefficient: Tensor | None,
    entropy_coefficient: Tensor | None,
    bound: Tensor | None,
    wanted: Sequence[bool],
    hiddens: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    teachers: Sequence[Tensor],
    teacher_weights: Sequence[Tensor | None],
    teacher_biases: Sequence[Tensor | None],
    support: Tensor | None,
    token_log_prob: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
    chunk_rows: int,
    logits_dtype: torch.dtype,
    drop_masked: bool,
    shares: Sequence[float],
    divergence: str,
    parameter: float,
    temperature: float,
    teacher_floor: float | None,
    tail: str,
    resolution: float,
    group: str,
    backend: str,
) -> list[Tensor]:
    """Statistics (those given, where they are), what the filter dropped, and the gradients that are
    `wanted`, of hiddens, weights and bias."""
    # The gradient of the weight is free memory until it is written.
    first = weights[0]
    room = first.numel() * first.element_size() if wanted[len(hiddens)] else 0
    problem = _problem(
        hiddens, weights, bias, teachers, teacher_weights, teacher_biases, support, token_log_prob,
        token_ids, valid, logit_scales, softcaps, chunk_rows, logits_dtype, drop_masked, shares,
        divergence, parameter, temperature, teacher_floor, tail, resolution, group, backend,
        gradient=True, room=room,
    )  # fmt: skip
    coefficients = Coefficients(divergence_coefficient, log_prob_coefficient, entropy_coefficient)
    return _differentiate(problem, statistics, coefficients, bound, wanted)


@linear_gradient.register_fake
def _(statistics, c_div, c_logp, c_ent, bound, wanted, hiddens, weights, bias, teachers, *args):
    found = _fake_statistics(hiddens, teachers) if statistics is None else statistics.new_empty(0)
    tensors = [*hiddens, *weights, *([] if bias is None else [bias])]
    pairs = zip(tensors, wanted, strict=False)
    plain = torch.contiguous_format
    gradients = (torch.empty_like(t, memory_format=plain) for t, w in pairs if w)
    return [found, found.new_empty(()), *gradients]


class Layout(NamedTuple):
    """How many of the flat tensors of an autograd function are which."""

    pairs: int
    members: int

    def arguments(self, tensors: Sequence[Tensor | None]) -> tuple:
        """The tensors as the operators take them."""
        rest = iter(tensors)

        def take(count: int) -> list:
            return [next(rest) for _ in range(count)]

        n, m = self.pairs, self.members
        return take(n), take(n), next(rest), take(m), take(m), take(m), *rest

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which of hiddens, weights and bias get a gradient."""
        return list(needs[: 2 * self.pairs + 1])

    def spread(self, wanted: Sequence[bool], gradients: Sequence[Tensor], count: int) -> tuple:
        """One result for each flat tensor, of `count` in all."""
        own = iter(gradients)
        found = [next(own) if w else None for w in wanted]
        return (*found, *(None,) * (count - len(found)))


class LinearTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient: the logits are
    computed anew for the backward. `known` are the statistics, where they are."""

    @staticmethod
    def forward(ctx, layout, bound, known, config, *tensors):
        if known is None:
            statistics = linear_statistics(*layout.arguments(tensors), *config)
        else:
            statistics = known.clone()
        ctx.save_for_backward(statistics, bound, *tensors)
        ctx.layout, ctx.config = layout, config
        return statistics

    @staticmethod
    @ops.first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        statistics, bound, *tensors = ctx.saved_tensors
        layout = ctx.layout
        sides = layout.arguments(tensors)
        hiddens, weights, bias, teachers, theirs, biases, support, _, token_ids, valid = sides
        wanted = layout.wanted(ctx.needs_input_grad[4:])
        _, _, *found = linear_gradient(
            statistics,
            upstream[FIELDS.divergence].contiguous() if teachers else None,
            upstream[FIELDS.log_prob].contiguous() if token_ids is not None else None,
            upstream[FIELDS.entropy].contiguous(),
            bound,
            wanted,
            hiddens,
            weights,
            bias,
            teachers,
            theirs,
            biases,
            support,
            None,  # not log q(y): the gradient of the value needs no correction
            token_ids,
            valid,
            *ctx.config,
        )
        return None, None, None, None, *layout.spread(wanted, found, len(tensors))


class LinearLossFunction(torch.autograd.Function):
    """The loss and its gradients in one forward; backward scales them by the upstream one.

    As `ops.HybridLossFunction`. A loss per row has a gradient for the hidden states alone. `kept`
    are buffers of `keep_logits`.
    """

    @staticmethod
    def forward(
        ctx, layout, dense, advantages, entropy, scale, bound, statistics, kept, summed, config,
        *tensors,
    ):  # fmt: skip
        weights = ops.Weights(dense, advantages, entropy)
        wanted = layout.wanted(ctx.needs_input_grad[10:])
        problem, late = layout.arguments(tensors), None
        if ops.scales_late(*tensors[: 2 * layout.pairs]):
            late, bound = scale, None if bound is None else bound / scale
        coefficients = ops.coefficients(weights, scale if late is None else torch.ones_like(scale))
        if kept:
            found, dropped, *gradients = gradients_of_kept(
                kept, statistics, coefficients, bound, wanted, *problem, *config
            )
        else:
            found, dropped, *gradients = linear_gradient(
                statistics, *coefficients, bound, wanted, *problem, *config
            )
        statistics = found if statistics is None else statistics
        valid = tensors[-1]
        loss = ops.row_losses(statistics, weights, valid)
        if summed:
            loss = (loss * scale).sum()
        ctx.save_for_backward(valid, late, *gradients)
        ctx.layout, ctx.wanted, ctx.count, ctx.backend = layout, wanted, len(tensors), config[-1]
        ctx.mark_non_differentiable(statistics, dropped)
        return loss, statistics, dropped

    @staticmethod
    @ops.first_order
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        valid, late, *gradients = ctx.saved_tensors
        if ops.graph_is_kept():
            gradients = [gradient.clone() for gradient in gradients]
        upstream = upstream.reshape(-1)
        if valid is not None and upstream.shape == valid.shape:
            upstream = torch.where(valid, upstream, 0.0)
        if late is not None:
            upstream = upstream * late
        for gradient in gradients:
            ops.scale_rows(gradient, upstream.contiguous(), ctx.backend)
        found = ctx.layout.spread(ctx.wanted, gradients, ctx.count)
        return *(None,) * 10, *found
