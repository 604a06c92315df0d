"""The launchers of the row kernels, and the choice between their forms."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from hybrid_kernels.kernels import config
from hybrid_kernels.kernels.access import GROUP
from hybrid_kernels.kernels.resident import PUBLISHED, SLOTS, resident_kernel
from hybrid_kernels.kernels.sweep import scale_kernel, sweep_kernel
from hybrid_kernels.rows import KL_FAMILY, Coefficients, Rows

# Triton compiles for alignments of 16, in bytes of a pointer and in entries of a stride.
ALIGNMENT = 16


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
    if isinstance(launch, config.Sweep):
        _sweep(rows, statistics, coefficients, gradient, measure=True)
    elif rows.total:
        _resident(rows, statistics, coefficients, gradient, launch)


def form(rows: Rows, hip: bool = torch.version.hip is not None) -> config.Sweep | config.Resident:
    """How `hybrid_rows` runs a problem: the only place where that is chosen."""
    sides = [t for t in (rows.student, rows.teacher) if t is not None]
    vocabulary, itemsize = rows.student.shape[-1], max(t.element_size() for t in sides)
    sweep = config.sweep(vocabulary, rows.one_sweep)
    if hip:
        # Whether programs fit together is known from a register limit, which HIP doesn't take.
        return sweep
    device = config.Device.of(rows.student)
    return config.resident(vocabulary, itemsize, max(rows.total, 1), device) or sweep


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
    launch = config.sweep(rows.student.shape[-1], rows.one_sweep)
    with _on_device(rows.student):
        sweep_kernel[(rows.total,)](
            *row_arguments(rows, statistics, coefficients, gradient),
            **sweep_constants(rows, gradient, launch, measure=measure),
            **launch.options(),
        )


def _resident(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients,
    gradient: Tensor,
    launch: config.Resident,
) -> None:
    lanes = triton.next_power_of_2(launch.splits)
    shared = launch.splits > 1
    size = launch.groups * SLOTS * PUBLISHED * lanes if shared else 1
    published = torch.empty(size, dtype=torch.float32, device=statistics.device)
    counters = torch.zeros(
        2 * launch.groups if shared else 1, dtype=torch.int32, device=statistics.device
    )
    stages = [-1]
    if config.INTERPRETED and shared:
        # One program after another: each meeting is the end of a launch.
        stages = [0, 1] if rows.one_sweep or rows.teacher is None else [0, 1, 2]
    for stage in stages:
        with _on_device(rows.student):
            resident_kernel[(launch.groups * launch.splits,)](
                *row_arguments(rows, statistics, coefficients, gradient),
                published,
                counters,
                launch.groups,
                **resident_constants(rows, gradient, launch, stage),
                **launch.options(),
            )


def row_arguments(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
) -> tuple:
    """The run-time arguments that both forms begin with."""
    div, logp, ent = coefficients or Coefficients(None, None, None)
    return (
        rows.student,
        rows.teacher,
        rows.token_ids,
        rows.valid,
        statistics,
        gradient,
        div,
        logp,
        ent,
        rows.total,
        rows.student.shape[1],
        *_row_strides(rows.student),
        *_row_strides(rows.teacher),
        *_row_strides(gradient),
        *(0 if c is None or c.numel() == 1 else 1 for c in (div, logp, ent)),
        1.0 / rows.temperature,
        rows.teacher_floor or 0.0,
        rows.parameter,
    )


def scale_arguments(gradient: Tensor, factor: Tensor) -> tuple:
    """The run-time arguments of `scale_kernel`."""
    stride = 0 if factor.numel() == 1 else 1
    return gradient, factor, gradient.shape[1], *_row_strides(gradient), stride


def sweep_constants(
    rows: Rows, gradient: Tensor | None, launch: config.Sweep, *, measure: bool
) -> dict:
    """The compile-time arguments of `sweep_kernel`."""
    own = {"BLOCK_V": launch.block_v, "MEASURE": measure, "WRITE": gradient is not None}
    return own | _problem_constants(rows, gradient)


def resident_constants(rows: Rows, gradient: Tensor, launch: config.Resident, stage: int) -> dict:
    """The compile-time arguments of `resident_kernel`."""
    own = {
        "SLICE": launch.slice_v,
        "CHUNK_V": launch.chunk_v,
        "CHUNKS": launch.chunks,
        "SPLITS": launch.splits,
        "LANES": triton.next_power_of_2(launch.splits),
        "PREFETCH": launch.prefetch,
        "STAGE": stage,
    }
    return own | _problem_constants(rows, gradient)


def _problem_constants(rows: Rows, gradient: Tensor | None) -> dict:
    sides = [t for t in (rows.student, rows.teacher) if t is not None]
    return {
        "V": rows.student.shape[-1],
        "EDGES": has_edges(sides if gradient is None else [*sides, gradient]),
        "HAS_FLOOR": rows.teacher_floor is not None,
        "ONE_SWEEP": rows.one_sweep,
        "HAS_SMALL": rows.divergence in KL_FAMILY and rows.teacher is not None,
        "DIVERGENCE": rows.divergence,
    }


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


def _row_strides(logits: Tensor | None) -> tuple[int, int]:
    """Strides of both row dimensions, 0 where one is of no consequence."""
    if logits is None:
        return 0, 0
    outer, inner, _ = logits.shape
    return (logits.stride(0) if outer > 1 else 0), (logits.stride(1) if inner > 1 else 0)


def _on_device(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
