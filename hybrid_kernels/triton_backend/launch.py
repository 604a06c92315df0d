"""The launchers of the row kernels and the choice between their forms."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import JITFunction

from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import Coefficients, Rows, repeat_of
from hybrid_kernels.triton_backend import divergences, plan
from hybrid_kernels.triton_backend.meeting import NUMBERS
from hybrid_kernels.triton_backend.memory import (
    GROUP,
    Arguments,
    PerRow,
    Side,
    Support,
    mark_bytes,
)
from hybrid_kernels.triton_backend.plan import Plan
from hybrid_kernels.triton_backend.resident import resident_kernel
from hybrid_kernels.triton_backend.sweep import scale_kernel, sweep_kernel, values_kernel
from hybrid_kernels.triton_backend.topk import mark_kernel

# Triton compiles for alignments of 16, in bytes of a pointer and in entries of a stride.
ALIGNMENT = 16
# The driver's errors for a cooperative launch that it refuses; nothing has run then.
REFUSALS = ("too many blocks in cooperative launch", "operation not supported")
_refusing: set[torch.device] = set()
# The form that marks supports of any size.
MARKS = plan.Sweep(block_v=GROUP, num_warps=4)


class Launch(NamedTuple):
    """A kernel and everything it is launched with.

    Attributes:
        kernel: its parameters are (arguments, plan) or (arguments, plan, divergence).
        programs: how many to run.
        form: has the compiler options.
        arguments: the dynamic parameters.
        plan: the static parameters.
        divergence: the divergence's function, if the kernel needs one.
    """

    kernel: JITFunction
    programs: int
    form: plan.Sweep | plan.Resident
    arguments: Arguments
    plan: Plan
    divergence: JITFunction | None = None

    @property
    def given(self) -> tuple:
        """What the kernel is called with."""
        static = (self.plan,) if self.divergence is None else (self.plan, self.divergence)
        return (self.arguments, *static)

    def run(self) -> None:
        if self.programs == 0:
            return
        with _on_device(self.arguments.student.ptr):
            self.kernel[(self.programs,)](*self.given, **self.form.options())


def row_statistics(rows: Rows, statistics: Tensor) -> None:
    sweep_launch(rows, _marked(rows, None), statistics, None, None, measure=True).run()


def row_gradient(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    support = _marked(rows, gradient)
    sweep_launch(rows, support, statistics, coefficients, gradient, measure=False).run()


def hybrid_rows(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    support, chosen, declined = _marked(rows, gradient), form(rows, gradient), None
    if isinstance(chosen, plan.Resident) and rows.total > 0:
        launch = resident_launch(rows, statistics, coefficients, gradient, chosen)
        try:
            launch.run()
            declined = launch.arguments.declined
        except RuntimeError as error:
            reason = str(error).removeprefix("Triton Error [CUDA]: ")
            if chosen.splits == 1 or reason not in REFUSALS:
                raise
            _refused(rows.student.device, chosen, reason)
    inputs = (rows, support, statistics, coefficients, gradient)
    sweep_launch(*inputs, measure=True, declined=declined).run()


def row_values(rows: Rows, statistics: Tensor, values: Tensor) -> None:
    """What these entries add to the divergences of rows whose normalisers are in `statistics`.

    Fills `[1 + 2 M, N]`: log q(y), the weighted mean over the M members; then for each member its
    part of the divergence and of the sum of slopes (Renyi's: of S - 1, and of log S as a
    log-sum-exp), before `sums.settle`. Masked rows may hold any values.
    """
    values_launch(rows, statistics, values).run()


def scale_rows(gradient: Tensor, factor: Tensor) -> None:
    scale_launch(gradient, factor).run()


def form(
    rows: Rows, gradient: Tensor, hip: bool = torch.version.hip is not None
) -> plan.Sweep | plan.Resident:
    """The form in which `hybrid_rows` runs a problem, chosen only here."""
    sweep = sweep_form(rows)
    sides = [*rows.logits, gradient]
    sizes = {t.element_size() for t in rows.logits}
    # The row-resident form loads words at 16-byte boundaries that both sides share.
    mismatched = len(sizes) > 1 or gradient.element_size() > max(sizes)
    mismatched = mismatched or not (all(map(_is_aligned, sides)) or has_edges(sides))
    light = not rows.teachers or (
        len(rows.teachers) == 1 and rows.support is None and FAMILIES[rows.divergence].resident
    )
    if hip or mismatched or not light:
        # HIP takes no register limit, without which programs may not all be resident at once.
        return sweep
    resident = plan.resident(
        rows.student.shape[-1],
        rows.student.element_size(),
        max(rows.total, 1),
        plan.Device.of(rows.student),
        meetings=1 if rows.one_sweep else 2,
        narrow=gradient.element_size() < rows.student.element_size(),
        edges=has_edges(sides),
    )
    refused = resident is not None and resident.splits > 1 and rows.student.device in _refusing
    return sweep if resident is None or refused else resident


def sweep_form(rows: Rows) -> plan.Sweep:
    """The sweeping form of a problem."""
    light = rows.one_sweep and len(rows.teachers) < 2
    return plan.sweep(rows.student.shape[-1], light)


def values_form(rows: Rows) -> plan.Sweep:
    """The form in which `row_values` runs a problem."""
    return plan.sweep(rows.student.shape[-1], one_sweep=False)


def sweep_launch(
    rows: Rows,
    support: Support | None,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
    *,
    measure: bool,
    declined: Tensor | None = None,
) -> Launch:
    """Measures or reads statistics, and writes the gradient if there is one.

    Args:
        declined: if given, only these rows are processed.
    """
    arguments = _arguments(rows, support, statistics, coefficients, gradient)
    arguments = arguments._replace(declined=declined)
    static, chosen = _plan(rows, coefficients, gradient), sweep_form(rows)
    static = static._replace(
        measure=measure,
        # Marks are read in whole bytes.
        block=max(chosen.block_v, GROUP) if static.k else chosen.block_v,
        slice=static.vocabulary,
    )
    return Launch(sweep_kernel, rows.total, chosen, arguments, static, _function(rows))


def resident_launch(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients,
    gradient: Tensor,
    chosen: plan.Resident,
) -> Launch:
    """Measures statistics and writes the gradient, except for rows that it declines. A device may
    refuse programs that must run side by side."""
    static = _plan(rows, coefficients, gradient)
    last = static.vocabulary - 2 * GROUP - (chosen.splits - 1) * chosen.slice_v
    static = static._replace(
        measure=True,
        small=static.small and static.one_sweep,
        warps=chosen.num_warps,
        width=chosen.width,
        tiles=chosen.tiles,
        slice=chosen.slice_v,
        least=min(chosen.slice_v, max(0, last)),
        most=chosen.splits * chosen.slice_v,
        splits=chosen.splits,
        lanes=triton.next_power_of_2(chosen.splits),
        meetings=chosen.meetings,
        lag=chosen.lag,
        exact=rows.student.element_size() == 4,
        fine=rows.student.element_size() == 4 or not static.teacher_d,
    )
    arguments = _arguments(rows, None, statistics, coefficients, gradient)._replace(
        declined=statistics.new_empty(rows.total, dtype=torch.int8),
    )
    assert chosen.programs >= static.splits, "a program would wait for itself"
    if static.splits > 1:
        slices = rows.total * static.splits
        words = slices * static.meetings * NUMBERS
        arguments = arguments._replace(
            published=statistics.new_zeros(words, dtype=torch.int64),
            pieces=statistics.new_empty(slices) if static.small else None,
            counters=statistics.new_zeros(rows.total, dtype=torch.int32) if static.small else None,
        )
    return Launch(resident_kernel, chosen.programs, chosen, arguments, static, _function(rows))


def values_launch(rows: Rows, statistics: Tensor, values: Tensor) -> Launch:
    chosen = values_form(rows)
    static = _plan(rows, None, None)._replace(block=chosen.block_v)
    arguments = _arguments(rows, None, statistics, None, None)._replace(row_values=values)
    return Launch(values_kernel, rows.total, chosen, arguments, static, _function(rows))


def mark_launch(rows: Rows, support: Support, gradient: Tensor | None) -> Launch:
    """Fills a support's buffers; splits rows like the launch that reads them."""
    static = _plan(rows, None, gradient)._replace(write=False)
    arguments = _arguments(rows, support, None, None, None)
    return Launch(mark_kernel, rows.total, MARKS, arguments, static)


def scale_launch(gradient: Tensor, factor: Tensor) -> Launch:
    count, vocabulary = gradient.shape[0] * gradient.shape[1], gradient.shape[-1]
    chosen, side = plan.sweep(vocabulary), _side(gradient)
    static = Plan(vocabulary, has_edges([gradient]), write=True, block=chosen.block_v)
    arguments = Arguments(side, gradient=side, inner=_inner([gradient]))
    arguments = arguments._replace(factor=_per_row(factor, count))
    return Launch(scale_kernel, count, chosen, arguments, static)


def _marked(rows: Rows, gradient: Tensor | None) -> Support | None:
    """A top-K support, marked before the rows are read."""
    if rows.support is None:
        return None
    support = empty_support(rows)
    mark_launch(rows, support, gradient).run()
    return support


def empty_support(rows: Rows) -> Support:
    """Buffers that `mark_kernel` fills: one bit for each logit and 8 bytes for each id."""
    ids, device = rows.support, rows.student.device
    assert ids is not None
    size = (rows.total, mark_bytes(rows.student.shape[-1]))
    marks = torch.empty(size, dtype=torch.uint8, device=device)
    return Support(
        ids,
        torch.empty(ids.shape, dtype=torch.int32, device=device),
        torch.empty(ids.shape, dtype=torch.float32, device=device),
        marks,
        marks.view(torch.int32),
        rows.token_log_prob,
        rows.resolution,
    )


def _function(rows: Rows) -> JITFunction:
    """The function of the problem's divergence."""
    return getattr(divergences, rows.divergence)


def _arguments(
    rows: Rows,
    support: Support | None,
    statistics: Tensor | None,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
) -> Arguments:
    """The dynamic parameters of a problem and its gradient."""
    teachers = rows.teachers or None
    if teachers is not None and rows.support is None:
        teachers = tuple(_side(t) for t in teachers)
    temperature = rows.row_temperature
    per_row: Sequence[PerRow | None] = (None, None, None)
    if coefficients is not None:
        per_row = [_per_row(c, rows.total) for c in coefficients]
    sides = rows.logits if gradient is None else [*rows.logits, gradient]
    return Arguments(
        student=_side(rows.student),
        teachers=teachers,
        shares=rows.shares or (1.0,),
        support=support,
        token_ids=rows.token_ids,
        valid=rows.valid,
        count=rows.total,
        inner=_inner(sides),
        inv_t=1.0 / rows.temperature,
        temperature=None if temperature is None else _per_row(temperature, rows.total),
        floor=rows.teacher_floor or 0.0,
        parameter=rows.parameter,
        statistics=statistics,
        gradient=None if gradient is None else _side(gradient),
        c_div=per_row[0],
        c_logp=per_row[1],
        c_ent=per_row[2],
    )


def _plan(rows: Rows, coefficients: Coefficients | None, gradient: Tensor | None) -> Plan:
    """The static parameters of a problem and its gradient, except how the work is cut."""
    family, members = FAMILIES[rows.divergence], len(rows.teachers)
    k = 0 if rows.support is None else rows.support.shape[-1]
    full = 0 if k else members
    c_div, c_logp, c_ent = coefficients or (None, None, None)
    return Plan(
        vocabulary=rows.student.shape[-1],
        edges=has_edges(rows.logits if gradient is None else [*rows.logits, gradient]),
        pad=max(plan.PAD, *(torch.finfo(t.dtype).min for t in rows.logits)),
        members=members,
        full=full,
        sums=max(full, 1),
        k=k,
        block_k=triton.next_power_of_2(k) if k else 1,
        tail=rows.tail if k else "",
        corrects=rows.corrects_tail,
        floor=rows.teacher_floor is not None,
        row_temperature=rows.row_temperature is not None,
        one_sweep=rows.one_sweep,
        small=family.one_sweep and full > 0,
        kl_family=family.one_sweep,
        student_d=family.student_d and full > 0,
        teacher_d=family.teacher_d and full > 0,
        has_v=family.has_v,
        tilted=family.tilted,
        pulls=0 if c_div is None else full,
        log_prob=c_logp is not None,
        entropy=c_ent is not None,
        write=gradient is not None,
    )


def _per_row(values: Tensor | None, count: int) -> PerRow:
    """A number for each of `count` rows, from values `[R]`, see `rows.repeat_of`."""
    if values is None or values.numel() == 1:
        return PerRow(values, 1, 0)
    return PerRow(values, repeat_of(values, count), 1)


def _refused(device: torch.device, launch: plan.Resident, reason: str) -> None:
    """Warns once; where warnings are errors, every launch raises and nothing is swept."""
    warnings.warn(
        f"hybrid_kernels: {device} refused to run {launch.programs} programs side by side "
        f"({reason}). From now on one program sweeps each long row there: "
        "the results are the same but slower. Expect this in a process that has only part of a GPU "
        "(MPS, green contexts).",
        RuntimeWarning,
        stacklevel=2,
    )
    _refusing.add(device)


def has_edges(tensors: list[Tensor]) -> bool:
    """Whether rows must and can be split to move in 128-bit pieces (see `memory.py`)."""
    if all(_is_aligned(t) for t in tensors):
        return False
    first, *others = [_phases(t) for t in tensors]
    return all(phases == first for phases in others)


def _is_aligned(logits: Tensor) -> bool:
    strides = all(stride % ALIGNMENT == 0 for stride in _row_strides(logits))
    return strides and logits.data_ptr() % ALIGNMENT == 0 and logits.shape[-1] % GROUP == 0


def _phases(logits: Tensor) -> tuple[int, ...]:
    """Where rows begin relative to a boundary, and what changes it from row to row."""
    entries = [logits.data_ptr() // logits.element_size(), *_row_strides(logits)]
    return tuple(entry % GROUP for entry in entries)


def _row_strides(logits: Tensor) -> tuple[int, int]:
    """Strides of both row dimensions; 0 for a dimension of size 1."""
    outer, inner, _ = logits.shape
    return (logits.stride(0) if outer > 1 else 0), (logits.stride(1) if inner > 1 else 0)


def _side(logits: Tensor) -> Side:
    outer, inner = _row_strides(logits)
    return Side(logits, outer, inner if logits.shape[1] > 1 else outer)


def _inner(sides: list[Tensor]) -> int | None:
    """I, or None if the rows of each side are evenly spaced."""
    outer, inner, _ = sides[0].shape
    # The stride of an expanded dimension is 0, too.
    is_even = all(side.stride(0) == inner * side.stride(1) for side in sides)
    return None if is_even or 1 in (outer, inner) else inner


def _on_device(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
