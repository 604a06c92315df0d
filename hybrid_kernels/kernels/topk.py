"""Teachers known on a support of K entries: what replaces a sweep over the teacher's logits.

The vocabulary becomes K + 1 categories: the entries of the support, and the tail, whose mass is
what the support leaves over. A divergence is that of the two coarse distributions, a lower bound of
the full one. Within the tail the teacher's shape is the student's, so that every entry of the tail
has the log-ratio of the whole, rho = log((1-P)/(1-Q)).

One launch, `mark_kernel`, looks at the supports alone: it marks their entries, one bit each, drops
padding and repetitions, and gathers the student's logits. The row kernels then read the student's
logits and the marks; their sums of a tile are those of the student, and its mass outside the
support, which is never a difference of masses. What remains, `compare` and `support_gradient`, is
arithmetic on K numbers, which every program of a row does for itself.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.kernels.access import locate, mark_bytes, mark_of
from hybrid_kernels.kernels.divergences import (
    LOG2E,
    START,
    excess,
    has_small_terms,
    log_sum_exp,
    slopes,
    small_terms,
    terms,
    together,
)
from hybrid_kernels.kernels.math import (
    Row,
    Sums,
    Weights,
    at_least_lowest,
    settle,
    student_probability,
    with_slopes,
)
from hybrid_kernels.kernels.reduce import agreed
from hybrid_kernels.rows import FIELDS, HIDDEN_TAIL, SMALL_DIVERGENCE, SMALLEST_TAIL

_SMALL = tl.constexpr(SMALL_DIVERGENCE)
_STUDENT_MASS = tl.constexpr(FIELDS.student_mass)
_TEACHER_MASS = tl.constexpr(FIELDS.teacher_mass)
_TAIL_CORRECTION = tl.constexpr(FIELDS.tail_correction)

# What stands in the list of ids for padding and repetitions, and for ids outside the vocabulary.
DROPPED = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)
# log(2) in two parts, of which the first times an integer is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
SMALLEST = tl.constexpr(SMALLEST_TAIL)
HIDDEN = tl.constexpr(HIDDEN_TAIL)


class Support(NamedTuple):
    """Pointers to what a launch knows of the supports, all contiguous, and the resolution of the
    log-probabilities.

    marks: uint8 `[N, mark_bytes(V)]`; ids: int32 `[N, K]`; logits: fp32 `[N, K]`, the student's;
    token_log_prob: fp32 `[N]`, or None.
    """

    marks: tl.tensor
    ids: tl.tensor
    logits: tl.tensor
    token_log_prob: tl.tensor
    resolution: tl.tensor


class Categories(NamedTuple):
    """Both distributions on the support, `[K]`, and on the tail, `[1]`.

    As for the entries of a full row: p, q (0 where an entry takes no part), the teacher's own
    probability before a floor raised it, and the log-ratio.
    """

    p: tl.tensor
    q: tl.tensor
    raw_q: tl.tensor
    log_ratio: tl.tensor
    tail_p: tl.tensor
    tail_q: tl.tensor
    tail_raw_q: tl.tensor
    tail_log_ratio: tl.tensor
    log_p: tl.tensor
    tail_log_p: tl.tensor
    log_q: tl.tensor
    teacher_mass: tl.tensor


@triton.jit
def mark_kernel(
    problem,
    ids_ptr,
    words_ptr,
    kept_ptr,
    logits_ptr,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Marks the support of one row, lists what counts of it and gathers the student's logits."""
    row = tl.program_id(0)
    valid = True
    if problem.valid is not None:
        valid = tl.load(problem.valid + row) != 0
    if valid:
        where = locate(problem, None, row, V, EDGES, 0, False, False)
        WORDS: tl.constexpr = mark_bytes(V) // 4
        words_ptr += tl.cast(row, tl.int64) * WORDS
        for start in range(0, WORDS, 1024):
            offsets = start + tl.arange(0, 1024)
            tl.store(words_ptr + offsets, tl.zeros((1024,), tl.int32), mask=offsets < WORDS)
        tl.debug_barrier()
        lane = tl.arange(0, BLOCK_K)
        offsets = tl.cast(row, tl.int64) * K + lane
        wanted = tl.load(ids_ptr + offsets, mask=lane < K, other=-1)
        inside = (wanted >= 0) & (wanted < V)
        ids = tl.where(inside, wanted, 0).to(tl.int32)
        mark = mark_of(where, ids, V)
        bit = (tl.zeros((BLOCK_K,), tl.int32) + 1) << (mark % 32)
        before = tl.atomic_or(words_ptr + mark // 32, bit, mask=inside, sem="relaxed")
        repeated = tl.where(inside, before & bit, 0) != 0
        kept = inside
        if agreed(tl.max(repeated.to(tl.int32), 0) > 0):
            # Which of them found the bit unset is a matter of chance: the first one counts.
            for other in range(K):
                same = tl.load(ids_ptr + tl.cast(row, tl.int64) * K + other) == wanted
                kept = kept & ~(same & (lane > other))
        nothing = tl.where(inside | (wanted == -1), DROPPED, OUTSIDE)
        tl.store(kept_ptr + offsets, tl.where(kept, ids, nothing), mask=lane < K)
        z = tl.load(where.student + ids, mask=kept, other=0.0).to(tl.float32)
        tl.store(logits_ptr + offsets, z, mask=lane < K)


@triton.jit
def _load(support, row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The ids of a row's support and the student's logits there; NaN for an id that can't be."""
    lane = tl.arange(0, BLOCK_K)
    offsets = tl.cast(row, tl.int64) * K + lane
    ids = tl.load(support.ids + offsets, mask=lane < K, other=-1)
    z = tl.load(support.logits + offsets, mask=lane < K, other=0.0)
    return ids, tl.where(ids == OUTSIDE, float("nan"), z), offsets, lane < K


@triton.jit
def _exp(x):
    """e^x to the last digits: 1 - sum e^x cancels all others. (x log2(e) alone loses some.)"""
    ordinary = x > -100.0
    bounded = tl.where(ordinary, x, 0.0)
    n = tl.floor(bounded * LOG2E + 0.5)
    rest = (bounded - n * LN2_HIGH) - n * LN2_LOW
    return tl.where(ordinary, tl.exp2(rest * LOG2E) * tl.exp2(n), tl.exp2(x * LOG2E))


@triton.jit
def _tail_of_teacher(log_q, kept, q, resolution):
    """The tail's mass 1 - sum q, as it comes out and as it is taken, and sum q.

    1 - q_max comes from expm1, so that a tail of 1e-12 is not lost. One that is smaller than the
    rounding of the log-probabilities is taken as what that hides.
    """
    top = tl.max(tl.where(kept, log_q, START), 0)
    first = tl.argmax(tl.where(kept, log_q, START), 0)
    others = tl.sum(tl.where(tl.arange(0, q.shape[0]) == first, 0.0, q), 0)
    near = tl.maximum(top, -0.5)
    rest = tl.where(top > -0.5, -(near + excess(-near)), 1.0 - tl.exp2(top * LOG2E))
    spread = tl.sum(tl.where(q > 0.0, q * tl.abs(log_q), 0.0), 0)
    tail = rest - others
    # (A NaN stays one.)
    taken = tl.where(tail <= spread * resolution, tl.maximum(HIDDEN, resolution), tail)
    return tail, taken, others + tl.exp2(top * LOG2E)


@triton.jit
def _categories(
    ids,
    z,
    log_q,
    stats,
    log_tail,
    constants,
    resolution,
    HAS_FLOOR: tl.constexpr,
    TAIL: tl.constexpr,
):
    kept = ids != DROPPED
    x = tl.where(kept, z - stats.student_max, START)
    p = tl.where(kept, student_probability(z, stats, constants), 0.0)
    log_p = x * constants.inv_t - stats.student_lse
    raw_q = tl.where(kept, _exp(log_q), 0.0)
    tail_raw_q, tail_q, teacher_mass = _tail_of_teacher(log_q, kept, raw_q, resolution)
    tail_p = tl.exp2(log_tail * LOG2E)
    q = raw_q
    if HAS_FLOOR:
        lowest = tl.exp2(constants.floor * LOG2E)
        log_q = tl.where(log_q < constants.floor, constants.floor, log_q)
        q = tl.where(kept, tl.where(q < lowest, lowest, q), 0.0)
        tail_q = tl.where(tail_q < lowest, lowest, tail_q)
    own_log_q = log_q
    if TAIL == "renormalize":
        top = tl.max(x, 0)
        total = tl.sum(tl.where(kept, tl.exp2((x - top) * constants.scale), 0.0), 0)
        log_p = (x - top) * constants.inv_t - tl.log(total)
        p = tl.where(kept, tl.exp2(log_p * LOG2E), 0.0)
        top = tl.max(tl.where(kept, log_q, START), 0)
        total = tl.sum(tl.where(kept, tl.exp2((log_q - top) * LOG2E), 0.0), 0)
        log_q = log_q - top - tl.log(total)
        q = tl.where(kept, tl.exp2(log_q * LOG2E), 0.0)
        raw_q = q
        tail_p *= 0.0
        tail_q *= 0.0
        tail_raw_q *= 0.0
    part = kept & ~(z <= -float("inf"))
    log_ratio = tl.where(part, at_least_lowest(log_p - log_q) + 0.0 * z, 0.0)
    q = tl.where(part, q, 0.0)
    # A tail of the student's that is empty takes no part, like an entry whose logit is -inf.
    empty = tail_p < SMALLEST
    tail_log_ratio = tl.where(empty, 0.0, log_tail - tl.log(tail_q))
    one = tl.zeros((1,), tl.float32)
    return Categories(
        p,
        q,
        raw_q,
        log_ratio,
        one + tl.where(empty, 0.0, tail_p),
        one + tl.where(empty, 0.0, tail_q),
        one + tail_raw_q,
        one + tail_log_ratio,
        tl.where(part, log_p, -float("inf")),
        one + tl.where(empty, -float("inf"), log_tail),
        own_log_q,
        teacher_mass,
    )


@triton.jit
def _slopes(c, log_s, parameter, DIVERGENCE: tl.constexpr):
    """u and v of the slopes on the support, `[K]`, and of the tail, `[1]`."""
    u, v = slopes(c.p, c.q, c.log_p, c.log_ratio, log_s, parameter, DIVERGENCE)
    tail_u, tail_v = slopes(
        c.tail_p, c.tail_q, c.tail_log_p, c.tail_log_ratio, log_s, parameter, DIVERGENCE
    )
    return u, v, tail_u, tail_v


@triton.jit
def compare(
    problem,
    statistics_ptr,
    row,
    writes,
    token,
    z_token,
    sums,
    stats,
    constants,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    CORRECTS: tl.constexpr,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Divergence, rows of the members and log q(y) from the student's statistics.

    Where the program `writes`, it also fills the fields that only supports have.
    """
    support = problem.support
    ids, z, offsets, inside = _load(support, row, K, BLOCK_K)
    student = Row(*stats[0])
    log_tail = tl.log(Sums(*sums[0]).teacher_sum) - student.student_lse
    found = (ids == token) & (token >= 0)
    in_support = tl.max(found.to(tl.int32), 0) > 0
    value = tl.full((), 0.0, tl.float32)
    log_q_token = tl.full((), 0.0, tl.float32)
    rho = tl.full((), 0.0, tl.float32)
    teacher_mass = tl.full((), 0.0, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    rows = ()
    for i in tl.static_range(MEMBERS):
        log_q = tl.load(problem.teachers[i] + offsets, mask=inside, other=0.0)
        c = _categories(
            ids, z, log_q, student, log_tail, constants, support.resolution, HAS_FLOOR, TAIL
        )
        t = terms(c.p, c.q, c.raw_q, c.log_ratio, constants.parameter, DIVERGENCE)
        tail_t = terms(
            c.tail_p, c.tail_q, c.tail_raw_q, c.tail_log_ratio, constants.parameter, DIVERGENCE
        )
        own = tl.sum(t, 0) + tl.sum(tail_t, 0)
        if has_small_terms(DIVERGENCE):
            t = small_terms(c.p, c.q, c.raw_q, c.log_ratio, DIVERGENCE)
            tail_t = small_terms(c.tail_p, c.tail_q, c.tail_raw_q, c.tail_log_ratio, DIVERGENCE)
            own = tl.where(own < _SMALL, tl.sum(t, 0) + tl.sum(tail_t, 0), own)
        if DIVERGENCE == "renyi":
            tilt = constants.parameter - 1.0
            whole = log_sum_exp(c.log_p + tilt * c.log_ratio)
            tail = tl.max(c.tail_log_p + tilt * c.tail_log_ratio, 0)
            slope_sum = together(whole, tail, DIVERGENCE)
        else:
            u, v, tail_u, tail_v = _slopes(c, 0.0, constants.parameter, DIVERGENCE)
            slope_sum = tl.sum(c.p * u + v, 0) + tl.sum(c.tail_p * tail_u + tail_v, 0)
        sound = student.student_lse + 0.0 * c.teacher_mass
        outside = tl.max((ids == OUTSIDE).to(tl.int32), 0) > 0
        sound = tl.where(outside, float("nan"), sound)
        own, slope_sum, log_s = settle(own, slope_sum, sound, constants.parameter, DIVERGENCE)
        _, _, tail_u, tail_v = _slopes(c, log_s, constants.parameter, DIVERGENCE)
        # Of an empty tail no entry is left to have a slope.
        per_p = tl.where(c.tail_p > 0.0, tail_v / tl.maximum(c.tail_p, SMALLEST), 0.0)
        tail_slope = tl.sum(tail_u + per_p, 0)
        share = problem.shares[i]
        value += share * own
        total += share
        log_q_token += share * tl.sum(tl.where(found, c.log_q, 0.0), 0)
        rho += share * tl.sum(c.tail_log_ratio, 0)
        teacher_mass += share * c.teacher_mass
        rows = rows + (with_slopes(student, student, slope_sum, log_s, tail_slope),)
    elsewhere = float("nan")
    if support.token_log_prob is not None:
        elsewhere = tl.load(support.token_log_prob + row)
        if HAS_FLOOR:
            elsewhere = tl.where(elsewhere < constants.floor, constants.floor, elsewhere)
    teacher_log_prob = tl.where(in_support, log_q_token / total, elsewhere)
    correction = tl.full((), 0.0, tl.float32)
    if CORRECTS:
        log_p = (z_token - student.student_max) * constants.inv_t - student.student_lse
        correction = tl.where(in_support, 0.0, total * (log_p - elsewhere) - rho)
    if writes:
        p = tl.where(ids != DROPPED, student_probability(z, student, constants), 0.0)
        ptr = statistics_ptr + row
        count = tl.cast(problem.count, tl.int64)
        tl.store(ptr + _STUDENT_MASS * count, tl.sum(p, 0))
        tl.store(ptr + _TEACHER_MASS * count, teacher_mass / total)
        tl.store(ptr + _TAIL_CORRECTION * count, correction)
    return value, rows, teacher_log_prob, correction, in_support


@triton.jit
def read_correction(
    problem,
    statistics_ptr,
    row,
    token,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CORRECTS: tl.constexpr,
):
    """What `compare` has told before: the correction, and whether the token is in the support."""
    ids, _, _, _ = _load(problem.support, row, K, BLOCK_K)
    in_support = tl.max(((ids == token) & (token >= 0)).to(tl.int32), 0) > 0
    correction = tl.full((), 0.0, tl.float32)
    if CORRECTS:
        count = tl.cast(problem.count, tl.int64)
        correction = tl.load(statistics_ptr + row + _TAIL_CORRECTION * count)
    return correction, in_support


@triton.jit
def corrected(weights, correction):
    """A = advantage - dense weight * correction, in terms of coefficients."""
    own = tl.where(weights.divergence == 0.0, 0.0, weights.divergence * correction)
    return Weights(weights.divergence, weights.log_prob + own, weights.entropy)


@triton.jit
def outside_weights(stats, shares, weights, MEMBERS: tl.constexpr, TAIL: tl.constexpr):
    """The coefficients of an entry outside the support, where the divergence's gradient is a
    multiple of p, as that of log p(y) is."""
    log_prob = weights.log_prob
    if TAIL == "bucket":
        for i in tl.static_range(MEMBERS):
            row = Row(*stats[i])
            own = weights.divergence * shares[i] * (row.tail_slope - row.slope_sum)
            log_prob -= tl.where(weights.divergence == 0.0, 0.0, own)
    return Weights(0.0, log_prob, weights.entropy)


@triton.jit
def support_gradient(
    problem,
    where,
    row,
    token,
    first,
    last,
    edges,
    stats,
    weights,
    constants,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Writes the gradient of the support over what the tiles have stored: of the entries `first` to
    `last` of the body and, if wanted, of the edges."""
    student = Row(*stats[0])
    ids, z, offsets, inside = _load(problem.support, row, K, BLOCK_K)
    p = student_probability(z, student, constants)
    inner = -weights.log_prob
    if HAS_ENTROPY:
        log_p = at_least_lowest(z - student.student_max) * constants.inv_t
        inner += weights.entropy * (student.student_lse - student.entropy - log_p)
    gradient = p * inner + tl.where((ids == token) & (token >= 0), weights.log_prob, 0.0)
    for i in tl.static_range(MEMBERS):
        log_q = tl.load(problem.teachers[i] + offsets, mask=inside, other=0.0)
        # (The tail is of no consequence here.)
        c = _categories(
            ids, z, log_q, student, -1.0, constants, problem.support.resolution, HAS_FLOOR, TAIL
        )
        row_of_member = Row(*stats[i])
        u, v, _, _ = _slopes(c, row_of_member.log_s, constants.parameter, DIVERGENCE)
        own = weights.divergence * problem.shares[i]
        own = own * (c.p * (u - row_of_member.slope_sum) + v)
        gradient += tl.where(weights.divergence == 0.0, 0.0, own)
    position = ids - where.head
    in_body = (position >= 0) & (position < where.body)
    # (Scalars enter as limits: a block & scalar is no mask to the interpreter.)
    in_edges = ~in_body & (ids >= tl.where(edges, 0, 2**30))
    owned = (in_body & (position >= first) & (position < last)) | in_edges
    tl.debug_barrier()
    tl.store(where.gradient + ids, gradient.to(where.gradient.dtype.element_ty), mask=owned)
