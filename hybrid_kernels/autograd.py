"""What the autograd functions need beyond torch: bags of tensors, kept graphs, one derivative."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_TENSOR = object()  # stands where `save` took a tensor out


def _replace_each(value: Any, function: Callable) -> Any:
    """The value with every leaf of its NamedTuples and sequences replaced."""
    if not isinstance(value, list | tuple):
        return function(value)
    items = [_replace_each(item, function) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def save(ctx, *values: Any) -> None:
    """Saves tensors, and NamedTuples that hold tensors, for the backward.

    Autograd itself saves only tensors that it is given one by one.
    """
    tensors = []

    def take(value):
        if not isinstance(value, Tensor):
            return value
        tensors.append(value)
        return _TENSOR

    ctx.values = _replace_each(values, take)
    ctx.save_for_backward(*tensors)


def saved(ctx) -> Any:
    """The values that `save` was given."""
    tensors = iter(ctx.saved_tensors)
    return _replace_each(ctx.values, lambda value: next(tensors) if value is _TENSOR else value)


def anchors(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Empty tensors that depend on those that want a gradient, without keeping their memory.

    A gradient that is computed in the forward depends on tensors that the backward does not see.
    These stand for them when the gradient of that gradient is asked for.
    """
    if torch.compiler.is_compiling():
        return []  # compiled functions have no second derivatives
    with torch.enable_grad():
        return [t[..., :0].clone() for t in tensors if t is not None and t.requires_grad]


class _NoSecondDerivative(torch.autograd.Function):
    """The identity in `gradient`, which depends on the other tensors in a way that has no
    derivative."""

    @staticmethod
    def forward(ctx, gradient, *depends_on):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(
            "hybrid_kernels: the gradient is a closed form and has no second derivative; use "
            "hybrid_kernels.reference where you need one"
        )


def first_order(backward):
    """A backward whose results raise an error when they are differentiated again, with respect to
    what `ctx.anchors` stand for or to the upstream gradients.

    Under create_graph=True they would otherwise count as constants, and nobody would notice.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *upstream):
        keeps_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if keeps_graph:
            gradients = tuple(
                None
                if gradient is None
                else _NoSecondDerivative.apply(gradient, *ctx.anchors, *upstream)
                for gradient in gradients
            )
        return gradients

    return wrapped


def graph_is_kept() -> bool:
    """Whether backward may run again (retain_graph=True), so that its buffer must survive."""
    if torch.compiler.is_compiling():
        return False  # the compiler functionalises: the saved tensor is never written
    # What autograd's own compiler asks before it reuses a saved buffer.
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


def scales_late(*tensors: Tensor) -> bool:
    """Whether a gradient has to wait for the upstream one.

    A mean over thousands of rows makes it smaller than fp16 can hold, and a loss scale that is
    applied afterwards comes too late.
    """
    return any(tensor.dtype == torch.float16 for tensor in tensors)


def row_upstream(upstream: Tensor, valid: Tensor | None, on_masked: float) -> Tensor:
    """The upstream gradient of a loss, `[N]` or one element.

    Args:
        on_masked: what masked rows get. 1 leaves their gradients as they are; 0 clears them, which
            costs a pass.
    """
    upstream = upstream.reshape(-1)
    if valid is not None and upstream.shape == valid.shape:
        upstream = torch.where(valid, upstream, on_masked)
    return upstream.contiguous()
