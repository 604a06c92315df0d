"""All input checks of the package.

Each failure is a ValueError that names the argument, states what was passed and how to correct it.
Values are read on the CPU or in debug mode only, so that no check synchronises a device.
"""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hybrid_kernels.divergences import Divergence
from hybrid_kernels.types import LinearTeacher, Mixture, TopK

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
TAILS = ("bucket", "renormalize", "mask")
BACKENDS = ("auto", "torch", "triton")
MAX_SUPPORT = 1024  # the largest K of a top-K teacher on Triton


def debug() -> bool:
    """Whether `HYBRID_KERNELS_DEBUG=1` turns on the checks that synchronise the device."""
    return os.environ.get("HYBRID_KERNELS_DEBUG", "0") not in ("", "0")


def is_readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor may be looked at here: not on a device, whose queue would have
    to empty first, and not while a compiler traces, when there are none."""
    has_values = type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return has_values and (tensor.device.type == "cpu" or debug())


def student(logits: Tensor) -> None:
    _logits("student_logits", logits)


def no_tangents(name: str, *tensors: Tensor | None) -> None:
    """Rejects forward-mode differentiation, whose tangents operators would drop."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name}: has a tangent, but there is no forward-mode derivative here; use reverse "
                "mode, such as loss.backward()"
            )


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


def teacher(value: object, shape: CallShape) -> list[tuple[float, Tensor | TopK | LinearTeacher]]:
    """Checks a teacher against the student; returns its weighted members, none for None."""
    members = [] if value is None else _members(value)
    supports = []
    for _, member in members:
        if isinstance(member, TopK):
            _top_k(member, shape)
            supports.append(member)
        elif isinstance(member, LinearTeacher):
            _linear_teacher(member, shape)
        else:
            _full_teacher(member, shape)
    if supports and len(supports) < len(members):
        raise ValueError(
            "teacher: a Mixture of TopK teachers and of full ones; give all of them in one form "
            "(TopK.from_logits makes a TopK from logits)"
        )
    if any(not _same_tensor(other.ids, supports[0].ids) for other in supports[1:]):
        raise ValueError(
            "teacher: the TopK members of a Mixture have different supports; give all of them the "
            "same `ids` tensor, as TopK.from_logits(logits, ids=ids) does"
        )
    return members


def _members(value: object) -> list[tuple[float, Any]]:
    if not isinstance(value, Mixture):
        return [(1.0, value)]
    pairs = value.members
    if not isinstance(pairs, Sequence) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError(
            "teacher: the members of a Mixture are a list of (weight, teacher) pairs, got "
            f"{type(pairs).__name__}"
        )
    if not pairs:
        raise ValueError("teacher: a Mixture without members; give (weight, teacher) pairs")
    for weight, member in pairs:
        number("teacher: the weight of a Mixture's member", weight, low=0.0, open_low=True)
        if isinstance(member, Mixture):
            raise ValueError("teacher: a Mixture inside a Mixture; give all members at once")
    return [(float(weight), member) for weight, member in pairs]


def _full_teacher(value: object, shape: CallShape) -> None:
    _logits("teacher", value)
    assert isinstance(value, Tensor)
    if value.shape[-1] != shape.vocabulary:
        raise ValueError(
            f"teacher: vocabulary of {value.shape[-1]} entries, the student has "
            f"{shape.vocabulary}; where the models pad differently, slice both to the "
            "shared prefix (logits[..., :V] needs no copy)"
        )
    _same_rows("teacher", value.shape[:-1], shape)
    _same_device("teacher", value, shape.device)
    no_grad_wanted("teacher", value)


def _linear_teacher(value: LinearTeacher, shape: CallShape) -> None:
    hidden("teacher: LinearTeacher.hidden", value.hidden)
    _same_rows("teacher: LinearTeacher.hidden", value.hidden.shape[:-1], shape)
    _same_device("teacher: LinearTeacher.hidden", value.hidden, shape.device)
    no_grad_wanted("teacher: LinearTeacher.hidden", value.hidden)


def hidden(name: str, value: object) -> None:
    """Checks hidden states `[..., D]`."""
    value = _tensor(name, value, "a [..., D] tensor")
    _supported_dtype(name, value)
    if value.ndim < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., D], D >= 1, got {tuple(value.shape)}")


def head_options(prefix: str, softcap: object, logit_scale: object) -> None:
    if softcap is not None:
        number(f"{prefix}softcap", softcap, low=0.0, open_low=True)
    number(f"{prefix}logit_scale", logit_scale)


def not_twice(name: str, options: str, bias: object, softcap: object, logit_scale: object) -> None:
    """Checks that nothing is given next to an `OutputLayer` that it brings."""
    given = {
        f"{name}bias": bias is not None,
        f"{options}softcap": softcap is not None,
        f"{options}logit_scale": logit_scale != 1.0,
    }
    for argument, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{argument}: given twice, since {name}weight is an OutputLayer, which brings it; "
                "leave it out"
            )


def head(name: str, weight: Tensor, bias: Tensor | None, states: Tensor) -> None:
    """Checks an output layer's weight `[V, D]` and bias `[V]` against hidden states `[..., D]`."""
    size = states.shape[-1]
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != size:
        raise ValueError(
            f"{name}weight: expected shape [V, {size}] for hidden states [..., {size}], got "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != states.dtype:
        raise ValueError(
            f"{name}weight: {weight.dtype}, but the hidden states are {states.dtype}; cast one of "
            "them, or use torch.autocast"
        )
    _same_device(f"{name}weight", weight, states.device)
    _plain(f"{name}weight", weight)
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
        got = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"{name}bias: expected shape [{weight.shape[0]}], got {got}")
    if not bias.is_floating_point():
        raise ValueError(f"{name}bias: expected a floating tensor, got {bias.dtype}")
    _same_device(f"{name}bias", bias, states.device)
    _plain(f"{name}bias", bias)


def same_vocabulary(teacher_weight: Tensor, vocabulary: int) -> None:
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"teacher: LinearTeacher.weight has a vocabulary of {teacher_weight.shape[0]} entries, "
            f"the student {vocabulary}; where the models pad differently, slice both weights to "
            "the shared prefix (weight[:V] needs no copy)"
        )


def linear_options(
    chunk_rows: object, logits_dtype: Any, grad_filter: object, drop_masked: Any
) -> tuple[int | None, torch.dtype, float, bool]:
    """Checks the options of chunks, and returns them with Python's numbers."""
    if chunk_rows is not None:
        kinds = "a whole number above 0, or None for an automatic choice"
        chunk_rows = whole_number("chunk_rows", chunk_rows, kinds)
    if logits_dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits_dtype: expected float32, bfloat16 or float16, got {logits_dtype!r}"
        )
    if not isinstance(drop_masked, bool):
        raise ValueError(f"drop_masked: expected True or False, got {drop_masked!r}")
    return chunk_rows, logits_dtype, number("grad_filter", grad_filter, low=0.0), drop_masked


def _top_k(value: TopK, shape: CallShape) -> None:
    tensors = {"ids": value.ids, "log_probs": value.log_probs}
    if value.token_log_prob is not None:
        tensors["token_log_prob"] = value.token_log_prob
    for name, tensor in tensors.items():
        name = f"teacher: TopK.{name}"
        tensor = _tensor(name, tensor, "a tensor")
        _same_device(name, tensor, shape.device)
        no_grad_wanted(name, tensor)
        if not name.endswith("ids"):
            _supported_dtype(name, tensor)
        elif tensor.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name}: expected int64 or int32, got {tensor.dtype}")
    ids, log_probs = value.ids, value.log_probs
    if ids.ndim < 1 or ids.shape != log_probs.shape or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher: TopK.ids has shape {tuple(ids.shape)} and log_probs "
            f"{tuple(log_probs.shape)}; both are [..., K], K >= 1"
        )
    _same_rows("teacher: TopK", ids.shape[:-1], shape)
    if value.token_log_prob is not None:
        _same_rows("teacher: TopK.token_log_prob", value.token_log_prob.shape, shape)
    vocabulary = shape.vocabulary
    if ids.shape[-1] > vocabulary and not shape.sharded:
        raise ValueError(
            f"teacher: a TopK support of {ids.shape[-1]} ids for a vocabulary of {vocabulary}; "
            "check that teacher and student have the same tokenizer, and drop repeated ids"
        )


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of the same memory with the same layout; does not compare values."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return alike and not torch.compiler.is_compiling() and a.data_ptr() == b.data_ptr()


def support_size(size: int) -> None:
    """Checks that the Triton kernels can hold a support of this size."""
    if size > MAX_SUPPORT:
        raise ValueError(
            f"teacher: a TopK support of {size} ids, more than the {MAX_SUPPORT} that the Triton "
            "kernels hold; give fewer, or the full logits"
        )


def token_log_probs(values: Tensor, valid: Tensor | None) -> None:
    """Checks that log-probabilities on valid rows are at most 0, up to rounding. Reads values."""
    wrong = values > 1e-2
    wrong = wrong if valid is None else wrong & valid
    if bool(wrong.any()):
        raise ValueError(
            f"teacher: TopK.token_log_prob has {float(values[wrong][0]):g}, but log-probabilities "
            "are at most 0"
        )


def support_values(
    ids: Tensor, log_probs: Tensor, valid: Tensor | None, vocabulary: int, resolution: float
) -> None:
    """Checks on valid rows that ids are in [-1, V) and masses are at most 1. Reads values."""
    if valid is not None:
        ids, log_probs = ids[valid], log_probs[valid]
    wrong = (ids < -1) | (ids >= vocabulary)
    if bool(wrong.any()):
        raise ValueError(
            f"teacher: TopK.ids has {int(ids[wrong][0])}, which is outside the vocabulary "
            f"[0, {vocabulary}); -1 is padding"
        )
    ordered, order = ids.sort(-1)
    distinct = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    counts = (ordered >= 0) & distinct
    log_probs = log_probs.gather(-1, order).double()
    # Allows for arithmetic in fp32 and several roundings to the dtype of the log-probabilities.
    slack = 1e-4 + 4 * resolution * (1 + log_probs.abs())
    positive = counts & (log_probs > slack)
    if bool(positive.any()):
        raise ValueError(
            f"teacher: TopK.log_probs has {float(log_probs[positive][0]):g}, but log-probabilities "
            "are at most 0; give the log_softmax over the whole vocabulary, not logits"
        )
    q = torch.where(counts, log_probs.exp(), 0.0)
    mass, allowed = q.sum(-1), 1 + (q * slack).sum(-1)
    if bool((mass > allowed).any()):
        raise ValueError(
            f"teacher: TopK.log_probs sum to a mass of {float(mass[mass > allowed][0]):g}, more "
            "than 1; give the log_softmax over the whole vocabulary, without rounding it to a few "
            "decimals"
        )


def no_grad_wanted(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        expression = name.rpartition(" ")[2]
        action = "run the teacher" if name.startswith("teacher") else "compute it"
        raise ValueError(
            f"{name}: requires a gradient, but gets none here; {action} under torch.no_grad(), or "
            f"pass {expression}.detach()"
        )


def can_be_saved(name: str, tensor: object) -> None:
    """Rejects inference tensors, which autograd can't save for the backward."""
    if isinstance(tensor, Tensor) and not torch.compiler.is_compiling() and tensor.is_inference():
        raise ValueError(
            f"{name}: made under torch.inference_mode(), so it can't be saved for the backward; "
            f"make it under torch.no_grad(), or pass {name}.clone()"
        )


def token_ids(ids: object, shape: CallShape) -> None:
    ids = _tensor("token_ids", ids, "an integer tensor")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"token_ids: expected int64 or int32, got {ids.dtype}; use .long()")
    _same_rows("token_ids", ids.shape, shape)
    _same_device("token_ids", ids, shape.device)


def token_ids_in_range(ids: Tensor, valid: Tensor | None, vocabulary: int) -> None:
    """Checks that the id of every valid row lies in [0, V). Reads values."""
    wrong = (ids < 0) | (ids >= vocabulary)
    if valid is not None:
        wrong = wrong & valid
    if bool(wrong.any()):
        raise ValueError(
            f"token_ids: {int(ids[wrong][0])} is outside the vocabulary [0, {vocabulary}); "
            "mask such rows, or set their ids to -100"
        )


def row_mask(mask: object, shape: CallShape) -> None:
    mask = _tensor("mask", mask, "a bool tensor, or one of 0 and 1")
    if mask.is_complex():
        raise ValueError(f"mask: expected bool, or numbers 0 and 1, got {mask.dtype}")
    if mask.shape != shape.leading:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}, expected {tuple(shape.leading)}, a value per token"
        )
    _same_device("mask", mask, shape.device)
    if mask.dtype != torch.bool and is_readable(mask):
        wrong = (mask != 0) & (mask != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"mask: has {mask[wrong][0].item():g}, expected 0 and 1; weights of tokens belong "
                "into other arguments"
            )


def row_values(
    name: str, value: object, shape: CallShape, *, low: float = -math.inf, open_low: bool = False
) -> float | Tensor:
    """Checks a number or a floating tensor with a value for each row, and returns it.

    A tensor is `[]`, `[...]`, or `[...]` with a last dimension of 1, whose value the rows along
    that dimension share. The range is checked for numbers only, of which `[]` on a CPU is one.
    """
    if isinstance(value, Tensor):
        no_grad_wanted(name, value)
        if value.ndim == 0 and is_readable(value):
            value = value.item()
        elif not value.is_floating_point():
            raise ValueError(f"{name}: expected a floating tensor, got {value.dtype}; use .float()")
    if not isinstance(value, Tensor):
        kinds = "a number or a tensor"
        return number(name, value, low=low, open_low=open_low, expected=kinds)
    shared = (*shape.leading[:-1], 1)
    if value.ndim and value.shape not in (shape.leading, shared):
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}, expected {tuple(shape.leading)}, one value for "
            f"each token, or {shared}, one for all tokens of a sequence; of [B] values make "
            f"{name}[:, None]"
        )
    _same_device(name, value, shape.device)
    return value


def row_temperatures(values: Tensor, valid: Tensor | None) -> None:
    """Checks that the temperatures of valid rows, `[N]`, are above 0 and finite. Reads values."""
    wrong = ~((values > 0) & (values < math.inf))
    wrong = wrong if valid is None else wrong & valid
    if bool(wrong.any()):
        raise ValueError(
            f"temperature: has {float(values[wrong][0]):g}, expected finite numbers above 0"
        )


def num_tokens(value: object, reduction: str, device: torch.device) -> float | Tensor | None:
    """Checks the divisor of a mean and returns it: a number where its value can be read."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_tokens: given with reduction={reduction!r}, but only a mean is divided by it; "
            'leave it out, or use reduction="mean"'
        )
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"num_tokens: expected one number, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not is_readable(value):
            _same_device("num_tokens", value, device)
            return value
        value = value.item()
    return number("num_tokens", value, low=0.0, open_low=True)


def divergence(value: object) -> Divergence:
    """The `Divergence`, given as such or by its name."""
    if isinstance(value, str):
        return Divergence(value)
    if not isinstance(value, Divergence):
        raise ValueError(f"divergence: expected a name or a Divergence, got {type(value).__name__}")
    return value


def teacher_floor(value: object) -> None:
    if value is not None:
        number("teacher_floor", value, high=0.0)


def process_group(value: object) -> str:
    """The name of a process group, empty for None."""
    if value is None:
        return ""
    if not torch.distributed.is_available() or not isinstance(
        value, torch.distributed.ProcessGroup
    ):
        raise ValueError(
            f"process_group: expected a torch.distributed.ProcessGroup, got "
            f"{type(value).__name__}; for a DeviceMesh give mesh.get_group(name)"
        )
    return value.group_name


def inplace(student_logits: Tensor) -> None:
    if student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError(
            "inplace: student_logits is a leaf that requires a gradient, so that overwriting it "
            "would destroy a parameter; use inplace=False"
        )
    sizes_and_strides = zip(student_logits.shape, student_logits.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in sizes_and_strides):
        raise ValueError(
            "inplace: student_logits is expanded, so that several rows share memory that can hold "
            "only one gradient; use inplace=False"
        )


def choice(name: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name}: unknown value {value!r}; expected one of {', '.join(options)}")


def number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    expected: str = "a number",
) -> float:
    """Checks for a finite number in a range, and returns it as Python's own.

    Python's and NumPy's are accepted; torch.compile's symbolic ones, too, which stay as they are.
    """
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat)
    if isinstance(value, bool) or not (symbolic or isinstance(value, numbers.Real)):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    try:
        result: Any = value if symbolic else float(value)
    except OverflowError:
        result = math.inf  # as far as any range here goes
    below = result <= low if open_low else result < low
    if below or result > high or result != result or result in (math.inf, -math.inf):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        raise ValueError(f"{name}: {value!r} is not in {left}{low:g}, {high:g}{right}")
    return result


def whole_number(name: str, value: object, expected: str, low: int = 1) -> int:
    """Checks for a whole number of at least `low`, Python's or NumPy's."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return int(value)


def weight(name: str, value: object, device: torch.device) -> float | Tensor:
    """Checks and returns a finite number: a scalar tensor as fp32 where reading it would
    synchronise the device, anything else as a float."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected a number or a scalar tensor, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        if not is_readable(value):
            if value.device.type != "cpu":
                _same_device(name, value, device)
            return value.detach().float()
        value = value.item()
    return number(name, value, expected="a number or a scalar tensor")


def sequences(name: str, value: object, cu_seqlens: object) -> None:
    """Checks for floating `[B, T]` values, or packed `[N]` ones with `cu_seqlens` `[B + 1]`."""
    shape = "[B, T]" if cu_seqlens is None else "[N]"
    value = _tensor(name, value, f"a {shape} tensor")
    if value.is_nested:
        raise ValueError(
            f"{name}: a nested tensor; give {name}.values() and cu_seqlens={name}.offsets(), and "
            "the other arguments packed in the same way"
        )
    if value.ndim != shape.count(",") + 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating {shape} tensor, got {value.dtype} of shape "
            f"{tuple(value.shape)}; packed sequences are [N], with cu_seqlens"
        )
    if cu_seqlens is None:
        return
    bounds = _tensor("cu_seqlens", cu_seqlens, "a [B + 1] tensor")
    if bounds.ndim != 1 or not bounds.numel() or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 of shape [B + 1], got {bounds.dtype} of shape "
            f"{tuple(bounds.shape)}"
        )
    _same_device("cu_seqlens", bounds, value.device)
    if not is_readable(bounds):
        return
    first, last, count = int(bounds[0]), int(bounds[-1]), value.numel()
    if first != 0 or last != count or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens: from {first} to {last}, expected bounds that start with 0, do not "
            f"decrease and end with the number of tokens, {count}; torch.nn.functional.pad("
            "lengths.cumsum(0), (1, 0)) makes them of lengths"
        )


def per_sequence(name: str, value: object, batch: int, device: torch.device) -> None:
    """Checks for real `[B]` values."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name}: expected a [B] tensor, got {type(value).__name__}; use torch.tensor(...)"
        )
    if value.shape != (batch,):
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}, expected ({batch},), one value per sequence"
        )
    if value.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {value.dtype}; use .real")
    _same_device(name, value, device)


def groups(size: object, ids: object, batch: int, device: torch.device) -> int | None:
    """Checks what says which sequences are one group, and returns the size with Python's number."""
    if size is not None and ids is not None:
        raise ValueError("group_size: given together with group_ids; give one of them")
    if ids is not None:
        per_sequence("group_ids", ids, batch, device)
        assert isinstance(ids, Tensor)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"group_ids: expected integers, got {ids.dtype}; use .long()")
    if size is None:
        return None
    size = whole_number("group_size", size, "a whole number above 0, or None")
    if batch % size:
        raise ValueError(
            f"group_size: {size} does not divide the batch of {batch} sequences; every group "
            "must be whole, or be given by group_ids"
        )
    return size


def baseline(value: object, options: Sequence[str], tokens: Tensor, batch: int) -> None:
    """Checks for a name, or a floating tensor with a value per sequence or per token."""
    if isinstance(value, str):
        choice("baseline", value, options)
        return
    names = ", ".join(options)
    value = _tensor("baseline", value, f"one of {names}, or a tensor")
    shapes = [(batch,), tuple(tokens.shape)]
    if tokens.ndim == 2:
        shapes.append((batch, 1))
    if tuple(value.shape) not in shapes or not value.is_floating_point():
        raise ValueError(
            f"baseline: expected one of {names}, or a floating tensor of shape "
            f"{' or '.join(map(str, shapes))}, got {value.dtype} of shape {tuple(value.shape)}"
        )
    _same_device("baseline", value, tokens.device)


def _tensor(name: str, value: object, expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    return value


def _plain(name: str, tensor: Tensor) -> None:
    """Rejects sparse tensors and those that hold others, as quantised ones do."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        raise ValueError(
            f"{name}: a {type(tensor).__name__} of layout {tensor.layout}, expected a plain dense "
            "tensor; use its .dequantize() or .to_dense(), or give the logits"
        )


def _supported_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def _logits(name: str, logits: object) -> None:
    logits = _tensor(name, logits, "a [..., V] tensor")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{name}: expected float32, bfloat16 or float16, got {logits.dtype}; cast it, or use "
            "hybrid_kernels.reference for float64"
        )
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., V], V >= 1, got {tuple(logits.shape)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{name}: the last (vocabulary) dimension has stride {logits.stride(-1)}, expected 1; "
            "use .contiguous()"
        )


def _same_rows(name: str, leading: torch.Size, shape: CallShape) -> None:
    if leading != shape.leading:
        raise ValueError(
            f"{name}: leading shape {tuple(leading)}, expected {tuple(shape.leading)}, the shape "
            "of the student's logits without the vocabulary"
        )


def _same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name}: on {tensor.device}, expected {device}; use {name}.to({str(device)!r})"
        )
