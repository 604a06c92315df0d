"""The row-resident kernel: statistics and gradient with every logit read once, 3 N V entries.

A row is cut into SPLITS slices, one for each program of a *group*. A program loads its slice of
both sides once and keeps it in registers as loaded; it publishes the sums of its slice, meets its
siblings, merges all sums, and writes its slice of the gradient. Divergences that need both
normalisers first meet twice. Where a row fits into one program, nothing is published.

Of the guards of infinite entries (`math.py`) a slice needs none unless its sums come out infinite
or NaN. The slice is then read again, tile by tile, with the guards on. (So is every slice of fp16
logits that does not fill its last chunk: its padding is infinite.)

The grid is persistent: groups take rows in turn, and it must be resident as a whole, because
siblings wait for each other (hence the cooperative launch). To hide the meeting, PREFETCH starts
the loads of a group's next row before the wait.

What is published lies in one of two alternating slots. A program that writes a slot for the second
time has passed the meeting in between, for which every sibling has first read that slot.

`STAGE` runs the programs of a group one after another, as the interpreter must: launch k ends after
meeting k is published, and the last launch finds everything published. -1 is the real thing.
"""

import triton
import triton.language as tl

from hybrid_kernels.kernels.access import (
    clear_edges,
    clear_statistics,
    load_body,
    load_edges,
    locate,
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
    START,
    Constants,
    Sums,
    about,
    is_finite,
    logit_gradient,
    merge,
    needs_student_d,
    needs_teacher_d,
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

# Numbers that a program publishes at once, at most: the fields of `Sums`.
PUBLISHED = 8
_PUBLISHED = tl.constexpr(PUBLISHED)
# Slots of a group: two that alternate between meetings, and one for small divergences.
SLOTS = 3
_SLOTS = tl.constexpr(SLOTS)
_SMALL_SLOT = tl.constexpr(2)


@triton.jit
def _slot(published_ptr, slot, LANES: tl.constexpr):
    return published_ptr + slot * (_PUBLISHED * LANES)


@triton.jit
def _read(slot_ptr, field, empty, SPLITS: tl.constexpr, LANES: tl.constexpr):
    """One number from every sibling, past the L1 cache, which other programs don't update."""
    lane = tl.arange(0, LANES)
    return tl.load(
        slot_ptr + field * LANES + lane, mask=lane < SPLITS, other=empty, cache_modifier=".cg"
    )


@triton.jit
def _publish_sums(
    slot_ptr,
    part,
    sums,
    LANES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    tl.store(slot_ptr + part, sums.student_max)
    tl.store(slot_ptr + LANES + part, sums.student_sum)
    tl.store(slot_ptr + 2 * LANES + part, sums.student_x)
    if HAS_TEACHER:
        tl.store(slot_ptr + 3 * LANES + part, sums.teacher_max)
        tl.store(slot_ptr + 4 * LANES + part, sums.teacher_sum)
        if needs_student_d(DIVERGENCE):
            tl.store(slot_ptr + 5 * LANES + part, sums.student_d)
        if needs_teacher_d(DIVERGENCE):
            tl.store(slot_ptr + 6 * LANES + part, sums.teacher_d)
            tl.store(slot_ptr + 7 * LANES + part, sums.teacher_kept)


@triton.jit
def _merged_sums(
    slot_ptr,
    scale,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The sums of the row from those of all its slices."""
    zero = tl.full((), 0.0, tl.float32)
    parts = Sums(
        _read(slot_ptr, 0, START, SPLITS, LANES),
        zero,
        _read(slot_ptr, 1, 0.0, SPLITS, LANES),
        _read(slot_ptr, 2, 0.0, SPLITS, LANES),
        zero,
        zero,
        zero,
        zero,
    )
    if HAS_TEACHER:
        student_d = zero
        teacher_d = zero
        teacher_kept = zero
        if needs_student_d(DIVERGENCE):
            student_d = _read(slot_ptr, 5, 0.0, SPLITS, LANES)
        if needs_teacher_d(DIVERGENCE):
            teacher_d = _read(slot_ptr, 6, 0.0, SPLITS, LANES)
            teacher_kept = _read(slot_ptr, 7, 0.0, SPLITS, LANES)
        parts = Sums(
            parts.student_max,
            _read(slot_ptr, 3, START, SPLITS, LANES),
            parts.student_sum,
            parts.student_x,
            _read(slot_ptr, 4, 0.0, SPLITS, LANES),
            student_d,
            teacher_d,
            teacher_kept,
        )
    student_max = tl.max(parts.student_max, 0)
    teacher_max = zero
    teacher_sum = zero
    student_d = zero
    teacher_d = zero
    teacher_kept = zero
    if HAS_TEACHER:
        teacher_max = tl.max(parts.teacher_max, 0)
    parts = about(parts, student_max, teacher_max, scale)
    if HAS_TEACHER:
        teacher_sum = tl.sum(parts.teacher_sum, 0)
        if needs_student_d(DIVERGENCE):
            student_d = tl.sum(parts.student_d, 0)
        if needs_teacher_d(DIVERGENCE):
            teacher_d = tl.sum(parts.teacher_d, 0)
            teacher_kept = tl.sum(parts.teacher_kept, 0)
    return Sums(
        student_max,
        teacher_max,
        tl.sum(parts.student_sum, 0),
        tl.sum(parts.student_x, 0),
        teacher_sum,
        student_d,
        teacher_d,
        teacher_kept,
    )


@triton.jit
def _arrive(counter_ptr):
    """Makes what this program has published visible; returns how many arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _wait(counter_ptr, arrivals):
    """Until that many arrivals, after which everything that they published can be read."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _lanes(part, chunk, limit, SLICE: tl.constexpr, CHUNK_V: tl.constexpr):
    """Offsets in the body of a slice's chunk, and which lanes have an entry."""
    offsets = part * SLICE + chunk * CHUNK_V + tl.arange(0, CHUNK_V)
    return offsets, offsets < tl.minimum((part + 1) * SLICE, limit)


@triton.jit
def _load_chunk(
    where,
    part,
    chunk,
    limit,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
):
    offsets, inside = _lanes(part, chunk, limit, SLICE, CHUNK_V)
    return load_body(where, offsets, inside, EDGES, HAS_TEACHER)


@triton.jit
def _load(
    where,
    part,
    wanted,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
):
    """A slice of both sides as stored, in chunks; nothing is read unless `wanted`."""
    limit = tl.where(wanted, where.body, 0)
    zs = ()
    ws = ()
    for i in tl.static_range(CHUNKS):
        z, w = _load_chunk(where, part, i, limit, SLICE, CHUNK_V, EDGES, HAS_TEACHER)
        zs = zs + (z,)
        ws = ws + (w,)
    return zs, ws


@triton.jit
def _guarded_sums(
    where,
    part,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The sums of a slice with infinite entries. A case so rare must not keep registers: it reads
    the slice again, chunk by chunk, in a loop that is not unrolled."""
    sums = no_sums()
    for i in range(CHUNKS):
        z, w = _load_chunk(where, part, i, where.body, SLICE, CHUNK_V, EDGES, HAS_TEACHER)
        chunk = tile_sums((z,), (w,), constants, 1, HAS_TEACHER, DIVERGENCE)
        sums = merge(sums, chunk, constants.scale)
    return sums


@triton.jit
def _row_value_and_slope(
    published_ptr,
    counter_ptr,
    meetings,
    part,
    zs,
    ws,
    z_edges,
    w_edges,
    stats,
    constants,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    STAGE: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Divergence and sum of slopes of the row, both normalisers known: the second meeting."""
    value, slope_sum = value_and_slope(zs, ws, stats, constants, CHUNKS, HAS_FLOOR, DIVERGENCE)
    if EDGES:
        if part == 0:
            more, steeper = value_and_slope(
                (z_edges,), (w_edges,), stats, constants, 1, HAS_FLOOR, DIVERGENCE
            )
            value += more
            slope_sum += steeper
    if SPLITS > 1:
        ptr = _slot(published_ptr, meetings % 2, LANES)
        if STAGE != 0:
            tl.store(ptr + part, value)
            tl.store(ptr + LANES + part, slope_sum)
            _arrive(counter_ptr)
        if STAGE < 0:
            _wait(counter_ptr, (meetings + 1) * SPLITS)
        value = tl.sum(_read(ptr, 0, 0.0, SPLITS, LANES), 0)
        slope_sum = tl.sum(_read(ptr, 1, 0.0, SPLITS, LANES), 0)
    return value, slope_sum


@triton.jit
def _row_small_value(
    published_ptr,
    counter_ptr,
    part,
    zs,
    ws,
    z_edges,
    w_edges,
    stats,
    constants,
    statistics_ptr,
    row,
    rows,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A small divergence summed anew. Nobody waits for it: the last to arrive writes the sum."""
    value = small_value(zs, ws, stats, constants, CHUNKS, HAS_FLOOR, DIVERGENCE)
    if EDGES:
        if part == 0:
            value += small_value((z_edges,), (w_edges,), stats, constants, 1, HAS_FLOOR, DIVERGENCE)
    if SPLITS > 1:
        ptr = _slot(published_ptr, _SMALL_SLOT, LANES)
        tl.store(ptr + part, value)
        before = _arrive(counter_ptr + 1)
        if before % SPLITS == SPLITS - 1:
            tl.debug_barrier()
            value = tl.sum(_read(ptr, 0, 0.0, SPLITS, LANES), 0)
            write_divergence(statistics_ptr, row, rows, value)
    return value


@triton.jit
def _write_guarded_gradient(
    where,
    part,
    stats,
    weights,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """As `_guarded_sums`, for the gradient."""
    for i in range(CHUNKS):
        z, w = _load_chunk(where, part, i, where.body, SLICE, CHUNK_V, EDGES, HAS_DIVERGENCE)
        gradient = logit_gradient(
            z, w, stats, weights, constants, HAS_FLOOR,
            HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
        )  # fmt: skip
        offsets, inside = _lanes(part, i, where.body, SLICE, CHUNK_V)
        store_body(where, offsets, inside, gradient, EDGES)


@triton.jit
def _write_gradient(
    where,
    part,
    zs,
    ws,
    stats,
    weights,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr,
):
    for i in tl.static_range(CHUNKS):
        gradient = logit_gradient(
            zs[i], ws[i], stats, weights, constants, HAS_FLOOR,
            HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE, GUARDED,
        )  # fmt: skip
        offsets, inside = _lanes(part, i, where.body, SLICE, CHUNK_V)
        store_body(where, offsets, inside, gradient, EDGES)


@triton.jit
def _clear_gradient(
    where,
    part,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
):
    """A masked row's."""
    for i in tl.static_range(CHUNKS):
        offsets, inside = _lanes(part, i, where.body, SLICE, CHUNK_V)
        store_body(where, offsets, inside, tl.zeros((CHUNK_V,), tl.float32), EDGES)


@triton.jit
def _wanted(valid_ptr, row, rows):
    """Whether a row is to be read: it exists and is not masked."""
    wanted = row < rows
    if valid_ptr is not None:
        wanted = tl.load(valid_ptr + row, mask=wanted, other=0).to(tl.int32) != 0
    return wanted


@triton.jit
def _owns(where, part, token, SLICE: tl.constexpr):
    """Whether an entry is in this program's slice, or in the edges, which are the first's."""
    offset = token - where.head
    in_body = (offset >= 0) & (offset < where.body)
    return (token >= 0) & (tl.where(in_body, offset // SLICE, 0) == part)


@triton.jit
def resident_kernel(
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
    published_ptr,
    counter_ptr,
    groups,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    PREFETCH: tl.constexpr,
    STAGE: tl.constexpr,
    EDGES: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    ONE_SWEEP: tl.constexpr,
    HAS_SMALL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Statistics and gradient of the rows of a group."""
    HAS_TEACHER: tl.constexpr = teacher_ptr is not None
    HAS_TOKEN: tl.constexpr = token_ptr is not None
    HAS_DIVERGENCE: tl.constexpr = div_ptr is not None
    HAS_ENTROPY: tl.constexpr = ent_ptr is not None
    MEETINGS: tl.constexpr = (1 if ONE_SWEEP else 2) if HAS_TEACHER else 1
    # Only the sums of one sweep tell a slice without infinities.
    UNGUARDED: tl.constexpr = MEETINGS == 1
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    counter_ptr += group * 2
    published_ptr += group * (_SLOTS * _PUBLISHED * LANES)
    constants = Constants(inv_t, inv_t * LOG2E, floor, parameter)
    meetings = tl.full((), 0, tl.int32)

    row = group
    where = locate(
        student_ptr, teacher_ptr, gradient_ptr, row, inner, student_stride_o, student_stride_i,
        teacher_stride_o, teacher_stride_i, gradient_stride_o, gradient_stride_i, V, EDGES,
    )  # fmt: skip
    wanted = _wanted(valid_ptr, row, rows)
    zs, ws = _load(where, part, wanted, SLICE, CHUNK_V, CHUNKS, EDGES, HAS_TEACHER)
    while row < rows:
        # What this program has to say of its slice, before it waits for anything.
        sums = no_sums()
        finite = part < 0
        token = tl.full((), -1, tl.int32)
        z_token = tl.full((), 0.0, tl.float32)
        w_token = tl.full((), 0.0, tl.float32)
        z_edges = z_token  # replaced where there are edges
        w_edges = w_token
        if EDGES:
            z_edges, w_edges = load_edges(where, wanted & (part == 0), V, HAS_TEACHER)
        if wanted:
            if HAS_TOKEN:
                # Before the gradient, which may overwrite the logits.
                token = sampled_token(token_ptr, row, V)
                z_token = sampled(where.student, token)
                w_token = z_token
                if HAS_TEACHER:
                    w_token = sampled(where.teacher, token)
            sums = tile_sums(zs, ws, constants, CHUNKS, HAS_TEACHER, DIVERGENCE, not UNGUARDED)
            finite = part >= 0
            if UNGUARDED:
                finite = agreed(is_finite(sums))
                if not finite:
                    sums = _guarded_sums(
                        where, part, constants, SLICE, CHUNK_V, CHUNKS, EDGES, HAS_TEACHER,
                        DIVERGENCE,
                    )  # fmt: skip
            if EDGES:
                if part == 0:
                    edges = tile_sums((z_edges,), (w_edges,), constants, 1, HAS_TEACHER, DIVERGENCE)
                    sums = merge(sums, edges, constants.scale)
            if SPLITS > 1:
                _publish_sums(
                    _slot(published_ptr, meetings % 2, LANES), part, sums, LANES, HAS_TEACHER,
                    DIVERGENCE,
                )  # fmt: skip
                _arrive(counter_ptr)

        next_wanted = _wanted(valid_ptr, row + groups, rows)
        next_zs = zs
        next_ws = ws
        if PREFETCH:
            next_where = locate(
                student_ptr, teacher_ptr, gradient_ptr, row + groups, inner, student_stride_o,
                student_stride_i, teacher_stride_o, teacher_stride_i, gradient_stride_o,
                gradient_stride_i, V, EDGES,
            )  # fmt: skip
            next_zs, next_ws = _load(
                next_where, part, next_wanted, SLICE, CHUNK_V, CHUNKS, EDGES, HAS_TEACHER
            )

        if wanted:
            if SPLITS > 1:
                ptr = _slot(published_ptr, meetings % 2, LANES)
                meetings += 1
                if STAGE < 0:
                    _wait(counter_ptr, meetings * SPLITS)
                if STAGE != 0:
                    sums = _merged_sums(
                        ptr, constants.scale, SPLITS, LANES, HAS_TEACHER, DIVERGENCE
                    )
            stats = normalisers(sums, constants, HAS_TEACHER)
            value = 0.0
            if HAS_TEACHER:
                if ONE_SWEEP:
                    value, slope_sum = swept_divergence(sums, stats, constants, DIVERGENCE)
                else:
                    value, slope_sum = _row_value_and_slope(
                        published_ptr, counter_ptr, meetings, part, zs, ws, z_edges, w_edges, stats,
                        constants, CHUNKS, SPLITS, LANES, STAGE, EDGES, HAS_FLOOR, DIVERGENCE,
                    )  # fmt: skip
                    meetings += 1
                value, slope_sum = settle(value, slope_sum, stats.shift, DIVERGENCE)
                stats = with_slope_sum(stats, slope_sum)
            if STAGE < 0 or STAGE == MEETINGS:
                small = part < 0
                if HAS_SMALL:
                    small = agreed(value < _SMALL)
                    if small:
                        value = _row_small_value(
                            published_ptr, counter_ptr, part, zs, ws, z_edges, w_edges, stats,
                            constants, statistics_ptr, row, rows, CHUNKS, SPLITS, LANES, EDGES,
                            HAS_FLOOR, DIVERGENCE,
                        )  # fmt: skip
                if part == 0:
                    log_prob = 0.0
                    teacher_log_prob = 0.0
                    if HAS_TOKEN:
                        log_prob, teacher_log_prob = token_statistics(
                            z_token, w_token, stats, constants, HAS_TEACHER, HAS_FLOOR
                        )
                    write_statistics(
                        statistics_ptr, row, rows, stats, log_prob, teacher_log_prob, inv_t
                    )
                    if SPLITS == 1 or not small:
                        write_divergence(statistics_ptr, row, rows, value)
                weights = row_weights(
                    div_ptr, logp_ptr, ent_ptr, row, div_stride_n, logp_stride_n, ent_stride_n,
                    inv_t,
                )  # fmt: skip
                if HAS_DIVERGENCE and UNGUARDED:
                    finite = finite & (weights.divergence != 0.0)
                if finite:
                    _write_gradient(
                        where, part, zs, ws, stats, weights, constants, SLICE, CHUNK_V, CHUNKS,
                        EDGES, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE, not UNGUARDED,
                    )  # fmt: skip
                else:
                    _write_guarded_gradient(
                        where, part, stats, weights, constants, SLICE, CHUNK_V, CHUNKS, EDGES,
                        HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
                    )  # fmt: skip
                if EDGES:
                    if part == 0:
                        gradient = logit_gradient(
                            z_edges, w_edges, stats, weights, constants, HAS_FLOOR, HAS_DIVERGENCE,
                            HAS_ENTROPY, DIVERGENCE,
                        )  # fmt: skip
                        store_edges(where, gradient, V)
                if logp_ptr is not None:
                    if _owns(where, part, token, SLICE):
                        store_sampled(
                            where, token, z_token, w_token, stats, weights, constants,
                            HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE,
                        )  # fmt: skip
        else:
            _clear_gradient(where, part, SLICE, CHUNK_V, CHUNKS, EDGES)
            if part == 0:
                clear_statistics(statistics_ptr, row, rows)
                if EDGES:
                    clear_edges(where, V)
        row += groups
        where = locate(
            student_ptr, teacher_ptr, gradient_ptr, row, inner, student_stride_o, student_stride_i,
            teacher_stride_o, teacher_stride_i, gradient_stride_o, gradient_stride_i, V, EDGES,
        )  # fmt: skip
        wanted = next_wanted
        zs = next_zs
        ws = next_ws
        if not PREFETCH:
            zs, ws = _load(where, part, wanted, SLICE, CHUNK_V, CHUNKS, EDGES, HAS_TEACHER)
