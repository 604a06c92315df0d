"""Output layers, given as tensors or modules, as the plain tensors of a sum of products.

    logits = softcap tanh(logit_scale (sum_i hidden_i weight_i^T + bias) / softcap)

The weight is one product. Each active LoRA adapter adds another, with hidden_1 = s (hidden A^T) and
weight_1 = B, so that it costs a product of rank r and no `[V, D]` copy, and the frozen weight below
it needs no gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrid_kernels import checks, validate
from hybrid_kernels.linear.layers import unwrapped
from hybrid_kernels.types import LinearTeacher, OutputLayer

WEIGHT = "a [V, D] tensor or an output layer with such a `weight`"


class LinearStudent(NamedTuple):
    """The student as the caller passed it to a linear function."""

    hidden: Tensor
    weight: Tensor | nn.Module | OutputLayer
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class Head(NamedTuple):
    """The hidden states and output layer of a student or teacher, as plain tensors.

    Attributes:
        hiddens: `[N, D_i]`, contiguous.
        weights: `[V, D_i]`, of the same dtype.
        bias: `[V]` or None.
        logit_scale: factor on the products.
        softcap: 0 where there is none.
    """

    hiddens: Sequence[Tensor]
    weights: Sequence[Tensor]
    bias: Tensor | None
    logit_scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        name: str,
        options: str,
        side: "LinearStudent | LinearTeacher",
        valid: Tensor | None = None,
    ) -> "Head":
        """Checks an output layer and returns its tensors.

        Args:
            name: the prefix of the arguments' names in messages.
            options: the same for softcap and scale.
            side: the hidden states, already checked, and the layer.
            valid: bool `[N]`, the rows that count. The others may hold NaN, which a GEMM would
                spread into the gradient of an adapter.
        """
        hidden, weight, bias = side.hidden, side.weight, side.bias
        softcap, logit_scale = side.softcap, side.logit_scale
        if isinstance(weight, OutputLayer):
            validate.head_options(options, softcap, logit_scale)
            validate.not_twice(name, options, bias, softcap, logit_scale)
            options = f"{name}weight: OutputLayer."
            softcap, logit_scale = weight.softcap, weight.logit_scale
            layer = weight.layer
            weight, bias = layer, None if isinstance(layer, nn.Module) else weight.bias
        validate.head_options(options, softcap, logit_scale)
        dtype, autocast = hidden.dtype, _is_autocast(hidden.device.type)
        if autocast:
            # A linear layer does the same.
            dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        hiddens, weights = [hidden], []
        if isinstance(weight, nn.Module):
            module, adapters = unwrapped(name, weight)
            layer_bias = getattr(module, "bias", None)
            if layer_bias is not None and bias is not None:
                raise ValueError(f"{name}bias: given, but the layer has one; leave it out")
            bias = layer_bias if bias is None else bias
            weight = getattr(module, "weight", None)
            masked = hidden
            if adapters and valid is not None:
                masked = hidden.masked_fill(~valid.reshape(-1, 1), 0.0)
            for down, up, scaling in adapters:
                factor = _whole(f"{name}weight", WEIGHT, down.weight, None)
                low = nn.functional.linear(masked.to(factor.dtype), factor)
                hiddens.append((low * scaling).to(dtype))
                weights.append(_whole(f"{name}weight", WEIGHT, up.weight, dtype))
        _check_partition(name, weight)
        cast = dtype if autocast or checks.is_dtensor(weight) else None
        weights.insert(0, _whole(f"{name}weight", WEIGHT, weight, cast))
        bias = None if bias is None else _whole(f"{name}bias", "a [V] tensor", bias, None)
        validate.head(name, weights[0], bias, hidden)
        hiddens = [states.contiguous() for states in hiddens]
        return cls(hiddens, weights, bias, float(logit_scale), float(softcap or 0.0))

    def detached(self) -> "Head":
        """The same layer without a gradient, though its parameters may be trained elsewhere."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(weights=[weight.detach() for weight in self.weights], bias=bias)


def _is_autocast(device: str) -> bool:
    """Whether autocast is on; some devices ("meta") have none."""
    # torch 2.10's compiler can't trace `is_autocast_available`.
    exists = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return exists and torch.is_autocast_enabled(device)


def _check_partition(name: str, weight: Any) -> None:
    """Rejects a parameter that DeepSpeed ZeRO-3 has left empty outside its module's forward."""
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{name}weight: partitioned by DeepSpeed ZeRO-3 and not gathered; call the loss "
            "inside the forward of a module on which "
            "deepspeed.zero.register_external_parameter(module, weight) was called"
        )


def _whole(name: str, expected: str, weight: Any, dtype: torch.dtype | None) -> Tensor:
    """The whole weight or bias on this rank, converted to `dtype` unless that is None."""
    is_sharded = checks.is_dtensor(weight)
    if not is_sharded:
        weight = checks.tensor(name, weight, expected)
        if checks.has_memory(weight) and weight.numel() and not weight.untyped_storage().size():
            raise ValueError(
                f"{name}: its memory is freed, as FSDP does after a module's forward; call the "
                "loss inside of that, or while parameters are whole"
            )
    checks.floating(name, weight)
    if dtype is not None and weight.dtype != dtype:
        weight = weight.to(dtype)  # before gathering, which then moves fewer bytes
    return _Gather.apply(weight) if is_sharded else weight


class _Gather(torch.autograd.Function):
    """Gathers a DTensor of FSDP2 (`fully_shard`) for the forward.

    The backward averages the gradients of the ranks, which see different data, and scatters the
    mean, as FSDP2 does.
    """

    @staticmethod
    def forward(ctx, weight):
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        return weight.full_tensor()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        share = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return share.redistribute(placements=ctx.placements)
