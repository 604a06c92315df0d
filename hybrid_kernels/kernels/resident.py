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

A small divergence is summed anew, in a slot of its own, and nobody waits for it: the last to arrive
adds up. That a row is small each program finds for itself, from the same numbers. It counts if all
do: each row has its own counter, so that no later row depends on it, and the first sum stands until
the last of SPLITS has arrived.
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
    START,
    all_together,
    needs_student_d,
    needs_teacher_d,
    nothing,
)
from hybrid_kernels.kernels.math import (
    Constants,
    Row,
    Sums,
    about,
    all_normalisers,
    all_sums,
    each_together,
    full_gradient,
    is_finite,
    is_small,
    merge_all,
    no_sums_of,
    settle_all,
    sides,
    small_values,
    swept_divergences,
    values_and_slopes,
)
from hybrid_kernels.kernels.meeting import arrive, read, wait
from hybrid_kernels.kernels.reduce import agreed

# Numbers that a program publishes at once for each member, at most: the fields of `Sums`.
PUBLISHED = 8
_PUBLISHED = tl.constexpr(PUBLISHED)
# Slots of a group: those that meetings take in turn, and one for small divergences.
SLOTS = 3
_SLOTS = tl.constexpr(SLOTS)
_IN_TURN = tl.constexpr(2)
_SMALL_SLOT = _IN_TURN


@triton.jit
def _slot(published_ptr, slot, LANES: tl.constexpr, COUNT: tl.constexpr):
    return published_ptr + slot * (_PUBLISHED * LANES * COUNT)


@triton.jit
def _publish_sums(
    slot_ptr,
    part,
    sums,
    LANES: tl.constexpr,
    TWO: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Those of one member; TWO where there is more than the student's."""
    tl.store(slot_ptr + part, sums.student_max)
    tl.store(slot_ptr + LANES + part, sums.student_sum)
    tl.store(slot_ptr + 2 * LANES + part, sums.student_x)
    if TWO:
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
    TWO: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The sums of the row from those of all its slices."""
    zero = tl.full((), 0.0, tl.float32)
    parts = Sums(
        read(slot_ptr, START, SPLITS, LANES),
        zero,
        read(slot_ptr + 1 * LANES, 0.0, SPLITS, LANES),
        read(slot_ptr + 2 * LANES, 0.0, SPLITS, LANES),
        zero,
        zero,
        zero,
        zero,
    )
    if TWO:
        student_d = zero
        teacher_d = zero
        teacher_kept = zero
        if needs_student_d(DIVERGENCE):
            student_d = read(slot_ptr + 5 * LANES, 0.0, SPLITS, LANES)
        if needs_teacher_d(DIVERGENCE):
            teacher_d = read(slot_ptr + 6 * LANES, 0.0, SPLITS, LANES)
            teacher_kept = read(slot_ptr + 7 * LANES, 0.0, SPLITS, LANES)
        parts = Sums(
            parts.student_max,
            read(slot_ptr + 3 * LANES, START, SPLITS, LANES),
            parts.student_sum,
            parts.student_x,
            read(slot_ptr + 4 * LANES, 0.0, SPLITS, LANES),
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
    if TWO:
        teacher_max = tl.max(parts.teacher_max, 0)
    parts = about(parts, student_max, teacher_max, scale)
    if TWO:
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
def _publish_all(
    slot_ptr,
    part,
    sums,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    for i in tl.static_range(sides(MEMBERS, TOPK)):
        _publish_sums(
            slot_ptr + i * _PUBLISHED * LANES, part, Sums(*sums[i]), LANES, MEMBERS > 0,
            "none" if TOPK else DIVERGENCE,
        )  # fmt: skip


@triton.jit
def _all_merged_sums(
    slot_ptr,
    scale,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    found = ()
    for i in tl.static_range(sides(MEMBERS, TOPK)):
        own = _merged_sums(
            slot_ptr + i * _PUBLISHED * LANES, scale, SPLITS, LANES, MEMBERS > 0,
            "none" if TOPK else DIVERGENCE,
        )  # fmt: skip
        found = found + (own,)
    return found


@triton.jit
def _start(part, i, SLICE: tl.constexpr, CHUNK_V: tl.constexpr):
    """Where in the body a slice's chunk begins."""
    return part * SLICE + i * CHUNK_V


@triton.jit
def _limit(part, limit, SLICE: tl.constexpr):
    """Where in the body a slice ends."""
    return tl.minimum((part + 1) * SLICE, limit)


@triton.jit
def _load_chunk(
    where,
    part,
    i,
    limit,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
):
    start = _start(part, i, SLICE, CHUNK_V)
    last = _limit(part, limit, SLICE)
    return load_body(where, start, last, CHUNK_V, PAD, EDGES, MEMBERS, TOPK)


@triton.jit
def _store_chunk(
    where,
    part,
    i,
    gradient,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    EDGES: tl.constexpr,
):
    offsets = _start(part, i, SLICE, CHUNK_V) + tl.arange(0, CHUNK_V)
    store_body(where, offsets, offsets < _limit(part, where.body, SLICE), gradient, EDGES)


@triton.jit
def _load(
    where,
    part,
    wanted,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
):
    """A slice of all sides as stored, in chunks; nothing is read unless `wanted`."""
    limit = tl.where(wanted, where.body, 0)
    zs = ()
    wss = ()
    for _ in tl.static_range(1 if TOPK else MEMBERS):
        wss = wss + ((),)
    for i in tl.static_range(CHUNKS):
        z, ws = _load_chunk(where, part, i, limit, SLICE, CHUNK_V, PAD, EDGES, MEMBERS, TOPK)
        zs = zs + (z,)
        grown = ()
        for j in tl.static_range(1 if TOPK else MEMBERS):
            grown = grown + (wss[j] + (ws[j],),)
        wss = grown
    return zs, wss


@triton.jit
def _guarded_sums(
    where,
    part,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The sums of a slice with infinite entries. A case so rare must not keep registers: it reads
    the slice again, chunk by chunk, in a loop that is not unrolled."""
    COUNT: tl.constexpr = sides(MEMBERS, TOPK)
    sums = no_sums_of(COUNT)
    for i in range(CHUNKS):
        z, ws = _load_chunk(where, part, i, where.body, SLICE, CHUNK_V, PAD, EDGES, MEMBERS, TOPK)
        wss = ()
        for j in tl.static_range(1 if TOPK else MEMBERS):
            wss = wss + ((ws[j],),)
        tile = all_sums((z,), wss, constants, 1, MEMBERS, TOPK, DIVERGENCE)
        sums = merge_all(sums, tile, constants.scale, COUNT)
    return sums


@triton.jit
def _row_values_and_slopes(
    published_ptr,
    counter_ptr,
    meetings,
    part,
    zs,
    wss,
    edges,
    stats,
    constants,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Divergence and sum of slopes of the row for each member, all normalisers known: the second
    meeting."""
    values, slopes = values_and_slopes(
        zs, wss, stats, constants, CHUNKS, MEMBERS, HAS_FLOOR, DIVERGENCE
    )
    if EDGES:
        if part == 0:
            more, steeper = values_and_slopes(
                edges[0], edges[1], stats, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE
            )
            values = each_together(values, more, MEMBERS, "")
            slopes = each_together(slopes, steeper, MEMBERS, DIVERGENCE)
    if SPLITS > 1:
        ptr = _slot(published_ptr, meetings % _IN_TURN, LANES, MEMBERS)
        for i in tl.static_range(MEMBERS):
            tl.store(ptr + 2 * i * LANES + part, values[i])
            tl.store(ptr + (2 * i + 1) * LANES + part, slopes[i])
        arrive(counter_ptr)
        wait(counter_ptr, (meetings + 1) * SPLITS)
        values = ()
        slopes = ()
        for i in tl.static_range(MEMBERS):
            values = values + (tl.sum(read(ptr + 2 * i * LANES, 0.0, SPLITS, LANES), 0),)
            found = read(ptr + (2 * i + 1) * LANES, nothing(DIVERGENCE), SPLITS, LANES)
            slopes = slopes + (all_together(found, DIVERGENCE),)
    return values, slopes


@triton.jit
def _write_small_value(
    published_ptr,
    small_ptr,
    part,
    zs,
    wss,
    edges,
    stats,
    shares,
    constants,
    statistics_ptr,
    row,
    count,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A small divergence summed anew, over what the first has written; `small_ptr` counts who has
    arrived for this row."""
    value = small_values(zs, wss, stats, shares, constants, CHUNKS, MEMBERS, HAS_FLOOR, DIVERGENCE)
    if EDGES:
        if part == 0:
            value += small_values(
                edges[0], edges[1], stats, shares, constants, 1, MEMBERS, HAS_FLOOR, DIVERGENCE
            )
    if SPLITS > 1:
        ptr = _slot(published_ptr, _SMALL_SLOT, LANES, MEMBERS)
        tl.store(ptr + part, value)
        before = arrive(small_ptr)
        if before == SPLITS - 1:
            tl.debug_barrier()
            value = tl.sum(read(ptr, 0.0, SPLITS, LANES), 0)
            write_divergence(statistics_ptr, row, count, value)
    else:
        write_divergence(statistics_ptr, row, count, value)


@triton.jit
def _write_guarded_gradient(
    where,
    part,
    stats,
    shares,
    weights,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """As `_guarded_sums`, for the gradient."""
    for i in range(CHUNKS):
        z, ws = _load_chunk(where, part, i, where.body, SLICE, CHUNK_V, PAD, EDGES, MEMBERS, False)
        gradient = full_gradient(
            z, ws, stats, shares, weights, constants, MEMBERS, HAS_FLOOR, HAS_ENTROPY, DIVERGENCE
        )
        _store_chunk(where, part, i, gradient, SLICE, CHUNK_V, EDGES)


@triton.jit
def _write_gradient(
    where,
    part,
    zs,
    wss,
    stats,
    shares,
    weights,
    constants,
    SLICE: tl.constexpr,
    CHUNK_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr,
):
    for i in tl.static_range(CHUNKS):
        gradient = full_gradient(
            zs[i], chunk(wss, i, MEMBERS), stats, shares, weights, constants, MEMBERS, HAS_FLOOR,
            HAS_ENTROPY, DIVERGENCE, GUARDED,
        )  # fmt: skip
        _store_chunk(where, part, i, gradient, SLICE, CHUNK_V, EDGES)


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
        _store_chunk(where, part, i, tl.zeros((CHUNK_V,), tl.float32), SLICE, CHUNK_V, EDGES)


@triton.jit
def _wanted(valid_ptr, row, count):
    """Whether a row is to be read: it exists and is not masked."""
    wanted = row < count
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
    problem,
    target,
    statistics_ptr,
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
):
    """Statistics and gradient of the rows of a group."""
    HAS_TOKEN: tl.constexpr = problem.token_ids is not None
    HAS_DIVERGENCE: tl.constexpr = target.divergence is not None
    HAS_ENTROPY: tl.constexpr = target.entropy is not None
    ROWS: tl.constexpr = sides(MEMBERS, False)
    COUNT: tl.constexpr = sides(MEMBERS, TOPK)
    FULL: tl.constexpr = 0 if TOPK else MEMBERS
    GRADIENT_MEMBERS: tl.constexpr = FULL if HAS_DIVERGENCE else 0
    # Only the sums of one sweep tell a slice without infinities.
    UNGUARDED: tl.constexpr = ONE_SWEEP
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    small_ptr = counter_ptr + groups
    counter_ptr += group
    published_ptr += group * (_SLOTS * _PUBLISHED * LANES * COUNT)
    count = problem.count
    shares = problem.shares
    constants = Constants(problem.inv_t, problem.inv_t * LOG2E, problem.floor, problem.parameter)
    meetings = tl.full((), 0, tl.int32)

    row = group
    where = locate(problem, target, row, V, EDGES, MEMBERS, TOPK, True)
    wanted = _wanted(problem.valid, row, count)
    zs, wss = _load(where, part, wanted, SLICE, CHUNK_V, CHUNKS, PAD, EDGES, MEMBERS, TOPK)
    while row < count:
        # What this program has to say of its slice, before it waits for anything.
        sums = no_sums_of(COUNT)
        finite = part < 0
        token = tl.full((), -1, tl.int32)
        z_token = tl.full((), 0.0, tl.float32)
        w_token = ()
        for _ in tl.static_range(FULL):
            w_token = w_token + (z_token,)
        edges = (zs, wss)  # replaced where there are edges
        if EDGES:
            edges = load_edges(where, wanted & (part == 0), V, PAD, MEMBERS, TOPK)
        if wanted:
            if HAS_TOKEN:
                # Before the gradient, which may overwrite the logits.
                token = sampled_token(problem.token_ids, row, V)
                z_token = sampled(where.student, token)
                w_token = sampled_by_all(where, token, MEMBERS, TOPK)
            sums = all_sums(zs, wss, constants, CHUNKS, MEMBERS, TOPK, DIVERGENCE, not UNGUARDED)
            finite = part >= 0
            if UNGUARDED:
                finite = agreed(is_finite(sums, COUNT))
                if not finite:
                    sums = _guarded_sums(
                        where, part, constants, SLICE, CHUNK_V, CHUNKS, PAD, EDGES, MEMBERS, TOPK,
                        DIVERGENCE,
                    )  # fmt: skip
            if EDGES:
                if part == 0:
                    own = all_sums(edges[0], edges[1], constants, 1, MEMBERS, TOPK, DIVERGENCE)
                    sums = merge_all(sums, own, constants.scale, COUNT)
            if SPLITS > 1:
                _publish_all(
                    _slot(published_ptr, meetings % _IN_TURN, LANES, COUNT), part, sums, LANES,
                    MEMBERS, TOPK, DIVERGENCE,
                )  # fmt: skip
                arrive(counter_ptr)

        next_wanted = _wanted(problem.valid, row + groups, count)
        next_zs = zs
        next_wss = wss
        if PREFETCH:
            next_where = locate(problem, target, row + groups, V, EDGES, MEMBERS, TOPK, True)
            next_zs, next_wss = _load(
                next_where, part, next_wanted, SLICE, CHUNK_V, CHUNKS, PAD, EDGES, MEMBERS, TOPK
            )

        if wanted:
            if SPLITS > 1:
                ptr = _slot(published_ptr, meetings % _IN_TURN, LANES, COUNT)
                meetings += 1
                wait(counter_ptr, meetings * SPLITS)
                sums = _all_merged_sums(
                    ptr, constants.scale, SPLITS, LANES, MEMBERS, TOPK, DIVERGENCE
                )
            stats = all_normalisers(sums, constants, MEMBERS, TOPK)
            value = tl.full((), 0.0, tl.float32)
            log_q = tl.full((), 0.0, tl.float32)
            correction = tl.full((), 0.0, tl.float32)
            in_support = token < -1
            if TOPK:
                value, stats, log_q, correction, in_support = topk.compare(
                    problem, statistics_ptr, row, part == 0, token, z_token, sums, stats, constants,
                    K, BLOCK_K, MEMBERS, HAS_FLOOR, CORRECTS, TAIL, DIVERGENCE,
                )  # fmt: skip
            elif MEMBERS > 0:
                if ONE_SWEEP:
                    values, slopes = swept_divergences(sums, stats, constants, MEMBERS, DIVERGENCE)
                else:
                    values, slopes = _row_values_and_slopes(
                        published_ptr, counter_ptr, meetings, part, zs, wss, edges, stats,
                        constants, CHUNKS, SPLITS, LANES, EDGES, MEMBERS, HAS_FLOOR, DIVERGENCE,
                    )  # fmt: skip
                    meetings += 1
                value, stats = settle_all(
                    values, slopes, stats, shares, constants.parameter, MEMBERS, DIVERGENCE
                )
            if part == 0:
                log_p = tl.full((), 0.0, tl.float32)
                if HAS_TOKEN:
                    log_p = student_log_prob(z_token, Row(*stats[0]), constants.inv_t)
                    if FULL > 0:
                        log_q = teacher_log_prob(
                            w_token, stats, shares, constants, MEMBERS, HAS_FLOOR
                        )
                write_statistics(
                    statistics_ptr, row, count, stats, log_p, log_q, constants.inv_t, ROWS, TOPK
                )
                write_divergence(statistics_ptr, row, count, value)
            if HAS_SMALL:
                if agreed(is_small(value, shares, MEMBERS)):
                    _write_small_value(
                        published_ptr, small_ptr + row, part, zs, wss, edges, stats, shares,
                        constants, statistics_ptr, row, count, CHUNKS, SPLITS, LANES, EDGES,
                        MEMBERS, HAS_FLOOR, DIVERGENCE,
                    )  # fmt: skip
            weights = row_weights(target, row, constants.inv_t)
            tile_weights = weights
            if TOPK:
                weights = topk.corrected(weights, correction)
                tile_weights = topk.outside_weights(stats, shares, weights, MEMBERS, TAIL)
            if HAS_DIVERGENCE and UNGUARDED and not TOPK:
                finite = finite & (weights.divergence != 0.0)
            if finite:
                _write_gradient(
                    where, part, zs, wss, stats, shares, tile_weights, constants, SLICE,
                    CHUNK_V, CHUNKS, EDGES, GRADIENT_MEMBERS, HAS_FLOOR, HAS_ENTROPY,
                    DIVERGENCE, not UNGUARDED,
                )  # fmt: skip
            else:
                _write_guarded_gradient(
                    where, part, stats, shares, tile_weights, constants, SLICE, CHUNK_V, CHUNKS,
                    PAD, EDGES, GRADIENT_MEMBERS, HAS_FLOOR, HAS_ENTROPY, DIVERGENCE,
                )  # fmt: skip
            if EDGES:
                if part == 0:
                    gradient = full_gradient(
                        edges[0][0], chunk(edges[1], 0, GRADIENT_MEMBERS), stats, shares,
                        tile_weights, constants, GRADIENT_MEMBERS, HAS_FLOOR, HAS_ENTROPY,
                        DIVERGENCE,
                    )  # fmt: skip
                    store_edges(where, gradient, V)
            if target.log_prob is not None or CORRECTS:
                if _owns(where, part, token, SLICE):
                    # (A support has its own way with tokens in it.)
                    store_sampled(
                        where, tl.where(in_support, -1, token), z_token, w_token, stats, shares,
                        tile_weights, weights.log_prob, constants, GRADIENT_MEMBERS, HAS_FLOOR,
                        HAS_ENTROPY, DIVERGENCE,
                    )  # fmt: skip
            if TOPK:
                topk.support_gradient(
                    problem, where, row, token, part * SLICE, (part + 1) * SLICE, part == 0,
                    stats, weights, constants, K, BLOCK_K, MEMBERS, HAS_FLOOR, HAS_ENTROPY,
                    TAIL, DIVERGENCE,
                )  # fmt: skip
        else:
            _clear_gradient(where, part, SLICE, CHUNK_V, CHUNKS, EDGES)
            if part == 0:
                clear_statistics(statistics_ptr, row, count, MEMBERS)
                if EDGES:
                    clear_edges(where, V)
        row += groups
        where = locate(problem, target, row, V, EDGES, MEMBERS, TOPK, True)
        wanted = next_wanted
        zs = next_zs
        wss = next_wss
        if not PREFETCH:
            zs, wss = _load(where, part, wanted, SLICE, CHUNK_V, CHUNKS, PAD, EDGES, MEMBERS, TOPK)
