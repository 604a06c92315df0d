"""Teachers known on a support of K entries, instead of a sweep over the teacher's logits.

The vocabulary becomes K + 1 categories: the entries of the support, and the tail with the remaining
mass. The divergence compares these two coarse distributions, and is a lower bound of the full one.
Within the tail the teacher's shape is the student's, so every entry there has the log-ratio of the
tail as a whole, rho = log((1-P)/(1-Q)).

`mark_kernel` first looks at the supports alone: it marks their entries, one bit each, drops padding
and repetitions, and gathers the student's logits. The row kernels then read the student's logits
and the marks. They sum the mass outside the support directly, never as a difference of masses. What
remains, `compare` and `store_support`, is arithmetic on K numbers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.rows import FIELDS, HIDDEN_TAIL, SMALLEST_TAIL
from hybrid_kernels.triton_backend.divergences import (
    LOG2E,
    LOWEST,
    START,
    Entry,
    excess,
    log_geometric,
    log_sum_exp,
    together,
)
from hybrid_kernels.triton_backend.entries import student_log_prob, student_probability
from hybrid_kernels.triton_backend.memory import (
    STUDENT_MASS,
    TAIL_CORRECTION,
    Token,
    is_valid,
    locate,
    mark_bytes,
    mark_of,
)
from hybrid_kernels.triton_backend.sums import (
    SMALL_DIVERGENCE,
    Statistics,
    centred,
    nats,
    settle,
    total_of,
    unit,
    with_slopes,
)

_TEACHER_MASS = tl.constexpr(FIELDS.teacher_mass)

# These replace ids in the list: padding and repetitions, and ids outside the vocabulary.
DROPPED = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)
# log(2) in two parts: the first times an integer is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
SMALLEST = tl.constexpr(SMALLEST_TAIL)
HIDDEN = tl.constexpr(HIDDEN_TAIL)


class Categories(NamedTuple):
    """What is compared with one teacher: the support's entries `[K]`, the tail as an entry `[1]`,
    log q `[K]` raised to the floor, and the teacher's mass on the support."""

    support: tl.tensor
    tail: tl.tensor
    log_q: tl.tensor
    teacher_mass: tl.tensor


@triton.jit
def mark_kernel(args, P: tl.constexpr):
    """Marks one row's support, lists the ids that count and gathers the student's logits."""
    row = tl.program_id(0)
    if is_valid(args, row):
        where = locate(args, row, 0, P)
        WORDS: tl.constexpr = mark_bytes(P.vocabulary) // 4
        words_ptr = args.support.words + tl.cast(row, tl.int64) * WORDS
        for start in range(0, WORDS, 1024):
            offsets = start + tl.arange(0, 1024)
            tl.store(words_ptr + offsets, tl.zeros((1024,), tl.int32), mask=offsets < WORDS)
        tl.debug_barrier()
        lane = tl.arange(0, P.block_k)
        first = tl.cast(row, tl.int64) * P.k
        given = tl.load(args.support.given + first + lane, mask=lane < P.k, other=-1)
        inside = (given >= 0) & (given < P.vocabulary)
        ids = tl.where(inside, given, 0).to(tl.int32)
        mark = mark_of(where, ids, P)
        bit = (tl.full((P.block_k,), 1, tl.int32)) << (mark % 32)
        before = tl.atomic_or(words_ptr + mark // 32, bit, mask=inside, sem="relaxed")
        counts = inside
        repeated = inside & ((before & bit) != 0)
        left = tl.max(repeated.to(tl.int32), 0)
        # Which repetition found the bit unset is chance, but the first one must count. In each
        # trial, the first lane that asks for a place in a table (the memory of the ids) gets it,
        # which settles its id. Lanes with other ids try another place.
        table = args.support.ids + first
        pending = inside
        trial = 0
        while left > 0:
            tl.store(table + lane, P.k, mask=lane < P.k)
            tl.debug_barrier()
            place = (ids + ids // P.k * trial) % P.k
            tl.atomic_min(table + place, lane, mask=pending, sem="relaxed")
            tl.debug_barrier()
            winner = tl.load(table + place, mask=pending, other=0, cache_modifier=".cg")
            # Several warps hold a copy of a short support, and one of them writes.
            tl.debug_barrier()
            settled = pending & (tl.load(args.support.given + first + winner) == given)
            counts = counts & ((lane == winner) | ~settled)
            pending = pending & ~settled
            left = tl.max(pending.to(tl.int32), 0)
            trial += 1
        nothing = tl.where(inside | (given == -1), DROPPED, OUTSIDE)
        tl.store(args.support.ids + first + lane, tl.where(counts, ids, nothing), mask=lane < P.k)
        z = tl.load(where.student + ids, mask=counts, other=0.0).to(tl.float32)
        tl.store(args.support.logits + first + lane, z, mask=lane < P.k)


@triton.jit
def _load(args, row, P: tl.constexpr):
    """The ids of a row's support and the student's logits there; NaN for an invalid id."""
    lane = tl.arange(0, P.block_k)
    offsets = tl.cast(row, tl.int64) * P.k + lane
    ids = tl.load(args.support.ids + offsets, mask=lane < P.k, other=-1)
    z = tl.load(args.support.logits + offsets, mask=lane < P.k, other=0.0)
    return ids, tl.where(ids == OUTSIDE, float("nan"), z)


@triton.jit
def _load_teacher(args, i: tl.constexpr, row, P: tl.constexpr):
    lane = tl.arange(0, P.block_k)
    offsets = tl.cast(row, tl.int64) * P.k + lane
    return tl.load(args.teachers[i] + offsets, mask=lane < P.k, other=0.0)


@triton.jit
def _exp(x):
    """e^x to the last digit, as 1 - sum e^x cancels the others; rounding x log2(e) loses some."""
    ordinary = x > -100.0
    bounded = tl.where(ordinary, x, 0.0)
    n = tl.floor(bounded * LOG2E + 0.5)
    rest = (bounded - n * LN2_HIGH) - n * LN2_LOW
    return tl.where(ordinary, tl.exp2(rest * LOG2E) * tl.exp2(n), tl.exp2(x * LOG2E))


@triton.jit
def _tail_of_teacher(log_q, counts, q, resolution):
    """The tail's mass 1 - sum q as computed and as used, and sum q.

    1 - q_max comes from expm1, so that a tail of 1e-12 is not lost. A tail below the rounding of
    the log-probabilities is replaced by the mass that rounding may hide.
    """
    top = tl.max(tl.where(counts, log_q, START), 0)
    first = tl.argmax(tl.where(counts, log_q, START), 0)
    others = tl.sum(tl.where(tl.arange(0, q.shape[0]) == first, 0.0, q), 0)
    near = tl.maximum(top, -0.5)
    rest = tl.where(top > -0.5, -(near + excess(-near)), 1.0 - tl.exp2(top * LOG2E))
    spread = tl.sum(tl.where(q > 0.0, q * tl.abs(log_q), 0.0), 0)
    tail = rest - others
    # A NaN stays one.
    taken = tl.where(tail <= spread * resolution, tl.maximum(HIDDEN, resolution), tail)
    return tail, taken, others + tl.exp2(top * LOG2E)


@triton.jit
def _categories(ids, z, log_q, student, log_tail, constants, resolution, P: tl.constexpr):
    counts = ids != DROPPED
    x = tl.where(counts, centred(z, student.student_max), -float("inf"))
    p = tl.where(counts, student_probability(z, student, constants), 0.0)
    inv_t = constants.inv_t * nats(True)
    log_p = x * inv_t - student.student_lse
    scaled = x * constants.inv_t - student.student_lse * unit(True)
    raw_q = tl.where(counts, _exp(log_q), 0.0)
    tail_raw_q, tail_q, teacher_mass = _tail_of_teacher(log_q, counts, raw_q, resolution)
    tail_p = tl.exp2(log_tail * LOG2E)
    q = raw_q
    if P.floor:
        lowest = tl.exp2(constants.floor * LOG2E)
        some = (z > -float("inf")) | (log_q > -float("inf"))
        log_q = tl.where(log_q < constants.floor, constants.floor, log_q)
        q = tl.where(counts & some, tl.where(q < lowest, lowest, q), 0.0)
        tail_q = tl.where(tail_q < lowest, lowest, tail_q)
    own_log_q = log_q
    if P.floor:
        # The floor does not apply where both sides are -inf.
        log_q = tl.where(some, log_q, -float("inf"))
    if P.tail == "renormalize":
        x -= tl.max(x, 0)
        e = tl.where(counts, tl.exp2(x * (constants.scale * nats(True))), 0.0)
        lse = tl.log(tl.sum(e, 0))
        log_p = tl.where(counts, x * inv_t - lse, -float("inf"))
        scaled = tl.where(counts, x * constants.inv_t - lse * unit(True), -float("inf"))
        p = tl.exp2(log_p * LOG2E)
        top = tl.max(tl.where(counts, log_q, -float("inf")), 0)
        total = tl.sum(tl.where(counts, tl.exp2((log_q - top) * LOG2E), 0.0), 0)
        log_q = log_q - top - tl.log(total)
        q = tl.where(counts, tl.exp2(log_q * LOG2E), 0.0)
        raw_q = q
    log_q = tl.where(counts, log_q, -float("inf"))
    support = Entry(p, q, raw_q, log_p, log_q, log_p - log_q, scaled - log_q * unit(True))
    # A tail without entries has no mass.
    none = tl.sum(counts.to(tl.int32), 0) >= P.vocabulary
    if P.tail == "renormalize":
        none = none | True
        tail_raw_q *= 0.0
    log_tail = tl.where(none, -float("inf"), log_tail)
    log_tail_q = tl.where(none, -float("inf"), tl.log(tail_q))
    one = tl.zeros((1,), tl.float32)
    tail = Entry(
        one + tl.where(none, 0.0, tail_p),
        one + tl.where(none, 0.0, tail_q),
        one + tail_raw_q,
        one + log_tail,
        one + log_tail_q,
        one + (log_tail - log_tail_q),
        one + (log_tail - log_tail_q) * unit(True),
    )
    return Categories(support, tail, own_log_q, teacher_mass)


@triton.jit
def compare(args, where, token, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """The divergence, the members' statistics, log q(y) and the token, from the student's
    statistics. Also writes the fields that only supports have."""
    row = where.row
    ids, z = _load(args, row, P)
    student = Statistics(*stats[0])
    log_tail = student.teacher_lse
    is_token = (ids == token.id) & (token.id >= 0)
    in_support = tl.max(is_token.to(tl.int32), 0) > 0
    value = tl.full((), 0.0, tl.float32)
    log_q_token = tl.full((), 0.0, tl.float32)
    rho = tl.full((), 0.0, tl.float32)
    teacher_mass = tl.full((), 0.0, tl.float32)
    total = total_of(constants.shares)
    members = ()
    for i in tl.static_range(len(args.teachers)):
        log_q = _load_teacher(args, i, row, P)
        c = _categories(ids, z, log_q, student, log_tail, constants, args.support.resolution, P)
        t, u, v = D(c.support, constants.parameter, 0.0, False)
        tail_t, tail_u, tail_v = D(c.tail, constants.parameter, 0.0, False)
        member_value = tl.sum(t, 0) + tl.sum(tail_t, 0)
        if P.kl_family:
            t, _, _ = D(c.support, constants.parameter, 0.0, True)
            tail_t, _, _ = D(c.tail, constants.parameter, 0.0, True)
            member_value = tl.where(
                member_value < SMALL_DIVERGENCE, tl.sum(t, 0) + tl.sum(tail_t, 0), member_value
            )
        if P.tilted:
            whole = log_sum_exp(log_geometric(c.support, constants.parameter))
            tail_whole = tl.max(log_geometric(c.tail, constants.parameter), 0)
            slope_sum = together(whole, tail_whole, P)
        else:
            slope_sum = tl.sum(c.support.p * u + v, 0) + tl.sum(c.tail.p * tail_u + tail_v, 0)
        # NaN where a renormalised side has no mass on the support.
        masses = c.teacher_mass + tl.sum(c.support.p + c.support.q, 0)
        finite = student.student_lse + 0.0 * masses
        outside = tl.max((ids == OUTSIDE).to(tl.int32), 0) > 0
        finite = tl.where(outside, float("nan"), finite)
        member_value, slope_sum, log_s = settle(
            member_value, slope_sum, finite, constants.parameter, P
        )
        _, tail_u, tail_v = D(c.tail, constants.parameter, log_s, False)
        # An empty tail has no slope.
        per_p = tl.where(c.tail.p > 0.0, tail_v / tl.maximum(c.tail.p, SMALLEST), 0.0)
        share = constants.shares[i]
        value += share * member_value
        log_q_token += share / total * tl.sum(tl.where(is_token, c.log_q, 0.0), 0)
        rho += share * tl.sum(tl.where(c.tail.p > 0.0, c.tail.log_ratio, 0.0), 0)
        teacher_mass += share / total * c.teacher_mass
        tail_slope = tl.sum(tail_u + per_p, 0)
        members = members + (with_slopes(student, student, slope_sum, log_s, tail_slope),)
    elsewhere = float("nan")
    if args.support.token_log_prob is not None:
        elsewhere = tl.load(args.support.token_log_prob + row)
        if P.floor:
            elsewhere = tl.where(elsewhere < constants.floor, constants.floor, elsewhere)
    teacher_log_prob = tl.where(in_support, log_q_token, elsewhere)
    correction = tl.full((), 0.0, tl.float32)
    if P.corrects:
        log_p = student_log_prob(token.z, student, constants)
        # log q(y) is NaN where it is not known.
        corrected = ~in_support & (elsewhere == elsewhere) & (log_tail > -float("inf"))
        correction = tl.where(corrected, total * (log_p - elsewhere) - rho, 0.0)
    p = tl.where(ids != DROPPED, student_probability(z, student, constants), 0.0)
    ptr = args.statistics + row
    count = tl.cast(args.count, tl.int64)
    # NaN where the normaliser is, even if the support is empty.
    tl.store(ptr + STUDENT_MASS * count, tl.sum(p, 0) + 0.0 * student.student_lse)
    tl.store(ptr + _TEACHER_MASS * count, teacher_mass)
    tl.store(ptr + TAIL_CORRECTION * count, correction)
    token = Token(token.id, token.z, token.ws, in_support, correction)
    return value, members, teacher_log_prob, token


@triton.jit
def recall(args, where, token, P: tl.constexpr):
    """The token as an earlier `compare` completed it."""
    ids, _ = _load(args, where.row, P)
    in_support = tl.max(((ids == token.id) & (token.id >= 0)).to(tl.int32), 0) > 0
    correction = token.correction
    if P.corrects:
        count = tl.cast(args.count, tl.int64)
        correction = tl.load(args.statistics + where.row + TAIL_CORRECTION * count)
    return Token(token.id, token.z, token.ws, in_support, correction)


@triton.jit
def store_support(
    args, where, token, stats, coefficients, constants, P: tl.constexpr, D: tl.constexpr
):
    """Overwrites the entries of the support in the gradient."""
    student = Statistics(*stats[0])
    ids, z = _load(args, where.row, P)
    p = student_probability(z, student, constants)
    inner = -coefficients.log_prob
    if P.entropy:
        # Where p = 0, any finite number will do.
        log_p = tl.maximum(centred(z, student.student_max) * constants.inv_t, LOWEST * unit(True))
        log_p *= nats(True)
        inner += coefficients.entropy * (student.student_lse - student.entropy - log_p)
    own_term = tl.where((ids == token.id) & (token.id >= 0), coefficients.log_prob, 0.0)
    gradient = p * inner + own_term
    for i in tl.static_range(len(args.teachers)):
        log_q = _load_teacher(args, i, where.row, P)
        # The tail's mass, here e^-1, does not matter.
        c = _categories(ids, z, log_q, student, -1.0, constants, args.support.resolution, P)
        stat = Statistics(*stats[i])
        _, u, v = D(c.support, constants.parameter, stat.log_s, False)
        share = coefficients.divergence * constants.shares[i]
        pull = share * (c.support.p * (u - stat.slope_sum) + v)
        gradient += tl.where(coefficients.divergence == 0.0, 0.0, pull)
    tl.debug_barrier()
    tl.store(where.gradient + ids, gradient.to(where.gradient.dtype.element_ty), mask=ids >= 0)
