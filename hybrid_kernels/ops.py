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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import validate
from hybrid_kernels.rows import COEFFICIENTS, FIELDS, ROWS, Coefficients, Rows, per_row, weighted
from hybrid_kernels.sharded import Sharded


def launchers(backend: str) -> ModuleType:
    if backend == "triton":
        from hybrid_kernels.triton_backend import launch as module
    else:
        from hybrid_kernels import cpu as module
    return module


def implementation(rows: Rows) -> ModuleType | Sharded:
    """What computes rows of logits: a backend, or one on each rank of the group that shares the
    vocabulary."""
    module = launchers(rows.backend)
    return Sharded(module, rows.group, rows.student) if rows.group else module


def check_values(rows: Rows) -> None:
    """The checks that read tensors: on the CPU, and in debug mode. Whether ids are in range is for
    `sharded.py` to say where several ranks share the vocabulary."""
    if rows.student.device.type != "cpu" and not validate.debug():
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
def row_statistics(*args):
    rows = Rows.of(*args)
    check_values(rows)
    statistics = rows.statistics()
    implementation(rows).row_statistics(rows, statistics)
    return statistics


@row_statistics.register_fake
def _(*args) -> Tensor:
    return Rows(*args).statistics()


@torch.library.custom_op(
    "hybrid_kernels::row_gradient",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!) gradient, Tensor statistics, {COEFFICIENTS}, {ROWS}) -> ()",
)
@without_autocast
def row_gradient(gradient, statistics, c_div, c_logp, c_ent, *args):
    rows, coefficients = Rows.of(*args), Coefficients(c_div, c_logp, c_ent)
    implementation(rows).row_gradient(rows, statistics, coefficients, gradient)


@row_gradient.register_fake
def _(*args) -> None:
    return None


@torch.library.custom_op(
    "hybrid_kernels::hybrid_rows",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!) gradient, {COEFFICIENTS}, {ROWS}) -> Tensor",
)
@without_autocast
def hybrid_rows(gradient, c_div, c_logp, c_ent, *args):
    rows, coefficients = Rows.of(*args), Coefficients(c_div, c_logp, c_ent)
    check_values(rows)
    statistics = rows.statistics()
    implementation(rows).hybrid_rows(rows, statistics, coefficients, gradient)
    return statistics


@hybrid_rows.register_fake
def _(gradient, c_div, c_logp, c_ent, *args) -> Tensor:
    return Rows(*args).statistics()


@torch.library.custom_op("hybrid_kernels::scale_rows", mutates_args=("gradient",))
def scale_rows(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """Multiplies each row of `gradient` by `factor` (`[N]` or one element); 1 touches nothing."""
    # (Logits are [O, I, V]. What is not: see `linear_ops`. A view outside would be a mutated view
    # of unknown size to the compiler.)
    rows = gradient if gradient.ndim == 3 else gradient.view(1, -1, gradient.shape[-1])
    launchers(backend).scale_rows(rows, factor)


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


_TENSOR = object()  # where `keep` took a tensor out


def _each(value: Any, function: Callable) -> Any:
    """The value with all that its NamedTuples and sequences hold replaced."""
    if not isinstance(value, list | tuple):
        return function(value)
    items = [_each(item, function) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def keep(ctx, *values: Any) -> None:
    """Saves tensors, and NamedTuples that hold some, for the backward: autograd itself takes
    tensors one by one only."""
    tensors = []

    def take(value):
        if not isinstance(value, Tensor):
            return value
        tensors.append(value)
        return _TENSOR

    ctx.values = _each(values, take)
    ctx.save_for_backward(*tensors)


def kept(ctx) -> Any:
    """What `keep` was given."""
    tensors = iter(ctx.saved_tensors)
    return _each(ctx.values, lambda value: next(tensors) if value is _TENSOR else value)


class TokenTermsFunction(torch.autograd.Function):
    """Statistics whose first rows are differentiable with any upstream gradient."""

    @staticmethod
    def forward(ctx, student, rows):
        statistics = row_statistics(*rows)
        # Not log q(y): the gradient of the value needs no correction.
        keep(ctx, rows._replace(token_log_prob=None), statistics)
        return statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, statistics = kept(ctx)
        gradient = _gradient_of(rows.student)
        row_gradient(gradient, statistics, *upstream_coefficients(upstream, rows), *rows)
        return gradient, None


def upstream_coefficients(upstream: Tensor, rows: Rows) -> Coefficients:
    """Of the differentiable statistics."""
    return Coefficients(
        upstream[FIELDS.divergence].contiguous() if rows.teachers else None,
        upstream[FIELDS.log_prob].contiguous() if rows.token_ids is not None else None,
        upstream[FIELDS.entropy].contiguous(),
    )


class HybridLossFunction(torch.autograd.Function):
    """The loss and its gradient in one forward; backward scales the gradient by the upstream one.
    In fp16 the gradient of a scalar loss is made in the backward, see `scales_late`.

    `scale` is the normaliser, a scalar tensor; `summed` says whether the loss is a scalar or one
    per row; `statistics`, where given, are those of the same rows, measured for a callable
    `advantages`.
    """

    @staticmethod
    def forward(ctx, student, rows, weights, scale, statistics, summed, inplace):
        own = coefficients(weights, scale)
        late = summed and scales_late(student)
        gradient = None
        if late:
            statistics = row_statistics(*rows) if statistics is None else statistics
            keep(ctx, rows, own, statistics)
        else:
            gradient = _gradient_of(student, inplace)
            if statistics is None:
                statistics = hybrid_rows(gradient, *own, *rows)
            else:
                row_gradient(gradient, statistics, *own, *rows)
            ctx.save_for_backward(gradient, rows.valid)
        loss = row_losses(statistics, weights, rows.valid)
        if summed:
            loss = (loss * scale).sum()
        ctx.late, ctx.inplace, ctx.backend = late, inplace, rows.backend
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    @first_order
    def backward(ctx, upstream, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.late:
            rows, own, statistics = kept(ctx)
            own = (None if c is None else c * upstream for c in own)
            gradient = _gradient_of(rows.student, ctx.inplace and not graph_is_kept())
            row_gradient(gradient, statistics, *own, *rows)
            return gradient, *(None,) * 6
        gradient, valid = ctx.saved_tensors
        if graph_is_kept():
            gradient = gradient.clone()
        scale_rows(gradient, row_upstream(upstream, valid), ctx.backend)
        return gradient, *(None,) * 6


def row_upstream(upstream: Tensor, valid: Tensor | None) -> Tensor:
    """The upstream gradient of a loss, `[N]` or one element; 0 on masked rows."""
    upstream = upstream.reshape(-1)
    if valid is not None and upstream.shape == valid.shape:
        upstream = torch.where(valid, upstream, 0.0)
    return upstream.contiguous()


def scales_late(*tensors: Tensor) -> bool:
    """Whether a gradient has to wait for the upstream one: a mean over thousands of rows takes it
    below what fp16 can hold, and a loss scale would come too late."""
    return any(tensor.dtype == torch.float16 for tensor in tensors)


class Weights(NamedTuple):
    """Weights of the three terms of the loss: a number, a tensor `[]` or `[R]`, whose elements are
    for N/R consecutive rows each, or None."""

    dense: float | Tensor | None
    advantages: Tensor | None
    entropy: float | Tensor | None


def row_losses(statistics: Tensor, weights: Weights, valid: Tensor | None) -> Tensor:
    """`dense * D - advantages * log p(y) - entropy_weight * H` per row; 0 on masked rows.

    The correction for tokens sampled outside a top-K support is part of the advantages: it is 0
    where there is none.
    """
    dense, advantages, entropy = (
        per_row(weight, statistics.shape[1]) if isinstance(weight, Tensor) else weight
        for weight in weights
    )
    loss = None
    if dense is not None:
        corrected = weighted(statistics[FIELDS.tail_correction], statistics[FIELDS.log_prob])
        loss = statistics[FIELDS.divergence] + corrected
        loss = weighted(dense, loss)
    if advantages is not None:
        sparse = weighted(advantages, statistics[FIELDS.log_prob])
        loss = -sparse if loss is None else loss - sparse
    if entropy is not None:
        bonus = weighted(entropy, statistics[FIELDS.entropy])
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
    # gets autograd's error that they were overwritten.
    if inplace:
        return student.detach()
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def graph_is_kept() -> bool:
    """Whether backward may run again (retain_graph=True), so that its buffer must survive."""
    if torch.compiler.is_compiling():
        return False  # the compiler functionalises: the saved tensor is never written
    # What autograd's own compiler asks before it reuses a saved buffer.
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
