"""What the arguments of a call must be, together.

Made of the checks of single arguments in `checks.py`, and failing like those.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hybrid_kernels import checks
from hybrid_kernels.checks import CallShape
from hybrid_kernels.divergences import Divergence
from hybrid_kernels.types import LinearTeacher, Mixture, TopK

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
TAILS = ("bucket", "renormalize", "mask")
BACKENDS = ("auto", "torch", "triton")
MAX_SUPPORT = 1024  # the largest K of a top-K teacher on Triton


def student(logits: Tensor) -> None:
    _logits("student_logits", logits)


def no_transforms(name: str) -> None:
    """Rejects transforms that don't know the operators and autograd functions of this package."""
    if torch.compiler.is_compiling():
        return
    if checks.in_transform():
        raise ValueError(
            f"{name}: inside of a transform of torch.func (vmap, grad, jvp, ...), none of which is "
            "supported; give all rows at once, and use loss.backward() or torch.autograd.grad"
        )
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(
            f"{name}: inside of torch.jit.trace, which can't see the gradient; use torch.compile "
            "or torch.export"
        )


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
        checks.number("teacher: the weight of a Mixture's member", weight, positive=True)
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
    checks.same_rows("teacher", value.shape[:-1], shape)
    checks.same_device("teacher", value, shape.device)
    checks.no_grad_wanted("teacher", value)


def _linear_teacher(value: LinearTeacher, shape: CallShape) -> None:
    hidden("teacher: LinearTeacher.hidden", value.hidden)
    checks.same_rows("teacher: LinearTeacher.hidden", value.hidden.shape[:-1], shape)
    checks.same_device("teacher: LinearTeacher.hidden", value.hidden, shape.device)
    checks.no_grad_wanted("teacher: LinearTeacher.hidden", value.hidden)


def hidden(name: str, value: object) -> None:
    """Checks hidden states `[..., D]`."""
    value = checks.tensor(name, value, "a [..., D] tensor")
    _supported_dtype(name, value)
    if value.ndim < 1 or value.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., D], D >= 1, got {tuple(value.shape)}")


def head_options(prefix: str, softcap: object, logit_scale: object) -> None:
    if softcap is not None:
        checks.number(f"{prefix}softcap", softcap, positive=True)
    checks.number(f"{prefix}logit_scale", logit_scale)


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
    checks.same_device(f"{name}weight", weight, states.device)
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}bias: expected shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    checks.same_device(f"{name}bias", bias, states.device)


def same_vocabulary(teacher_weight: Tensor, vocabulary: int) -> None:
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"teacher: LinearTeacher.weight has a vocabulary of {teacher_weight.shape[0]} entries, "
            f"the student {vocabulary}; where the models pad differently, slice both weights to "
            "the shared prefix (weight[:V] needs no copy)"
        )


def linear_options(
    chunk_rows: object, logits_dtype: Any, grad_filter: object, drop_masked: object
) -> tuple[int | None, torch.dtype, float, bool]:
    """Checks the options of chunks, and returns them with Python's numbers."""
    if chunk_rows is not None:
        kinds = "a whole number above 0, or None for an automatic choice"
        chunk_rows = checks.whole_number("chunk_rows", chunk_rows, kinds)
    if not isinstance(logits_dtype, torch.dtype) or logits_dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"logits_dtype: expected float32, bfloat16 or float16, got {logits_dtype!r}"
        )
    grad_filter = checks.number("grad_filter", grad_filter, low=0.0)
    return chunk_rows, logits_dtype, grad_filter, checks.flag("drop_masked", drop_masked)


def _top_k(value: TopK, shape: CallShape) -> None:
    ids = checks.integers("teacher: TopK.ids", value.ids, "a [..., K] tensor")
    checks.same_device("teacher: TopK.ids", ids, shape.device)
    _log_probs("teacher: TopK.log_probs", value.log_probs, "a [..., K] tensor", shape)
    if value.token_log_prob is not None:
        expected = "a tensor with a value per token, or None"
        _log_probs("teacher: TopK.token_log_prob", value.token_log_prob, expected, shape)
    log_probs = value.log_probs
    if ids.ndim < 1 or ids.shape != log_probs.shape or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher: TopK.ids has shape {tuple(ids.shape)} and log_probs "
            f"{tuple(log_probs.shape)}; both are [..., K], K >= 1"
        )
    checks.same_rows("teacher: TopK", ids.shape[:-1], shape)
    if value.token_log_prob is not None:
        checks.same_rows("teacher: TopK.token_log_prob", value.token_log_prob.shape, shape)
    vocabulary = shape.vocabulary
    if ids.shape[-1] > vocabulary and not shape.sharded:
        raise ValueError(
            f"teacher: a TopK support of {ids.shape[-1]} ids for a vocabulary of {vocabulary}; "
            "check that teacher and student have the same tokenizer, and drop repeated ids"
        )


def _log_probs(name: str, value: object, expected: str, shape: CallShape) -> None:
    log_probs = checks.tensor(name, value, expected)
    _supported_dtype(name, log_probs)
    checks.same_device(name, log_probs, shape.device)
    checks.no_grad_wanted(name, log_probs)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of the same memory with the same layout; does not compare values."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return alike and checks.has_memory(a) and a.data_ptr() == b.data_ptr()


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


def can_be_saved(name: str, tensor: object) -> None:
    """Rejects inference tensors, which autograd can't save for the backward."""
    if isinstance(tensor, Tensor) and not torch.compiler.is_compiling() and tensor.is_inference():
        raise ValueError(
            f"{name}: made under torch.inference_mode(), so it can't be saved for the backward; "
            f"make it under torch.no_grad(), or pass {name}.clone()"
        )


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


def row_temperatures(values: Tensor, valid: Tensor | None) -> None:
    """Checks that the temperatures of valid rows, `[N]`, are above 0 and finite. Reads values."""
    wrong = ~((values > 0) & (values < math.inf))
    wrong = wrong if valid is None else wrong & valid
    if bool(wrong.any()):
        raise ValueError(
            f"temperature: has {float(values[wrong][0]):g}, expected finite numbers above 0"
        )


def num_tokens(value: object, reduction: str, device: torch.device) -> float | Tensor | None:
    """Checks the divisor of a mean, and returns it as `checks.scalar` does."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"num_tokens: given with reduction={reduction!r}, but only a mean is divided by it; "
            'leave it out, or use reduction="mean"'
        )
    if isinstance(value, Tensor):
        checks.no_grad_wanted("num_tokens", value)
    return checks.scalar("num_tokens", value, device, positive=True)


def divergence(value: object) -> Divergence:
    """The `Divergence`, given as such or by its name."""
    if isinstance(value, str):
        return Divergence(value)
    if not isinstance(value, Divergence):
        raise ValueError(f"divergence: expected a name or a Divergence, got {type(value).__name__}")
    return value


def teacher_floor(value: object) -> None:
    if value is not None:
        checks.number("teacher_floor", value, high=0.0)


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


def inplace(value: object, student_logits: Tensor) -> bool:
    """Checks whether the gradient may be written over the logits, and returns the flag."""
    if not checks.flag("inplace", value):
        return False
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
    if not torch.compiler.is_compiling() and student_logits.is_neg():
        raise ValueError(
            "inplace: student_logits is a negated view of its memory, such as an imaginary part; "
            "use inplace=False"
        )
    return True


def sequences(name: str, value: object, cu_seqlens: object) -> None:
    """Checks for floating `[B, T]` values, or packed `[N]` ones with `cu_seqlens` `[B + 1]`."""
    shape = "[B, T]" if cu_seqlens is None else "[N]"
    value = checks.tensor(name, value, f"a {shape} tensor")
    bounds = None
    if cu_seqlens is not None:
        bounds = checks.tensor("cu_seqlens", cu_seqlens, "a [B + 1] tensor")
    if value.ndim != shape.count(",") + 1 or not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating {shape} tensor, got {value.dtype} of shape "
            f"{tuple(value.shape)}; packed sequences are [N], with cu_seqlens"
        )
    if bounds is None:
        return
    if bounds.ndim != 1 or not bounds.numel() or bounds.dtype not in checks.INTEGERS:
        raise ValueError(
            f"cu_seqlens: expected int32 or int64 of shape [B + 1], got {bounds.dtype} of shape "
            f"{tuple(bounds.shape)}"
        )
    checks.same_device("cu_seqlens", bounds, value.device)
    if not checks.is_readable(bounds):
        return
    first, last, count = int(bounds[0]), int(bounds[-1]), value.numel()
    if first != 0 or last != count or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens: from {first} to {last}, expected bounds that start with 0, do not "
            f"decrease and end with the number of tokens, {count}; torch.nn.functional.pad("
            "lengths.cumsum(0), (1, 0)) makes them of lengths"
        )


def per_sequence(name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """Checks for real `[B]` values, and returns them."""
    value = checks.tensor(name, value, "a [B] tensor")
    if value.shape != (batch,):
        raise ValueError(
            f"{name}: shape {tuple(value.shape)}, expected ({batch},), one value per sequence"
        )
    if value.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {value.dtype}; use .real")
    checks.same_device(name, value, device)
    return value


def groups(size: object, ids: object, batch: int, device: torch.device) -> int | None:
    """Checks what says which sequences are one group, and returns the size with Python's number."""
    if size is not None and ids is not None:
        raise ValueError("group_size: given together with group_ids; give one of them")
    if ids is not None:
        ids = per_sequence("group_ids", ids, batch, device)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"group_ids: expected integers, got {ids.dtype}; use .long()")
    if size is None:
        return None
    size = checks.whole_number("group_size", size, "a whole number above 0, or None")
    if batch % size:
        raise ValueError(
            f"group_size: {size} does not divide the batch of {batch} sequences; every group "
            "must be whole, or be given by group_ids"
        )
    return size


def baseline(value: object, options: Sequence[str], tokens: Tensor, batch: int) -> None:
    """Checks for a name, or a floating tensor with a value per sequence or per token."""
    if isinstance(value, str):
        checks.choice("baseline", value, options)
        return
    names = ", ".join(options)
    value = checks.tensor("baseline", value, f"one of {names}, or a tensor")
    shapes = [(batch,), tuple(tokens.shape)]
    if tokens.ndim == 2:
        shapes.append((batch, 1))
    if tuple(value.shape) not in shapes or not value.is_floating_point():
        raise ValueError(
            f"baseline: expected one of {names}, or a floating tensor of shape "
            f"{' or '.join(map(str, shapes))}, got {value.dtype} of shape {tuple(value.shape)}"
        )
    checks.same_device("baseline", value, tokens.device)


def _supported_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in LOGIT_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")


def _logits(name: str, logits: object) -> None:
    logits = checks.tensor(name, logits, "a [..., V] tensor")
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
