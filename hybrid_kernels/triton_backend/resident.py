"""The row-resident kernel: statistics and gradient with every logit read once, 3 N V entries.

It handles one full teacher or none, with the divergences of the KL family and JSD. A row is cut
into slices, each for a different program. A program keeps its slice in registers (`slices.py`),
publishes its sums (`lean.py`), meets the programs that have the other slices (`meeting.py`), adds
up all sums, and writes its slice of the gradient. If a row fits into one program, nothing is
published. Problems that need both normalisers first meet twice.

There are no guards: a row with a NaN or an infinity, with finite numbers so low that 0 times them
may not be 0, or with models that differ by too much is *declined*. All programs decide this from
the same numbers, write no part of the row, and leave it to the sweeping form (`launch.py`).

The grid is persistent, and must be resident as a whole, because programs wait for each other (hence
the cooperative launch). A program loads its next slice while it waits. With `Plan.lag` it is one
slice further ahead: it publishes the sums of its next slice before it waits for the row of this
one, so that the numbers it waits for have had the time of a gradient to arrive.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.divergences import LN2, fast_log2
from hybrid_kernels.triton_backend.lean import (
    Row,
    fma,
    gradient_of,
    is_ordinary,
    logs_of,
    named,
    ordinary_entry,
    rounded_product,
    second_divergence,
    second_factor,
    second_summands,
    sums_of_slice,
    swept_divergence,
    swept_factors,
    swept_gradient,
    together,
)
from hybrid_kernels.triton_backend.meeting import meet, publish, write_small
from hybrid_kernels.triton_backend.memory import (
    body_of,
    coefficient,
    constants_of,
    edge_lanes,
    locate,
    sampled_id,
    write_divergence,
    write_log_probs,
    write_statistics,
)
from hybrid_kernels.triton_backend.packed import per_word, unpacked
from hybrid_kernels.triton_backend.reduce import added, agreed, sum_each
from hybrid_kernels.triton_backend.slices import (
    counting,
    counts_of,
    edge_places,
    edges_of,
    first_turn,
    following,
    is_lead_of,
    limit_of,
    load_again,
    load_slice,
    piece_of,
    places,
    store_words,
)
from hybrid_kernels.triton_backend.sums import Statistics, is_small


@triton.jit
def _small_value(where, held, row, logs, constants, P: tl.constexpr, D: tl.constexpr):
    """What a slice adds to a small divergence. The slice is read again, in a loop that is not
    unrolled, because a rare case must not cost registers."""
    SIZE: tl.constexpr = piece_of(P)
    PIECES: tl.constexpr = P.tiles * P.warps * P.width // SIZE
    total = tl.full((SIZE,), 0.0, tl.float32)
    for i in range(PIECES):
        z = load_again(where.student, where, i, P)
        w = load_again(where.teachers[0], where, i, P)
        for k in tl.static_range(len(z)):
            terms = D(
                ordinary_entry(z[k], w[k], row, logs, constants, P), constants.parameter, 0.0, True
            )
            total += terms[0]
    value = tl.sum(total, 0)
    if P.edges:
        if is_lead_of(where, P):
            z_edge, w_edge = edges_of(held)
            edges = ordinary_entry(z_edge, w_edge, row, logs, constants, P)
            edge_terms = D(edges, constants.parameter, 0.0, True)
            value += tl.sum(edge_terms[0], 0)
    return value * constants.shares[0]


@triton.jit
def _second_sums(where, held, row, logs, constants, P: tl.constexpr, D: tl.constexpr):
    """What a slice adds to the divergence and the sum of slopes, and p and g of its entries."""
    STUDENT: tl.constexpr = where.student.dtype.element_ty
    TEACHER: tl.constexpr = where.teachers[0].dtype.element_ty
    limit = limit_of(where, per_word(STUDENT), P)
    zs = held.zs
    ws = held.ws
    values = tl.full((P.warps, P.width), 0.0, tl.float32)
    slopes = values
    kept = ()
    for i in tl.static_range(len(zs)):
        z = unpacked(zs[i], STUDENT)
        w = unpacked(ws[i], TEACHER)
        for k in tl.static_range(len(z)):
            own = second_summands(z[k], w[k], row, logs, constants, P, D)
            t = own[0][1]
            s = own[1][1]
            if P.floor:
                # The floor also raises the teacher in lanes outside the slice.
                inside = places(i, P) < limit
                t = tl.where(inside, t, 0.0)
                s = tl.where(inside, s, 0.0)
            values += own[0][0] * t
            slopes += own[1][0] * s
            kept = kept + (own[2], own[3])
    numbers = sum_each(sum_each((values, slopes), 1), 0)
    if P.edges:
        if is_lead_of(where, P):
            z_edge, w_edge = edges_of(held)
            edges = second_summands(z_edge, w_edge, row, logs, constants, P, D)
            _, inside = edge_lanes(where, edge_places(P), P)
            edge_values = tl.where(inside, edges[0][0] * edges[0][1], 0.0)
            edge_slopes = tl.where(inside, edges[1][0] * edges[1][1], 0.0)
            numbers = added(numbers, sum_each((edge_values, edge_slopes), 0))
    return numbers, kept


@triton.jit
def _is_owner(where, token, is_lead, P: tl.constexpr):
    """Whether the sampled token is in this program's slice, or in no slice and this is the lead."""
    offset = token - where.head
    first = where.part * P.slice
    in_slice = (offset >= first) & (offset < tl.minimum(first + P.slice, where.body))
    return in_slice | (is_lead & ((offset < 0) | (offset >= where.body)))


@triton.jit
def _logit(row_ptr, token, is_read):
    return tl.load(row_ptr + token, mask=is_read, other=float("nan")).to(tl.float32)


@triton.jit
def _token_of(args, where, is_lead, P: tl.constexpr):
    """The sampled token, whether this program owns it, and its logits if so."""
    token = tl.full((), -1, tl.int32)
    is_owner = is_lead
    z = tl.full((), 0.0, tl.float32)
    w = z
    if args.token_ids is not None:
        token = sampled_id(args, where.row, P)
        is_owner = _is_owner(where, token, is_lead, P)
        z = _logit(where.student, token, is_owner & (token >= 0))
        if P.full > 0:
            w = _logit(where.teachers[0], token, is_owner & (token >= 0))
    return token, is_owner, z, w


@triton.jit
def _scale_of(args, row, P: tl.constexpr):
    return constants_of(args, tl.minimum(row, args.count - 1), P).scale


@triton.jit
def _write_statistics(args, number, value, slopes, sums, row, constants, P: tl.constexpr):
    """Called by the lead."""
    logs = logs_of(sums, P)
    if P.one_sweep and P.full > 0:
        value, slopes = swept_divergence(sums, logs.teacher - logs.student, row.scale, P)
    # Relative to the maxima themselves; E is relative to their rounded product with s.
    student_lse = (logs.student - fma(sums.student_max, row.scale, -row.m)) * LN2
    teacher_lse = (logs.teacher - fma(sums.teacher_max, row.scale, -row.n)) * LN2
    zero = tl.full((), 0.0, tl.float32)
    stats = Statistics(
        sums.student_max,
        sums.teacher_max,
        student_lse,
        teacher_lse,
        teacher_lse - student_lse,
        logs.entropy,
        slopes,
        zero,
        zero,
    )
    write_statistics(args, number, (stats,), row.inv_t, P)
    write_divergence(args, number, value * constants.shares[0])


@triton.jit
def _write_log_probs(args, number, z, w, sums, row, constants, P: tl.constexpr):
    """Called by the owner of the sampled token."""
    logs = logs_of(sums, P)
    log_p = (fma(z, row.scale, -row.m) - logs.student) * LN2
    log_q = tl.full((), 0.0, tl.float32)
    if P.full > 0:
        log_q = (fma(w, row.scale, -row.n) - logs.teacher) * LN2
        if P.floor:
            log_q = tl.where(log_q < constants.floor, constants.floor, log_q)
    if args.token_ids is None:
        log_p = tl.full((), 0.0, tl.float32)
        log_q = log_p
    write_log_probs(args, number, log_p, log_q)


@triton.jit
def _is_small(sums, constants, P: tl.constexpr):
    log_ratio = fast_log2(sums.teacher / sums.student)
    value, _ = swept_divergence(sums, log_ratio, constants.scale, P)
    return is_small(value * constants.shares[0], constants)


@triton.jit
def _write_small(args, where, held, sums, row, constants, P: tl.constexpr, D: tl.constexpr):
    """Sums a small divergence a second time, and overwrites what the lead has written."""
    logs = logs_of(sums, P)
    value = _small_value(where, held, row, logs, constants, P, D)
    if P.splits > 1:
        write_small(args, where, value, P)
    else:
        write_divergence(args, where.row, value)


@triton.jit
def _store_tiles(where, held, kept, row, factors, P: tl.constexpr):
    """The gradient of a slice: from its logits or, after a second meeting, from `kept`."""
    STUDENT: tl.constexpr = where.student.dtype.element_ty
    TEACHER: tl.constexpr = where.teachers[0].dtype.element_ty if P.full > 0 else STUDENT
    PER_WORD: tl.constexpr = per_word(STUDENT)
    limit = limit_of(where, PER_WORD, P)
    ptr = body_of(where.gradient, where.head, P) + where.part * P.slice
    zs = held.zs
    ws = held.ws
    for i in tl.static_range(len(zs)):
        entries = ()
        if P.one_sweep:
            z = unpacked(zs[i], STUDENT)
            w = unpacked(ws[i], TEACHER)
            for k in tl.static_range(PER_WORD):
                entries = entries + (swept_gradient(z[k], w[k], row, factors, P),)
        else:
            for k in tl.static_range(PER_WORD):
                p = kept[2 * (i * PER_WORD + k)]
                g = kept[2 * (i * PER_WORD + k) + 1]
                entries = entries + (tl.fma(p, factors[0], g),)
        store_words(ptr, i, limit, entries, P)


@triton.jit
def _store_edges(where, held, row, factors, sums, constants, P: tl.constexpr, D: tl.constexpr):
    z, w = edges_of(held)
    gradient = gradient_of(z, w, row, factors, sums, constants, P, D)
    offsets, inside = edge_lanes(where, edge_places(P), P)
    tl.store(where.gradient + offsets, gradient.to(where.gradient.dtype.element_ty), mask=inside)


@triton.jit
def _store_token(where, token, gradient):
    """Rewrites the sampled token's entry of the gradient, with its own term. One late write costs
    less than a comparison in every lane."""
    # Another thread may have stored the entry.
    tl.debug_barrier()
    gradient = gradient.to(where.gradient.dtype.element_ty)
    tl.store(where.gradient + token, gradient, mask=token >= 0)


@triton.jit
def _publish_sums(
    args, turn, held, scale, STUDENT: tl.constexpr, TEACHER: tl.constexpr, P: tl.constexpr
):
    numbers = sums_of_slice(held, scale, is_lead_of(turn, P), STUDENT, TEACHER, P)
    if P.splits > 1:
        publish(args, turn, 0, numbers, P)
    return numbers


@triton.jit
def resident_kernel(args, P: tl.constexpr, D: tl.constexpr):
    """Statistics and gradient of all rows that are not declined."""
    STUDENT: tl.constexpr = args.student.ptr.dtype.element_ty
    TEACHER: tl.constexpr = args.teachers[0].ptr.dtype.element_ty if P.full > 0 else STUDENT
    turn = first_turn(P)
    turn = counting(args, turn, counts_of(args, turn), P)
    held = load_slice(args, turn, P)
    ahead = turn
    next_held = held
    if P.lag:
        ahead, counts = following(args, turn, P)
        ahead = counting(args, ahead, counts, P)
        next_held = load_slice(args, ahead, P)
        _publish_sums(args, turn, held, _scale_of(args, turn.row, P), STUDENT, TEACHER, P)
    while turn.row < args.count:
        number = turn.row
        is_lead = is_lead_of(turn, P)
        # All that a row needs from memory is loaded here, before the program waits.
        constants = constants_of(args, number, P)
        c_div = coefficient(args.c_div, number, constants.inv_t)
        if P.full > 0:
            c_div *= constants.shares[0]
        c_logp = tl.full((), 0.0, tl.float32)
        if P.one_sweep:
            c_logp = coefficient(args.c_logp, number, constants.inv_t)
        c_ent = coefficient(args.c_ent, number, constants.inv_t)
        where = locate(args, number, turn.part, P)
        # So are the token's logits, which the gradient may overwrite, after the barrier of a
        # reduction. Other programs may already have overwritten logits in their slices.
        token, is_owner, z_token, w_token = _token_of(args, where, is_lead, P)
        after, counts = following(args, ahead, P)

        # Publish this slice's sums or, with a lag, the next slice's.
        if P.lag:
            scale = _scale_of(args, ahead.row, P)
            numbers = _publish_sums(args, ahead, next_held, scale, STUDENT, TEACHER, P)
        else:
            numbers = _publish_sums(args, turn, held, constants.scale, STUDENT, TEACHER, P)
        after = counting(args, after, counts, P)
        if P.one_sweep:
            far_held = load_slice(args, after, P)
        if P.splits > 1:
            numbers = together(meet(args, number, 0, P), P.splits, constants.scale, P)
        sums = named(numbers, P)
        row = Row(
            rounded_product(sums.student_max, constants.scale),
            rounded_product(sums.teacher_max, constants.scale),
            sums.student_max - sums.teacher_max,
            constants.scale,
            constants.inv_t,
            c_div,
            c_logp,
            c_ent,
        )
        is_written = agreed(is_ordinary(sums, constants.scale, P))
        value = tl.full((), 0.0, tl.float32)
        slopes = value
        factors = ()
        kept = ()
        if P.one_sweep:
            factors = swept_factors(sums, row, P)
        else:
            logs = logs_of(sums, P)
            numbers, kept = _second_sums(where, held, row, logs, constants, P, D)
            c_logp = coefficient(args.c_logp, number, constants.inv_t)
            if P.splits > 1:
                publish(args, turn, 1, numbers, P)
                met = meet(args, number, 1, P)
                there = tl.arange(0, P.lanes) < P.splits
                met = (tl.where(there, met[0], 0.0), tl.where(there, met[1], 0.0))
                numbers = sum_each(met, 0)
            # Not earlier: p and g occupy the registers of both slices.
            far_held = load_slice(args, after, P)
            value, slopes = second_divergence(numbers, logs, constants.parameter, P)
            is_written = agreed(is_written & (value - value == 0.0))
            factors = (second_factor(slopes, c_logp, row, logs, P),)
        if is_written:
            if is_lead:
                _write_statistics(args, number, value, slopes, sums, row, constants, P)
            if P.small:
                if agreed(_is_small(sums, constants, P)):
                    _write_small(args, where, held, sums, row, constants, P, D)
            _store_tiles(where, held, kept, row, factors, P)
            if P.edges:
                if is_lead:
                    _store_edges(where, held, row, factors, sums, constants, P, D)
            if is_owner:
                _write_log_probs(args, number, z_token, w_token, sums, row, constants, P)
                if P.log_prob:
                    gradient = gradient_of(z_token, w_token, row, factors, sums, constants, P, D)
                    _store_token(where, token, gradient + c_logp)
        if is_lead:
            tl.store(args.declined + number, (is_written == 0).to(tl.int8))
        if P.lag:
            turn = ahead
            held = next_held
        else:
            turn = after
            held = far_held
        ahead = after
        next_held = far_held
