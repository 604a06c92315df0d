"""Row kernels over full logits, and their launchers: one program per row, vocabulary in tiles.

One kernel in three modes: it measures a row's statistics, writes its gradient, or both. Per row it
reads the logits once for the statistics (twice where the divergence needs both normalisers first,
or is so small that its value is summed anew) and once for the gradient.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.kernels import config
from hybrid_kernels.kernels.math import (
    LOG2E,
    log_sum,
    logit_gradient,
    online_step,
    point,
    settle,
    slopes,
    small_terms,
    start_sweep,
    swept_divergence,
    terms,
)
from hybrid_kernels.rows import (
    FIELDS,
    KL_FAMILY,
    SMALL_DIVERGENCE,
    STATISTICS,
    Coefficients,
    Rows,
)

_DIVERGENCE = tl.constexpr(FIELDS.divergence)
_LOG_PROB = tl.constexpr(FIELDS.log_prob)
_TEACHER_LOG_PROB = tl.constexpr(FIELDS.teacher_log_prob)
_ENTROPY = tl.constexpr(FIELDS.entropy)
_LOGSUMEXP = tl.constexpr(FIELDS.logsumexp)
_STUDENT_MAX = tl.constexpr(FIELDS.student_max)
_TEACHER_MAX = tl.constexpr(FIELDS.teacher_max)
_STUDENT_LSE = tl.constexpr(FIELDS.student_lse)
_TEACHER_LSE = tl.constexpr(FIELDS.teacher_lse)
_SLOPE_SUM = tl.constexpr(FIELDS.slope_sum)
_STATISTICS = tl.constexpr(STATISTICS)
_SMALL = tl.constexpr(SMALL_DIVERGENCE)


@triton.jit
def _row_start(ptr, row, inner, stride_o, stride_i):
    """A row's first element. Offsets are 64-bit: N * V may pass 2^31."""
    outer = row // inner
    return ptr + outer.to(tl.int64) * stride_o + (row - outer * inner).to(tl.int64) * stride_i


@triton.jit
def _load(row_ptr, start, V: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr):
    """A tile in fp32; only the last one needs a mask, and pads with -inf."""
    offsets = start + tl.arange(0, BLOCK_V)
    if MASKED:
        tile = tl.load(row_ptr + offsets, mask=offsets < V, other=-float("inf"))
    else:
        tile = tl.load(row_ptr + offsets)
    return tile.to(tl.float32)


@triton.jit
def _store(row_ptr, start, tile, V: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK_V)
    tile = tile.to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + offsets, tile, mask=offsets < V)
    else:
        tl.store(row_ptr + offsets, tile)


@triton.jit
def _fill(row_ptr, value, V: tl.constexpr, BLOCK_V: tl.constexpr):
    tile = tl.full((BLOCK_V,), value, tl.float32)
    FULL: tl.constexpr = V - V % BLOCK_V
    for start in range(0, FULL, BLOCK_V):
        _store(row_ptr, start, tile, V, BLOCK_V, False)
    if FULL < V:
        _store(row_ptr, FULL, tile, V, BLOCK_V, True)


@triton.jit
def _sampled(row_ptr, token, V: tl.constexpr):
    """The logit of the sampled token; NaN for an id outside the vocabulary."""
    inside = (token >= 0) & (token < V)
    return tl.load(row_ptr + token, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _sweep_tile(
    z_ptr,
    w_ptr,
    start,
    a,
    b,
    c,
    d,
    e,
    f,
    g,
    h,
    scale,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """`online_step` on one tile; a..h are its running sums."""
    z = _load(z_ptr, start, V, BLOCK_V, MASKED)
    w = z
    if HAS_TEACHER:
        w = _load(w_ptr, start, V, BLOCK_V, MASKED)
    return online_step(z, w, a, b, c, d, e, f, g, h, scale, HAS_TEACHER, DIVERGENCE)


@triton.jit
def _second_tile(
    z_ptr,
    w_ptr,
    start,
    value,
    slope_sum,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    inv_t,
    scale,
    floor,
    parameter,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Adds a tile's terms and slopes (or its small terms alone), both normalisers known."""
    z = _load(z_ptr, start, V, BLOCK_V, MASKED)
    w = _load(w_ptr, start, V, BLOCK_V, MASKED)
    p, q, log_ratio = point(
        z, w, student_max, teacher_max, student_lse, teacher_lse, inv_t, scale, floor, HAS_FLOOR
    )
    if SMALL:
        raw_q = tl.exp2((w - teacher_max) * scale - teacher_lse * LOG2E)
        value += tl.sum(small_terms(z, p, q, raw_q, log_ratio, DIVERGENCE), 0)
    else:
        value += tl.sum(terms(p, q, log_ratio, parameter, DIVERGENCE), 0)
        slope_sum += tl.sum(slopes(p, q, log_ratio, parameter, DIVERGENCE), 0)
    return value, slope_sum


@triton.jit
def _second_sweep(
    z_ptr,
    w_ptr,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    inv_t,
    scale,
    floor,
    parameter,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMALL: tl.constexpr,
):
    value = 0.0
    slope_sum = 0.0
    FULL: tl.constexpr = V - V % BLOCK_V
    for start in range(0, FULL, BLOCK_V):
        value, slope_sum = _second_tile(
            z_ptr, w_ptr, start, value, slope_sum, student_max, teacher_max, student_lse,
            teacher_lse, inv_t, scale, floor, parameter, V, BLOCK_V, False, HAS_FLOOR, DIVERGENCE,
            SMALL,
        )  # fmt: skip
    if FULL < V:
        value, slope_sum = _second_tile(
            z_ptr, w_ptr, FULL, value, slope_sum, student_max, teacher_max, student_lse,
            teacher_lse, inv_t, scale, floor, parameter, V, BLOCK_V, True, HAS_FLOOR, DIVERGENCE,
            SMALL,
        )  # fmt: skip
    return value, slope_sum


@triton.jit
def _measure(
    z_ptr,
    w_ptr,
    inv_t,
    scale,
    floor,
    parameter,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ONE_SWEEP: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A row's statistics: maxima, log-sums, entropy, divergence, sum of slopes."""
    a, b, c, d, e, f, g, h = start_sweep()
    FULL: tl.constexpr = V - V % BLOCK_V
    for start in range(0, FULL, BLOCK_V):
        a, b, c, d, e, f, g, h = _sweep_tile(
            z_ptr, w_ptr, start, a, b, c, d, e, f, g, h, scale, V, BLOCK_V, False, HAS_TEACHER,
            DIVERGENCE,
        )  # fmt: skip
    if FULL < V:
        a, b, c, d, e, f, g, h = _sweep_tile(
            z_ptr, w_ptr, FULL, a, b, c, d, e, f, g, h, scale, V, BLOCK_V, True, HAS_TEACHER,
            DIVERGENCE,
        )  # fmt: skip
    student_lse = log_sum(c)
    entropy = student_lse - e / c * inv_t
    teacher_lse = 0.0
    value = 0.0
    slope_sum = 0.0
    if HAS_TEACHER:
        teacher_lse = log_sum(d)
        shift = teacher_lse - student_lse
        if ONE_SWEEP:
            value, slope_sum = swept_divergence(c, d, f, g, h, shift, inv_t, DIVERGENCE)
        else:
            value, slope_sum = _second_sweep(
                z_ptr, w_ptr, a, b, student_lse, teacher_lse, inv_t, scale, floor, parameter, V,
                BLOCK_V, HAS_FLOOR, DIVERGENCE, False,
            )  # fmt: skip
        value, slope_sum = settle(value, slope_sum, shift, DIVERGENCE)
        if HAS_SMALL:
            if value < _SMALL:
                value, _ = _second_sweep(
                    z_ptr, w_ptr, a, b, student_lse, teacher_lse, inv_t, scale, floor, parameter, V,
                    BLOCK_V, HAS_FLOOR, DIVERGENCE, True,
                )  # fmt: skip
    return a, b, student_lse, teacher_lse, entropy, value, slope_sum


@triton.jit
def _gradient_tile(
    gradient_ptr,
    z_ptr,
    w_ptr,
    start,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    entropy,
    slope_sum,
    c_div,
    c_logp,
    c_ent,
    inv_t,
    scale,
    floor,
    parameter,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    z = _load(z_ptr, start, V, BLOCK_V, MASKED)
    w = z
    if HAS_DIVERGENCE:
        w = _load(w_ptr, start, V, BLOCK_V, MASKED)
    gradient = _gradient(
        z, w, student_max, teacher_max, student_lse, teacher_lse, entropy, slope_sum, c_div, c_logp,
        c_ent, inv_t, scale, floor, parameter, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
    )  # fmt: skip
    _store(gradient_ptr, start, gradient, V, BLOCK_V, MASKED)


@triton.jit
def _gradient(
    z,
    w,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    entropy,
    slope_sum,
    c_div,
    c_logp,
    c_ent,
    inv_t,
    scale,
    floor,
    parameter,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The gradient of a tile, or of one entry, but for the sampled token's own term."""
    p, q, log_ratio = point(
        z, w, student_max, teacher_max, student_lse, teacher_lse, inv_t, scale, floor, HAS_FLOOR
    )
    s = p
    if HAS_DIVERGENCE:
        s = slopes(p, q, log_ratio, parameter, DIVERGENCE)
    return logit_gradient(
        p, s, z - student_max, slope_sum, student_lse, entropy, c_div, c_logp, c_ent, inv_t,
        HAS_DIVERGENCE, HAS_ENTROPY,
    )  # fmt: skip


@triton.jit
def _coefficient(ptr, row, stride, inv_t):
    """A row's coefficient with the 1/T of every logit gradient; 0 where there is none."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row * stride) * inv_t
    return value


@triton.jit
def _write_statistics(
    statistics_ptr,
    row,
    rows,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    entropy,
    divergence,
    slope_sum,
    log_prob,
    teacher_log_prob,
    inv_t,
):
    ptr = statistics_ptr + row
    rows = tl.cast(rows, tl.int64)  # a constant where there is one row, which has no .to
    tl.store(ptr + _DIVERGENCE * rows, divergence)
    tl.store(ptr + _LOG_PROB * rows, log_prob)
    tl.store(ptr + _TEACHER_LOG_PROB * rows, teacher_log_prob)
    tl.store(ptr + _ENTROPY * rows, entropy)
    tl.store(ptr + _LOGSUMEXP * rows, student_max * inv_t + student_lse)
    tl.store(ptr + _STUDENT_MAX * rows, student_max)
    tl.store(ptr + _TEACHER_MAX * rows, teacher_max)
    tl.store(ptr + _STUDENT_LSE * rows, student_lse)
    tl.store(ptr + _TEACHER_LSE * rows, teacher_lse)
    tl.store(ptr + _SLOPE_SUM * rows, slope_sum)


@triton.jit
def rows_kernel(
    student_ptr,
    teacher_ptr,
    token_ptr,
    valid_ptr,
    statistics_ptr,
    gradient_ptr,
    div_ptr,
    logp_ptr,
    ent_ptr,
    rows,
    inner,
    student_stride_o,
    student_stride_i,
    teacher_stride_o,
    teacher_stride_i,
    gradient_stride_o,
    gradient_stride_i,
    div_stride_n,
    logp_stride_n,
    ent_stride_n,
    inv_t,
    floor,
    parameter,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ONE_SWEEP: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    MEASURE: tl.constexpr,
    WRITE: tl.constexpr,
):
    """One row: MEASURE fills its statistics (else they are read), WRITE fills its gradient."""
    HAS_TEACHER: tl.constexpr = teacher_ptr is not None
    HAS_TOKEN: tl.constexpr = token_ptr is not None
    HAS_DIVERGENCE: tl.constexpr = div_ptr is not None
    HAS_ENTROPY: tl.constexpr = ent_ptr is not None
    FULL: tl.constexpr = V - V % BLOCK_V
    row = tl.program_id(0)
    z_ptr = _row_start(student_ptr, row, inner, student_stride_o, student_stride_i)
    w_ptr = z_ptr
    if HAS_TEACHER:
        w_ptr = _row_start(teacher_ptr, row, inner, teacher_stride_o, teacher_stride_i)
    gradient_row = z_ptr
    if WRITE:
        gradient_row = _row_start(gradient_ptr, row, inner, gradient_stride_o, gradient_stride_i)
    valid = True
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        scale = inv_t * LOG2E
        token = row * 0
        z_token = 0.0
        w_token = 0.0
        if HAS_TOKEN:
            # Before the gradient, which may overwrite the logits.
            token = tl.load(token_ptr + row)
            z_token = _sampled(z_ptr, token, V)
            w_token = z_token
            if HAS_TEACHER:
                w_token = _sampled(w_ptr, token, V)
            if WRITE and not MEASURE:
                # No reduction keeps the first gradient tile behind these loads.
                tl.debug_barrier()
        if MEASURE:
            (
                student_max, teacher_max, student_lse, teacher_lse, entropy, value, slope_sum
            ) = _measure(
                z_ptr, w_ptr, inv_t, scale, floor, parameter, V, BLOCK_V, HAS_TEACHER, HAS_FLOOR,
                ONE_SWEEP, HAS_SMALL, DIVERGENCE,
            )  # fmt: skip
            log_prob = 0.0
            teacher_log_prob = 0.0
            if HAS_TOKEN:
                log_prob = (z_token - student_max) * inv_t - student_lse
                if HAS_TEACHER:
                    teacher_log_prob = (w_token - teacher_max) * inv_t - teacher_lse
                    if HAS_FLOOR:
                        teacher_log_prob = tl.where(
                            teacher_log_prob < floor, floor, teacher_log_prob
                        )
            _write_statistics(
                statistics_ptr, row, rows, student_max, tl.where(HAS_TEACHER, teacher_max, 0.0),
                student_lse, teacher_lse, entropy, value, slope_sum, log_prob, teacher_log_prob,
                inv_t,
            )  # fmt: skip
        else:
            own = statistics_ptr + row
            count = tl.cast(rows, tl.int64)
            student_max = tl.load(own + _STUDENT_MAX * count)
            teacher_max = tl.load(own + _TEACHER_MAX * count)
            student_lse = tl.load(own + _STUDENT_LSE * count)
            teacher_lse = tl.load(own + _TEACHER_LSE * count)
            entropy = tl.load(own + _ENTROPY * count)
            slope_sum = tl.load(own + _SLOPE_SUM * count)
        if WRITE:
            c_div = _coefficient(div_ptr, row, div_stride_n, inv_t)
            c_logp = _coefficient(logp_ptr, row, logp_stride_n, inv_t)
            c_ent = _coefficient(ent_ptr, row, ent_stride_n, inv_t)
            # Backwards, so that the tiles read last by the sweep are still in the L2 cache.
            if FULL < V:
                _gradient_tile(
                    gradient_row, z_ptr, w_ptr, FULL, student_max, teacher_max, student_lse,
                    teacher_lse, entropy, slope_sum, c_div, c_logp, c_ent, inv_t, scale, floor,
                    parameter, V, BLOCK_V, True, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
            for back in range(0, FULL, BLOCK_V):
                _gradient_tile(
                    gradient_row, z_ptr, w_ptr, FULL - BLOCK_V - back, student_max, teacher_max,
                    student_lse, teacher_lse, entropy, slope_sum, c_div, c_logp, c_ent, inv_t,
                    scale, floor, parameter, V, BLOCK_V, False, HAS_FLOOR, HAS_DIVERGENCE,
                    HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
            if logp_ptr is not None:
                # One entry mended afterwards costs less than a comparison in every lane.
                own = _gradient(
                    z_token, w_token, student_max, teacher_max, student_lse, teacher_lse, entropy,
                    slope_sum, c_div, c_logp, c_ent, inv_t, scale, floor, parameter, HAS_FLOOR,
                    HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
                tl.debug_barrier()
                inside = (token >= 0) & (token < V)
                own = (own + c_logp).to(gradient_row.dtype.element_ty)
                tl.store(gradient_row + token, own, mask=inside)
    else:
        if MEASURE:
            for field in tl.static_range(_STATISTICS):
                tl.store(statistics_ptr + row + field * tl.cast(rows, tl.int64), 0.0)
        if WRITE:
            _fill(gradient_row, 0.0, V, BLOCK_V)


@triton.jit
def scale_kernel(
    gradient_ptr,
    factor_ptr,
    inner,
    stride_o,
    stride_i,
    factor_stride_n,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Multiplies a row by its factor; a factor of 1 reads nothing else."""
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row * factor_stride_n).to(tl.float32)
    FULL: tl.constexpr = V - V % BLOCK_V
    if factor != 1.0:
        row_ptr = _row_start(gradient_ptr, row, inner, stride_o, stride_i)
        for start in range(0, FULL, BLOCK_V):
            tile = _load(row_ptr, start, V, BLOCK_V, False)
            _store(row_ptr, start, tile * factor, V, BLOCK_V, False)
        if FULL < V:
            tile = _load(row_ptr, FULL, V, BLOCK_V, True)
            _store(row_ptr, FULL, tile * factor, V, BLOCK_V, True)


# -- launchers ------------------------------------------------------------------------------------


def row_statistics(rows: Rows, statistics: Tensor) -> None:
    _launch(rows, statistics, None, None, measure=True)


def row_gradient(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    _launch(rows, statistics, coefficients, gradient, measure=False)


def hybrid_rows(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    _launch(rows, statistics, coefficients, gradient, measure=True)


def scale_rows(gradient: Tensor, factor: Tensor) -> None:
    count = gradient.shape[0] * gradient.shape[1]
    if count == 0:
        return
    launch = config.rows(gradient.shape[-1])
    with _on_device(gradient):
        scale_kernel[(count,)](
            gradient,
            factor,
            gradient.shape[1],
            gradient.stride(0),
            gradient.stride(1),
            0 if factor.numel() == 1 else 1,
            V=gradient.shape[-1],
            BLOCK_V=launch.block_v,
            **launch.options(),
        )


def _launch(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
    *,
    measure: bool,
) -> None:
    if rows.total == 0:
        return
    launch = config.rows(rows.student.shape[-1], rows.one_sweep)
    with _on_device(rows.student):
        rows_kernel[(rows.total,)](
            *kernel_arguments(rows, statistics, coefficients, gradient),
            **kernel_constants(rows, launch, measure=measure, write=gradient is not None),
            **launch.options(),
        )


def kernel_arguments(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients | None,
    gradient: Tensor | None,
) -> tuple:
    """The run-time arguments of `rows_kernel`, in order."""
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


def kernel_constants(rows: Rows, launch: config.Launch, *, measure: bool, write: bool) -> dict:
    """The compile-time arguments of `rows_kernel`."""
    return {
        "V": rows.student.shape[-1],
        "BLOCK_V": launch.block_v,
        "HAS_FLOOR": rows.teacher_floor is not None,
        "ONE_SWEEP": rows.one_sweep,
        "HAS_SMALL": rows.divergence in KL_FAMILY,
        "DIVERGENCE": rows.divergence,
        "MEASURE": measure,
        "WRITE": write,
    }


def _row_strides(logits: Tensor | None) -> tuple[int, int]:
    return (0, 0) if logits is None else (logits.stride(0), logits.stride(1))


def _on_device(tensor: Tensor) -> AbstractContextManager:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
