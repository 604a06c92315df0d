"""What a single argument may be: a dense tensor, a number, a choice, a value for each row.

Each failure is a ValueError that names the argument, states what was passed and how to correct it.
Every tensor that a caller gives passes through `tensor`. Values are read on the CPU or in debug
mode only, so that no check synchronises a device.
"""

import math
import numbers
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What is neither 0 nor infinite in fp32, in which everything here is computed.
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def debug() -> bool:
    """Whether `HYBRID_KERNELS_DEBUG=1` turns on the checks that synchronise the device."""
    return os.environ.get("HYBRID_KERNELS_DEBUG", "0") not in ("", "0")


def is_readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at here: not on a device, whose queue would have
    to empty first, and not while a compiler or transform traces, when there are none."""
    return has_memory(tensor) and (tensor.device.type == "cpu" or debug())


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is more than a stand-in, as those of a compiler or transform are."""
    return not (torch.compiler.is_compiling() or _dispatches(tensor) or in_transform())


def in_transform() -> bool:
    """Whether this is called inside of one of torch.func's transforms, such as vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def _dispatches(tensor: Tensor) -> bool:
    """Whether operators on a tensor are computed by its class."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__  # pyright: ignore


def tensor(name: str, value: object, expected: str) -> Tensor:
    """Checks for a tensor that is a dense block of numbers, all that a kernel can read."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        mend = "; use torch.tensor(...)" if kind in ("list", "tuple", "ndarray") else ""
        raise ValueError(f"{name}: expected {expected}, got {kind}{mend}")
    common = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not common or value.is_nested or value.is_quantized:
        found = _not_dense(value)
        if found is not None:
            raise ValueError(f"{name}: expected {expected}, got {found}")
    return value


def _not_dense(value: Tensor) -> str | None:
    """What a tensor is that is no dense block of numbers, and what to give in its place."""
    kind = type(value).__name__
    if kind.startswith("Uninitialized"):  # `is_lazy` can't be compiled
        return f"an {kind}, whose shape is not known yet; call its lazy module once"
    if value.is_nested:
        packed = "torch.cat(x.unbind()),"
        if value.layout == torch.jagged:
            packed = "its .values(), with cu_seqlens=x.offsets() where that is an argument,"
        return f"a nested tensor; give {packed} and all other arguments packed in the same way"
    if is_dtensor(value):
        return (
            "a DTensor; give its .to_local(), with process_group=mesh.get_group() where it is "
            "sharded over the vocabulary, or its .full_tensor()"
        )
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}; use .to_dense()"
    if value.is_quantized:
        return "a quantized tensor; use .dequantize()"
    if not _dispatches(value) or hasattr(value, "trigger_wait"):  # a collective's, waits if used
        return None
    if kind in ("FakeTensor", "FunctionalTensor"):  # those that compilers trace with
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return None
        return f"a {kind}; call this under its mode, or give a tensor with values"
    return f"a tensor of class {kind}; give the Tensor that it stands for, as .dequantize() may do"


def is_dtensor(value: object) -> bool:
    return hasattr(value, "full_tensor") and hasattr(value, "placements")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name}: on {value.device}, expected {device}; use {name}.to({str(device)!r})"
        )


def no_grad_wanted(name: str, value: Tensor) -> None:
    if value.requires_grad:
        expression = name.rpartition(" ")[2]
        action = "run the teacher" if name.startswith("teacher") else "compute it"
        raise ValueError(
            f"{name}: requires a gradient, but gets none here; {action} under torch.no_grad(), or "
            f"pass {expression}.detach()"
        )


def integers(name: str, value: object, expected: str) -> Tensor:
    ids = tensor(name, value, expected)
    if ids.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected int64 or int32, got {ids.dtype}; use .long()")
    return ids


def floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}; cast it, "
            "or dequantize what is quantized"
        )


def choice(name: str, value: object, options: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: unknown value {value!r}; expected one of {', '.join(options)}")


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of a kind. Truth values and NumPy's spans of time, which count as
    integers, are none."""
    return isinstance(value, kind) and type(value).__name__ not in ("bool", "timedelta64")


def real(value: Any) -> float | None:
    """A real number of Python or NumPy as Python's own, infinite where it is too large for one;
    torch.compile's symbolic ones stay as they are. None for anything else."""
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value  # pyright: ignore[reportReturnType]
    if not _is(numbers.Real, value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    positive: bool = False,
    expected: str = "a number",
) -> float:
    """Checks for a finite number, in fp32 too, between `low` and `high`, or above 0.

    Returns:
        The number as Python's own, or torch.compile's symbolic one.
    """
    result = real(value)
    if result is None:
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    inside = (result > 0 if positive else result >= low) and result <= high
    if inside and -LARGEST <= result <= LARGEST and (result >= SMALLEST or not positive):
        return result
    left = "(0" if positive else f"({low:g}" if low == -math.inf else f"[{low:g}"
    right = ")" if high == math.inf else "]"
    rounded = " when rounded to fp32" if inside and math.isfinite(result) else ""
    raise ValueError(f"{name}: {value!r} is not in {left}, {high:g}{right}{rounded}")


def whole_number(name: str, value: Any, expected: str, low: int = 1, high: float = math.inf) -> int:
    """Checks for a whole number between `low` and `high`, of Python or NumPy, and returns it (the
    largest that operators take, where it is larger)."""
    if not _is(numbers.Integral, value) or not low <= value <= high:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return min(int(value), sys.maxsize)


def scalar(
    name: str, value: object, device: torch.device, *, positive: bool = False
) -> float | Tensor:
    """Checks for a finite number, or a tensor that holds one, which is detached.

    Returns:
        A number; where reading it would synchronise the device, an fp32 tensor `[]`.
    """
    if isinstance(value, Tensor):
        value = tensor(name, value, "a number or a scalar tensor").detach()
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected a number or a scalar tensor, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        if not is_readable(value):
            if value.device.type != "cpu":
                same_device(name, value, device)
            return value.float().reshape(())
        value = value.item()
    return number(name, value, positive=positive, expected="a number or a scalar tensor")


class CallShape(NamedTuple):
    """What the tensors of one call have in common.

    Attributes:
        leading: the dimensions `[...]` before the vocabulary.
        device: the device of all tensors.
        vocabulary: V.
        sharded: whether V is the size of a shard of a larger vocabulary.
    """

    leading: torch.Size
    device: torch.device
    vocabulary: int = 0
    sharded: bool = False


def same_rows(name: str, leading: torch.Size, shape: CallShape) -> None:
    if leading != shape.leading:
        raise ValueError(
            f"{name}: leading shape {tuple(leading)}, expected {tuple(shape.leading)}, the shape "
            "of the logits without the vocabulary"
        )


def token_ids(value: object, shape: CallShape) -> Tensor:
    ids = integers("token_ids", value, "an integer tensor")
    same_rows("token_ids", ids.shape, shape)
    same_device("token_ids", ids, shape.device)
    return ids


def largest_id(name: str, ids: Tensor, vocabulary: int) -> None:
    """Checks that ids are below V, where values may be read. Negative ones are no ids."""
    if is_readable(ids) and bool((ids >= vocabulary).any()):
        raise ValueError(
            f"{name}: {int(ids.max())} is outside the vocabulary [0, {vocabulary}); check that it "
            "is that of the logits"
        )


def row_mask(value: object, shape: CallShape) -> None:
    mask = tensor("mask", value, "a bool tensor, or one of 0 and 1")
    if mask.is_complex():
        raise ValueError(f"mask: expected bool, or numbers 0 and 1, got {mask.dtype}")
    if mask.shape != shape.leading:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}, expected {tuple(shape.leading)}, a value per token"
        )
    same_device("mask", mask, shape.device)
    no_grad_wanted("mask", mask)
    if mask.dtype != torch.bool and is_readable(mask):
        wrong = (mask != 0) & (mask != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"mask: has {mask[wrong][0].item():g}, expected 0 and 1; weights of tokens belong "
                "into other arguments"
            )


def row_values(
    name: str, value: object, shape: CallShape, *, positive: bool = False
) -> float | Tensor:
    """Checks a number or a floating tensor with a value for each row, and returns it.

    A tensor is `[]`, `[...]`, or `[...]` with a last dimension of 1, whose value the rows along
    that dimension share. The range is checked for numbers only, of which `[]` on a CPU is one.
    """
    kinds = "a number or a tensor"
    if isinstance(value, Tensor):
        value = tensor(name, value, kinds)
        no_grad_wanted(name, value)
        if value.ndim == 0 and is_readable(value):
            value = value.item()
        elif not value.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor, got {value.dtype}; use .float()")
    if not isinstance(value, Tensor):
        return number(name, value, positive=positive, expected=kinds)
    shared = (*shape.leading[:-1], 1)
    if value.ndim and value.shape not in (shape.leading, shared):
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}, expected {tuple(shape.leading)}, one value for "
            f"each token, or {shared}, one for all tokens of a sequence; of [B] values make "
            f"{name}[:, None]"
        )
    same_device(name, value, shape.device)
    return value
