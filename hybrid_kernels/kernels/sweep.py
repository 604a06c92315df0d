"""The sweeping kernel: one program per row, the vocabulary in tiles, in up to three sweeps.

One kernel in three modes: it measures a row's statistics, writes its gradient, or both. Per row it
reads the logits once for the statistics (twice where the divergence needs both normalisers first,
or is so small that its value is summed anew) and once for the gradient. This is the form for
statistics alone, for a gradient whose coefficients depend on the statistics, and for GPUs whose
programs can't meet (`resident.py` is the other one).
"""

import triton
import triton.language as tl

from hybrid_kernels.kernels import topk
from hybrid_kernels.kernels.access import (
    chunk,
    clear_edges,
    clear_statistics,
    load_body,
    load_edges,
    locate,
    place,
    read_statistics,
    row_start,
    row_weights,
    sampled,
    sampled_by_all,
    sampled_token,
    store_body,
    store_edges,
    store_sampled,
    student_log_prob,
    teacher_log_prob,
    write_divergence,
    write_statistics,
)
from hybrid_kernels.kernels.divergences import (
    LOG2E,
    nothing,
)
from hybrid_kernels.kernels.math import (
    Constants,
    Row,
    all_normalisers,
    all_sums,
    each_together,
    full_gradient,
    is_small,
    merge_all,
    no_sums_of,
    settle_all,
    sides,
    small_values,
    swept_divergences,
    values_and_slopes,
)
from hybrid_kernels.kernels.reduce import agreed


@triton.jit
def _load(
    where,
    start,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
):
    """A tile of all sides, in the form of one chunk."""
    z, ws = load_body(where, start, where.body, BLOCK_V, PAD, EDGES, MEMBERS, TOPK)
    wss = ()
    for i in tl.static_range(1 if TOPK else MEMBERS):
        wss = wss + ((ws[i],),)
    return (z,), wss


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
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    COUNT: tl.constexpr = sides(MEMBERS, TOPK)
    sums = no_sums_of(COUNT)
    if EDGES:
        edge_zs, edge_wss = load_edges(where, where.body >= 0, V, PAD, MEMBERS, TOPK)
        sums = all_sums(edge_zs, edge_wss, constants, 1, MEMBERS, TOPK, DIVERGENCE)
    for start in range(0, V, BLOCK_V):
        zs, wss = _load(where, start, BLOCK_V, PAD, EDGES, MEMBERS, TOPK)
        tile = all_sums(zs, wss, constants, 1, MEMBERS, TOPK, DIVERGENCE)
        sums = merge_all(sums, tile, constants.scale, COUNT)
    return sums


@triton.jit
def _second_sweep(
    where,
    stats,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMALL: tl.constexpr = False,
):
    """Divergence and sum of slopes of each member, all normalisers known."""
    values = ()
    slopes = ()
    for _ in tl.static_range(MEMBERS):
        values = values + (tl.full((), 0.0, tl.float32),)
        slopes = slopes + (nothing(DIVERGENCE),)
    if EDGES:
        edge_zs, edge_wss = load_edges(where, where.body >= 0, V, PAD, MEMBERS, False)
        values, slopes = values_and_slopes(
            edge_zs, edge_wss, stats, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE, SMALL
        )
    for start in range(0, V, BLOCK_V):
        zs, wss = _load(where, start, BLOCK_V, PAD, EDGES, MEMBERS, False)
        more, steeper = values_and_slopes(
            zs, wss, stats, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE, SMALL
        )
        values = each_together(values, more, MEMBERS, "")
        slopes = each_together(slopes, steeper, MEMBERS, DIVERGENCE)
    return values, slopes


@triton.jit
def _small_sweep(
    where,
    stats,
    shares,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A divergence too small for the difference of large sums that a sweep finds it as."""
    value = tl.full((), 0.0, tl.float32)
    if EDGES:
        edge_zs, edge_wss = load_edges(where, where.body >= 0, V, PAD, MEMBERS, False)
        value = small_values(
            edge_zs, edge_wss, stats, shares, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE
        )
    for start in range(0, V, BLOCK_V):
        zs, wss = _load(where, start, BLOCK_V, PAD, EDGES, MEMBERS, False)
        value += small_values(zs, wss, stats, shares, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE)
    return value


@triton.jit
def _gradient_sweep(
    where,
    stats,
    shares,
    weights,
    constants,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    if EDGES:
        edge_zs, edge_wss = load_edges(where, where.body >= 0, V, PAD, MEMBERS, False)
        edges = full_gradient(
            edge_zs[0], chunk(edge_wss, 0, MEMBERS), stats, shares, weights, constants, MEMBERS,
            HAS_FLOOR, HAS_ENTROPY, DIVERGENCE,
        )  # fmt: skip
        store_edges(where, edges, V)
    # Backwards: the tiles that the sweep before read last are still in the L2 cache.
    LAST: tl.constexpr = (V - 1) // BLOCK_V * BLOCK_V
    for back in range(0, V, BLOCK_V):
        start = LAST - back
        zs, wss = _load(where, start, BLOCK_V, PAD, EDGES, MEMBERS, False)
        tile = full_gradient(
            zs[0], chunk(wss, 0, MEMBERS), stats, shares, weights, constants, MEMBERS, HAS_FLOOR,
            HAS_ENTROPY, DIVERGENCE,
        )  # fmt: skip
        _store(where, start, tile, BLOCK_V, EDGES)


@triton.jit
def sweep_kernel(
    problem,
    target,
    statistics_ptr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
    CORRECTS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ONE_SWEEP: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    MEASURE: tl.constexpr,
    WRITE: tl.constexpr,
):
    """One row: MEASURE fills its statistics (else they are read), a target gets its gradient."""
    HAS_TOKEN: tl.constexpr = problem.token_ids is not None
    # How many rows of statistics there are, and how many teachers are known by their logits.
    ROWS: tl.constexpr = sides(MEMBERS, False)
    FULL: tl.constexpr = 0 if TOPK else MEMBERS
    row = tl.program_id(0)
    count = problem.count
    shares = problem.shares
    constants = Constants(problem.inv_t, problem.inv_t * LOG2E, problem.floor, problem.parameter)
    where = locate(problem, target, row, V, EDGES, MEMBERS, TOPK, WRITE)
    valid = True
    if problem.valid is not None:
        valid = tl.load(problem.valid + row) != 0
    if valid:
        token = tl.full((), -1, tl.int32)
        z_token = tl.full((), 0.0, tl.float32)
        w_token = ()
        if HAS_TOKEN:
            # Before the gradient, which may overwrite the logits.
            token = sampled_token(problem.token_ids, row, V)
            z_token = sampled(where.student, token)
            w_token = sampled_by_all(where, token, MEMBERS, TOPK)
            if WRITE and not MEASURE:
                # No reduction keeps the first gradient tile behind these loads.
                tl.debug_barrier()
        correction = tl.full((), 0.0, tl.float32)
        in_support = token < -1
        if MEASURE:
            sums = _first_sweep(where, constants, V, BLOCK_V, PAD, EDGES, MEMBERS, TOPK, DIVERGENCE)
            stats = all_normalisers(sums, constants, MEMBERS, TOPK)
            value = tl.full((), 0.0, tl.float32)
            log_q = tl.full((), 0.0, tl.float32)
            if TOPK:
                value, stats, log_q, correction, in_support = topk.compare(
                    problem, statistics_ptr, row, row >= 0, token, z_token, sums, stats, constants,
                    K, BLOCK_K, MEMBERS, HAS_FLOOR, CORRECTS, TAIL, DIVERGENCE,
                )  # fmt: skip
            elif MEMBERS > 0:
                if ONE_SWEEP:
                    values, slopes = swept_divergences(sums, stats, constants, MEMBERS, DIVERGENCE)
                else:
                    values, slopes = _second_sweep(
                        where, stats, constants, V, BLOCK_V, PAD, EDGES, MEMBERS, HAS_FLOOR,
                        DIVERGENCE,
                    )  # fmt: skip
                value, stats = settle_all(
                    values, slopes, stats, shares, constants.parameter, MEMBERS, DIVERGENCE
                )
                if HAS_SMALL:
                    if agreed(is_small(value, shares, MEMBERS)):
                        value = _small_sweep(
                            where, stats, shares, constants, V, BLOCK_V, PAD, EDGES, MEMBERS,
                            HAS_FLOOR, DIVERGENCE,
                        )  # fmt: skip
                if HAS_TOKEN:
                    log_q = teacher_log_prob(w_token, stats, shares, constants, MEMBERS, HAS_FLOOR)
            log_p = tl.full((), 0.0, tl.float32)
            if HAS_TOKEN:
                log_p = student_log_prob(z_token, Row(*stats[0]), constants.inv_t)
            write_statistics(
                statistics_ptr, row, count, stats, log_p, log_q, constants.inv_t, ROWS, TOPK
            )
            write_divergence(statistics_ptr, row, count, value)
        else:
            stats = read_statistics(statistics_ptr, row, count, ROWS)
            if TOPK:
                correction, in_support = topk.read_correction(
                    problem, statistics_ptr, row, token, K, BLOCK_K, CORRECTS
                )
        if WRITE:
            HAS_DIVERGENCE: tl.constexpr = target.divergence is not None
            HAS_ENTROPY: tl.constexpr = target.entropy is not None
            GRADIENT_MEMBERS: tl.constexpr = FULL if HAS_DIVERGENCE else 0
            weights = row_weights(target, row, constants.inv_t)
            tile_weights = weights
            if TOPK:
                weights = topk.corrected(weights, correction)
                tile_weights = topk.outside_weights(stats, shares, weights, MEMBERS, TAIL)
            _gradient_sweep(
                where, stats, shares, tile_weights, constants, V, BLOCK_V, PAD, EDGES,
                GRADIENT_MEMBERS, HAS_FLOOR, HAS_ENTROPY, DIVERGENCE,
            )  # fmt: skip
            if target.log_prob is not None or CORRECTS:
                # (A support has its own way with tokens in it.)
                store_sampled(
                    where, tl.where(in_support, -1, token), z_token, w_token, stats, shares,
                    tile_weights, weights.log_prob, constants, GRADIENT_MEMBERS, HAS_FLOOR,
                    HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
            if TOPK:
                topk.support_gradient(
                    problem, where, row, token, 0, V, row >= 0, stats, weights, constants, K,
                    BLOCK_K, MEMBERS, HAS_FLOOR, HAS_ENTROPY, TAIL, DIVERGENCE,
                )  # fmt: skip
    else:
        if MEASURE:
            clear_statistics(statistics_ptr, row, count, MEMBERS)
        if WRITE:
            for start in range(0, V, BLOCK_V):
                _store(where, start, tl.zeros((BLOCK_V,), tl.float32), BLOCK_V, EDGES)
            if EDGES:
                clear_edges(where, V)


@triton.jit
def values_kernel(
    problem,
    statistics_ptr,
    values_ptr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """What the entries of one row add to its divergence, where there are more of them elsewhere:
    the second sweep alone, with the statistics of the whole row."""
    row = tl.program_id(0)
    constants = Constants(problem.inv_t, problem.inv_t * LOG2E, problem.floor, problem.parameter)
    where = locate(problem, None, row, V, EDGES, MEMBERS, False, False)
    valid = True
    if problem.valid is not None:
        valid = tl.load(problem.valid + row) != 0
    if valid:
        count = tl.cast(problem.count, tl.int64)
        stats = read_statistics(statistics_ptr, row, count, MEMBERS)
        values, slopes = _second_sweep(
            where, stats, constants, V, BLOCK_V, PAD, EDGES, MEMBERS, HAS_FLOOR, DIVERGENCE,
            HAS_SMALL,
        )  # fmt: skip
        log_q = tl.full((), 0.0, tl.float32)
        if problem.token_ids is not None:
            w_token = sampled_by_all(
                where, sampled_token(problem.token_ids, row, V), MEMBERS, False
            )
            log_q = teacher_log_prob(w_token, stats, problem.shares, constants, MEMBERS, HAS_FLOOR)
        tl.store(values_ptr + row, log_q)
        for i in tl.static_range(MEMBERS):
            tl.store(values_ptr + row + (2 * i + 1) * count, values[i])
            tl.store(values_ptr + row + (2 * i + 2) * count, slopes[i])


@triton.jit
def scale_kernel(
    gradient,
    factor_ptr,
    factor_stride,
    inner,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Multiplies a row by its factor; a factor of 1 reads nothing else."""
    row = tl.program_id(0)
    factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
    if factor != 1.0:
        start = row_start(gradient, row, inner)
        where = place(start, (), start, start, V, EDGES)
        for start in range(0, V, BLOCK_V):
            tiles, _ = _load(where, start, BLOCK_V, 0.0, EDGES, 0, False)
            _store(where, start, tiles[0].to(tl.float32) * factor, BLOCK_V, EDGES)
        if EDGES:
            edges, _ = load_edges(where, where.body >= 0, V, 0.0, 0, False)
            store_edges(where, edges[0].to(tl.float32) * factor, V)
