"""The launchers of the row kernels, and the choice between their forms."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.kernels import config
from hybrid_kernels.kernels.access import GROUP, Problem, Side, Target, mark_bytes
from hybrid_kernels.kernels.resident import PUBLISHED, SLOTS, resident_kernel
from hybrid_kernels.kernels.sweep import scale_kernel, sweep_kernel, values_kernel
from hybrid_kernels.kernels.topk import Support, mark_kernel
from hybrid_kernels.rows import LOWEST, Coefficients, Rows, per_row

# Triton compiles for alignments of 16, in bytes of a pointer and in entries of a stride.
ALIGNMENT = 16
# Entries of a top-K support that leave room for longer slices.
SMALL_SUPPORT = 128
# What the driver says of a cooperative launch that it does not take; nothing has run then.
REFUSALS = ("too many blocks in cooperative launch", "operation not supported")
_refusing: set[torch.device] = set()
# How supports are marked, whatever their size.
MARKS = config.Sweep(block_v=GROUP, num_warps=4)


def row_statistics(rows: Rows, statistics: Tensor) -> None:
    _sweep(rows, statistics, None, None, measure=True)


def row_gradient(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    _sweep(rows, statistics, coefficients, gradient, measure=False)


def hybrid_rows(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    launch = form(rows)
    resident = isinstance(launch, config.Resident) and rows.total > 0
    ran = resident and _resident(rows, statistics, coefficients, gradient, launch)
    if not ran:
        _sweep(rows, statistics, coefficients, gradient, measure=True)


def row_values(rows: Rows, statistics: Tensor, values: Tensor) -> None:
    """What these entries add to the divergences of rows whose normalisers `statistics` has.

    Fills `[1 + 2 M, N]`: log q(y), the weighted mean over the M members; and for each of them its
    part of the divergence and of the sum of slopes (of Renyi's: of S - 1, and of log S as a
    log-sum-exp), as they are before `math.settle`. Masked rows may hold anything.
    """
    if rows.total == 0:
        return
    launch = values_form(rows)
    with _on_device(rows.student):
        values_kernel[(rows.total,)](
            *values_arguments(rows, statistics, values),
            **values_constants(rows, launch),
            **launch.options(),
        )


def form(rows: Rows, hip: bool = torch.version.hip is not None) -> config.Sweep | config.Resident:
    """How `hybrid_rows` runs a problem: the only place where that is chosen."""
    vocabulary, itemsize = rows.student.shape[-1], max(t.element_size() for t in rows.logits)
    sweep = sweep_form(rows)
    if hip:
        # Whether programs fit together is known from a register limit, which HIP doesn't take.
        return sweep
    device = config.Device.of(rows.student)
    count = max(rows.total, 1)
    resident = config.resident(vocabulary, itemsize, count, device, sides=held(rows))
    refused = resident is not None and resident.splits > 1 and rows.student.device in _refusing
    return sweep if resident is None or refused else resident


def sweep_form(rows: Rows) -> config.Sweep:
    """How the sweeping form runs a problem."""
    light = rows.one_sweep and len(rows.teachers) < 2
    return config.sweep(rows.student.shape[-1], light)


def values_form(rows: Rows) -> config.Sweep:
    """How `row_values` runs a problem."""
    return config.sweep(rows.student.shape[-1], one_sweep=False)


def held(rows: Rows) -> float:
    """For how many logits of an entry a program of the row-resident form has to have room.

    Those that it holds, and more where registers go elsewhere: to supports, to a floor, to the
    scalars of several teachers, to the intermediate results of the alpha divergences. What more is
    the least with which the compiler keeps all but a few scalars in registers (`python -m bench
    aot`): slices of 9,216 entries with a small support, of 6,144 with a floor.
    """
    if rows.support is not None:
        several = 16 / 9 if rows.support.shape[-1] <= SMALL_SUPPORT else 2.0
    else:
        least = 1.0 if rows.teacher_floor is None else 8 / 3
        several = max(least, 2.0 * len(rows.teachers))
    return several * (4 if rows.divergence in ("alpha", "renyi") else 1)


def scale_rows(gradient: Tensor, factor: Tensor) -> None:
    count = gradient.shape[0] * gradient.shape[1]
    if count == 0:
        return
    launch = config.sweep(gradient.shape[-1])
    with _on_device(gradient):
        scale_kernel[(count,)](
            *scale_arguments(gradient, factor),
            V=gradient.shape[-1],
            BLOCK_V=launch.block_v,
            EDGES=has_edges([gradient]),
            **launch.options(),
        )


def _sweep(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
    *,
    measure: bool,
) -> None:
    if rows.total == 0:
        return
    launch = sweep_form(rows)
    with _on_device(rows.student):
        sweep_kernel[(rows.total,)](
            *row_arguments(rows, _support(rows, gradient), statistics, coefficients, gradient),
            **sweep_constants(rows, gradient, launch, measure=measure),
            **launch.options(),
        )


def _resident(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients,
    gradient: Tensor,
    launch: config.Resident,
) -> bool:
    """Whether it ran. A device may refuse programs that have to run side by side."""
    lanes = triton.next_power_of_2(launch.splits)
    shared = launch.splits > 1
    size = launch.groups * SLOTS * PUBLISHED * lanes * max(len(rows.teachers), 1) if shared else 1
    published = torch.empty(size, dtype=torch.float32, device=statistics.device)
    # For each group's meetings, and for each row that may be small.
    counters = torch.zeros(
        launch.groups + rows.total if shared else 1, dtype=torch.int32, device=statistics.device
    )
    support = _support(rows, gradient)
    with _on_device(rows.student):
        try:
            resident_kernel[(launch.groups * launch.splits,)](
                *row_arguments(rows, support, statistics, coefficients, gradient),
                published,
                counters,
                launch.groups,
                **resident_constants(rows, gradient, launch),
                **launch.options(),
            )
        except RuntimeError as error:
            reason = str(error).removeprefix("Triton Error [CUDA]: ")
            if not shared or reason not in REFUSALS:
                raise
            _refused(rows.student.device, launch, reason)
            return False
    return True


def _refused(device: torch.device, launch: config.Resident, reason: str) -> None:
    """Warns once. (Where warnings are errors every launch is refused anew, and nothing swept.)"""
    warnings.warn(
        f"hybrid_kernels: {device} refused to run {launch.groups} groups of {launch.splits} "
        f"programs side by side ({reason}). From here on one program sweeps each long row there: "
        "the results are the same and take longer. A process that has a part of a GPU (MPS, green "
        "contexts) has to expect this.",
        RuntimeWarning,
        stacklevel=2,
    )
    _refusing.add(device)


def _support(rows: Rows, gradient: Tensor | None) -> Support | None:
    """Launches what has to be known of a top-K support before the rows are read."""
    if rows.support is None:
        return None
    support = empty_support(rows)
    with _on_device(rows.student):
        mark_kernel[(rows.total,)](
            *mark_arguments(rows, support), **mark_constants(rows, gradient), **MARKS.options()
        )
    return support


def empty_support(rows: Rows) -> Support:
    """Buffers for what `mark_kernel` finds: an eighth of a byte for each logit, 8 for each id."""
    assert rows.support is not None
    device, ids = rows.student.device, rows.support
    size = (rows.total, mark_bytes(rows.student.shape[-1]))
    return Support(
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(ids.shape, dtype=torch.int32, device=device),
        torch.empty(ids.shape, dtype=torch.float32, device=device),
        rows.token_log_prob,
        rows.resolution,
    )


def mark_arguments(rows: Rows, support: Support) -> tuple:
    """The run-time arguments of `mark_kernel`."""
    assert rows.support is not None
    words = support.marks.view(torch.int32)
    return _problem(rows, None), rows.support, words, support.ids, support.logits


def mark_constants(rows: Rows, gradient: Tensor | None) -> dict:
    """The compile-time arguments of `mark_kernel`."""
    assert rows.support is not None
    size = rows.support.shape[-1]
    return {
        "V": rows.student.shape[-1],
        "K": size,
        "BLOCK_K": triton.next_power_of_2(size),
        "EDGES": _has_edges(rows, gradient),
    }


def row_arguments(
    rows: Rows,
    support: Support | None,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
) -> tuple:
    """The run-time arguments that both forms begin with."""
    target = None
    if gradient is not None and coefficients is not None:
        own = [c if c is None or c.numel() == 1 else per_row(c, rows.total) for c in coefficients]
        strides = (0 if c is None or c.numel() == 1 else 1 for c in own)
        pairs = zip(own, strides, strict=True)
        target = Target(_side(gradient), *(part for pair in pairs for part in pair))
    return _problem(rows, support), target, statistics


def _problem(rows: Rows, support: Support | None) -> Problem:
    if rows.row_temperature is not None:
        raise NotImplementedError("row_temperature")
    teachers = rows.teachers or None
    if teachers is not None and rows.support is None:
        teachers = tuple(_side(t) for t in teachers)
    return Problem(
        _side(rows.student),
        teachers,
        rows.shares or None,
        support,
        rows.token_ids,
        rows.valid,
        rows.total,
        rows.student.shape[1],
        1.0 / rows.temperature,
        rows.teacher_floor or 0.0,
        rows.parameter,
    )


def scale_arguments(gradient: Tensor, factor: Tensor) -> tuple:
    """The run-time arguments of `scale_kernel`."""
    stride = 0 if factor.numel() == 1 else 1
    return _side(gradient), factor, stride, gradient.shape[1]


def sweep_constants(
    rows: Rows, gradient: Tensor | None, launch: config.Sweep, *, measure: bool
) -> dict:
    """The compile-time arguments of `sweep_kernel`."""
    # Marks are read by the byte.
    block_v = launch.block_v if rows.support is None else max(launch.block_v, GROUP)
    return {
        "BLOCK_V": block_v,
        "MEASURE": measure,
        "WRITE": gradient is not None,
    } | _problem_constants(rows, gradient)


def values_arguments(rows: Rows, statistics: Tensor, values: Tensor) -> tuple:
    """The run-time arguments of `values_kernel`."""
    return _problem(rows, None), statistics, values


def values_constants(rows: Rows, launch: config.Sweep) -> dict:
    """The compile-time arguments of `values_kernel`."""
    wanted = ("V", "PAD", "EDGES", "MEMBERS", "HAS_FLOOR", "HAS_SMALL", "DIVERGENCE")
    known = _problem_constants(rows, None)
    return {"BLOCK_V": launch.block_v} | {name: known[name] for name in wanted}


def resident_constants(rows: Rows, gradient: Tensor, launch: config.Resident) -> dict:
    """The compile-time arguments of `resident_kernel`."""
    own = {
        "SLICE": launch.slice_v,
        "CHUNK_V": launch.chunk_v,
        "CHUNKS": launch.chunks,
        "SPLITS": launch.splits,
        "LANES": triton.next_power_of_2(launch.splits),
        "PREFETCH": launch.prefetch,
    }
    return own | _problem_constants(rows, gradient)


def _problem_constants(rows: Rows, gradient: Tensor | None) -> dict:
    support = rows.support
    size = 1 if support is None else support.shape[-1]
    fp16 = any(t.dtype == torch.float16 for t in rows.logits)
    return {
        "V": rows.student.shape[-1],
        "PAD": -math.inf if fp16 else LOWEST,
        "EDGES": _has_edges(rows, gradient),
        "MEMBERS": len(rows.teachers),
        "TOPK": support is not None,
        "K": size,
        "BLOCK_K": triton.next_power_of_2(size),
        "TAIL": "" if support is None else rows.tail,
        "CORRECTS": rows.corrects_tail,
        "HAS_FLOOR": rows.teacher_floor is not None,
        "ONE_SWEEP": rows.one_sweep,
        "HAS_SMALL": bool(
            rows.teachers and support is None and FAMILIES[rows.divergence].one_sweep
        ),
        "DIVERGENCE": rows.divergence,
    }


def _has_edges(rows: Rows, gradient: Tensor | None) -> bool:
    return has_edges(rows.logits if gradient is None else [*rows.logits, gradient])


def has_edges(tensors: list[Tensor]) -> bool:
    """Whether rows have to be split to move in 128-bit pieces, and can be (see `access.py`)."""
    if all(_is_aligned(t) for t in tensors):
        return False
    first, *others = [_phases(t) for t in tensors]
    return all(phases == first for phases in others)


def _is_aligned(logits: Tensor) -> bool:
    strides = all(stride % ALIGNMENT == 0 for stride in _row_strides(logits))
    return strides and logits.data_ptr() % ALIGNMENT == 0 and logits.shape[-1] % GROUP == 0


def _phases(logits: Tensor) -> tuple[int, ...]:
    """Where rows begin relative to a boundary, as far as it can differ from row to row."""
    entries = [logits.data_ptr() // logits.element_size(), *_row_strides(logits)]
    return tuple(entry % GROUP for entry in entries)


def _row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of both row dimensions, 0 where one is of no consequence."""
    outer, inner, _ = logits.shape
    return (logits.stride(0) if outer > 1 else 0), (logits.stride(1) if inner > 1 else 0)


def _side(logits: Tensor) -> Side:
    return Side(logits, *_row_strides(logits))


def _on_device(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
