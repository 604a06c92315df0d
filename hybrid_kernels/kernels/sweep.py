"""The sweeping kernel: one program per row, the vocabulary in tiles, in up to three sweeps.

One kernel in three modes: it measures a row's statistics, writes its gradient, or both. Per row it
reads the logits once for the statistics (twice where the divergence needs both normalisers first,
or is so small that its value is summed anew) and once for the gradient. This is the form for
statistics alone, for a gradient whose coefficients depend on the statistics, and for GPUs whose
programs can't meet (`resident.py` is the other one).
"""

import triton
import triton.language as tl

from hybrid_kernels.kernels.access import (
    clear_edges,
    clear_statistics,
    load_body,
    load_edges,
    locate,
    read_statistics,
    row_weights,
    sampled,
    sampled_token,
    store_body,
    store_edges,
    store_sampled,
    token_statistics,
    write_divergence,
    write_statistics,
)
from hybrid_kernels.kernels.math import (
    LOG2E,
    Constants,
    logit_gradient,
    merge,
    no_sums,
    normalisers,
    settle,
    small_value,
    swept_divergence,
    tile_sums,
    value_and_slope,
    with_slope_sum,
)
from hybrid_kernels.kernels.reduce import agreed
from hybrid_kernels.rows import SMALL_DIVERGENCE

_SMALL = tl.constexpr(SMALL_DIVERGENCE)


@triton.jit
def _load(where, start, BLOCK_V: tl.constexpr, EDGES: tl.constexpr, HAS_TEACHER: tl.constexpr):
    """A tile of both sides, padded."""
    offsets = start + tl.arange(0, BLOCK_V)
    return load_body(where, offsets, offsets < where.body, EDGES, HAS_TEACHER)


@triton.jit
def _store(where, start, tile, BLOCK_V: tl.constexpr, EDGES: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK_V)
    store_body(where, offsets, offsets < where.body, tile, EDGES)


@triton.jit
def _first_sweep(
    where,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    sums = no_sums()
    if EDGES:
        z_edges, w_edges = load_edges(where, where.body >= 0, V, HAS_TEACHER)
        sums = tile_sums((z_edges,), (w_edges,), constants, 1, HAS_TEACHER, DIVERGENCE)
    for start in range(0, V, BLOCK_V):
        z, w = _load(where, start, BLOCK_V, EDGES, HAS_TEACHER)
        tile = tile_sums((z,), (w,), constants, 1, HAS_TEACHER, DIVERGENCE)
        sums = merge(sums, tile, constants.scale)
    return sums


@triton.jit
def _second_sweep(
    where,
    stats,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Divergence and sum of slopes, both normalisers known."""
    value = tl.full((), 0.0, tl.float32)
    slope_sum = tl.full((), 0.0, tl.float32)
    if EDGES:
        z_edges, w_edges = load_edges(where, where.body >= 0, V, True)
        value, slope_sum = value_and_slope(
            (z_edges,), (w_edges,), stats, constants, 1, HAS_FLOOR, DIVERGENCE
        )
    for start in range(0, V, BLOCK_V):
        z, w = _load(where, start, BLOCK_V, EDGES, True)
        more, steeper = value_and_slope((z,), (w,), stats, constants, 1, HAS_FLOOR, DIVERGENCE)
        value += more
        slope_sum += steeper
    return value, slope_sum


@triton.jit
def _small_sweep(
    where,
    stats,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A divergence too small for the difference of large sums that a sweep finds it as."""
    value = tl.full((), 0.0, tl.float32)
    if EDGES:
        z_edges, w_edges = load_edges(where, where.body >= 0, V, True)
        value = small_value((z_edges,), (w_edges,), stats, constants, 1, HAS_FLOOR, DIVERGENCE)
    for start in range(0, V, BLOCK_V):
        z, w = _load(where, start, BLOCK_V, EDGES, True)
        value += small_value((z,), (w,), stats, constants, 1, HAS_FLOOR, DIVERGENCE)
    return value


@triton.jit
def _gradient_sweep(
    where,
    stats,
    weights,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    if EDGES:
        z_edges, w_edges = load_edges(where, where.body >= 0, V, HAS_DIVERGENCE)
        edges = logit_gradient(
            z_edges, w_edges, stats, weights, constants, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY,
            DIVERGENCE,
        )  # fmt: skip
        store_edges(where, edges, V)
    # Backwards: the tiles that the sweep before read last are still in the L2 cache.
    LAST: tl.constexpr = (V - 1) // BLOCK_V * BLOCK_V
    for back in range(0, V, BLOCK_V):
        start = LAST - back
        z, w = _load(where, start, BLOCK_V, EDGES, HAS_DIVERGENCE)
        tile = logit_gradient(
            z, w, stats, weights, constants, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY,
            DIVERGENCE,
        )  # fmt: skip
        _store(where, start, tile, BLOCK_V, EDGES)


@triton.jit
def sweep_kernel(
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
    EDGES: tl.constexpr,
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
    row = tl.program_id(0)
    constants = Constants(inv_t, inv_t * LOG2E, floor, parameter)
    where = locate(
        student_ptr, teacher_ptr, gradient_ptr, row, inner, student_stride_o, student_stride_i,
        teacher_stride_o, teacher_stride_i, gradient_stride_o, gradient_stride_i, V, EDGES,
    )  # fmt: skip
    valid = True
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + row) != 0
    if valid:
        token = tl.full((), -1, tl.int32)
        z_token = 0.0
        w_token = 0.0
        if HAS_TOKEN:
            # Before the gradient, which may overwrite the logits.
            token = sampled_token(token_ptr, row, V)
            z_token = sampled(where.student, token)
            w_token = z_token
            if HAS_TEACHER:
                w_token = sampled(where.teacher, token)
            if WRITE and not MEASURE:
                # No reduction keeps the first gradient tile behind these loads.
                tl.debug_barrier()
        if MEASURE:
            sums = _first_sweep(where, constants, V, BLOCK_V, EDGES, HAS_TEACHER, DIVERGENCE)
            stats = normalisers(sums, constants, HAS_TEACHER)
            value = 0.0
            if HAS_TEACHER:
                if ONE_SWEEP:
                    value, slope_sum = swept_divergence(sums, stats, constants, DIVERGENCE)
                else:
                    value, slope_sum = _second_sweep(
                        where, stats, constants, V, BLOCK_V, EDGES, HAS_FLOOR, DIVERGENCE
                    )
                value, slope_sum = settle(value, slope_sum, stats.shift, DIVERGENCE)
                stats = with_slope_sum(stats, slope_sum)
                if HAS_SMALL:
                    if agreed(value < _SMALL):
                        value = _small_sweep(
                            where, stats, constants, V, BLOCK_V, EDGES, HAS_FLOOR, DIVERGENCE
                        )
            log_prob = 0.0
            teacher_log_prob = 0.0
            if HAS_TOKEN:
                log_prob, teacher_log_prob = token_statistics(
                    z_token, w_token, stats, constants, HAS_TEACHER, HAS_FLOOR
                )
            write_statistics(statistics_ptr, row, rows, stats, log_prob, teacher_log_prob, inv_t)
            write_divergence(statistics_ptr, row, rows, value)
        else:
            stats = read_statistics(statistics_ptr, row, rows)
        if WRITE:
            weights = row_weights(
                div_ptr, logp_ptr, ent_ptr, row, div_stride_n, logp_stride_n, ent_stride_n, inv_t
            )
            _gradient_sweep(
                where, stats, weights, constants, V, BLOCK_V, EDGES, HAS_FLOOR, HAS_DIVERGENCE,
                HAS_ENTROPY, DIVERGENCE,
            )  # fmt: skip
            if logp_ptr is not None:
                store_sampled(
                    where, token, z_token, w_token, stats, weights, constants, HAS_FLOOR,
                    HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
    else:
        if MEASURE:
            clear_statistics(statistics_ptr, row, rows)
        if WRITE:
            for start in range(0, V, BLOCK_V):
                _store(where, start, tl.zeros((BLOCK_V,), tl.float32), BLOCK_V, EDGES)
            if EDGES:
                clear_edges(where, V)


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
    EDGES: tl.constexpr,
):
    """Multiplies a row by its factor; a factor of 1 reads nothing else."""
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row * factor_stride_n).to(tl.float32)
    if factor != 1.0:
        where = locate(
            gradient_ptr, None, None, row, inner, stride_o, stride_i, 0, 0, 0, 0, V, EDGES
        )
        for start in range(0, V, BLOCK_V):
            tile, _ = _load(where, start, BLOCK_V, EDGES, False)
            _store(where, start, tile.to(tl.float32) * factor, BLOCK_V, EDGES)
        if EDGES:
            edges, _ = load_edges(where, where.body >= 0, V, False)
            store_edges(where, edges.to(tl.float32) * factor, V)
