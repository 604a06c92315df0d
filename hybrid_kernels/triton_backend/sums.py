"""The sums over a row that its statistics are made of, in functions without a memory access.

Notation, per row: z and w the logits of student and teacher, m and m_w their maxima, p and q the
softmaxes at temperature T, l = log p - log q, x = z - m and d = (z - m) - (w - m_w). Conventions:

- Exponentials are base 2 of `x * scale` with scale = log2(e)/T. The difference is taken first:
  scaling z and m separately would cost four digits at |z| = 1e4.
- An entry with z = -inf is left out of a divergence, and one with w = -inf makes some of them
  infinite. In place of -inf a logarithm then holds `LOWEST`, because 0 * -inf would be NaN. These
  guards are a tenth of the instructions, so there is a version of the functions without them
  (`GUARDED` False), for tiles that hold finite numbers only.
- A tile is (z, ws), with one w for each teacher that is known by its logits, as they were loaded,
  because 16-bit numbers allow for shorter arithmetic. Under a top-K support there is one w, with
  marks that are 1 on the support: a sweep finds the student's mass outside it.
- Lanes outside the vocabulary hold `LOWEST` on both sides: finite, and adding 0 to every sum. (Both
  hold -inf where one is fp16, which ends before.)
- All that depends on a teacher is a tuple with one element for each; without a teacher there is one
  element, of the student alone. Triton 3.6 forgets the type of a NamedTuple that is an element of a
  tuple built by addition; hence `Sums(*sums[i])` where a field is wanted.
- P is the `Plan`, D the function of the divergence (`divergences.py`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels import rows
from hybrid_kernels.triton_backend.divergences import (
    LOG2E,
    LOWEST,
    START,
    Entry,
    all_together,
    log1p,
    together,
)
from hybrid_kernels.triton_backend.reduce import max_2, sum_each

SMALL_DIVERGENCE = tl.constexpr(rows.SMALL_DIVERGENCE)


class Constants(NamedTuple):
    """The numbers of a row: 1/T, log2(e)/T, the teacher's floor, the divergence's parameter, and
    the weights of the teachers."""

    inv_t: tl.tensor
    scale: tl.tensor
    floor: tl.tensor
    parameter: tl.tensor
    shares: tl.tensor


class Sums(NamedTuple):
    """The sums over a part of a row, about the maxima of its entries. `terms` holds those of
    `Terms` that the plan needs, in that order."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    terms: tl.tensor


class Terms(NamedTuple):
    """What an entry adds to the sums, or all entries; 0 for what the plan does not need. With
    x = z - m, d of `difference` and exponents divided by T,

    student_sum = sum e^x        student_x = sum e^x x       student_d = sum e^x d
    teacher_sum = sum e^(w-m_w)  teacher_d = sum e^(w-m_w) d
    teacher_allowed = sum e^(w-m_w) over z > -inf

    Under a support teacher_sum is sum e^x outside it, and the teacher's maximum is the student's.
    """

    student_sum: tl.tensor
    student_x: tl.tensor
    teacher_sum: tl.tensor
    student_d: tl.tensor
    teacher_d: tl.tensor
    teacher_allowed: tl.tensor


class Statistics(NamedTuple):
    """The statistics of a whole row and one teacher, as `rows.FIELDS` and `rows.MEMBER` define
    them; `shift` is l - d/T. Under a support teacher_lse is log(1 - P)."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    student_lse: tl.tensor
    teacher_lse: tl.tensor
    shift: tl.tensor
    entropy: tl.tensor
    slope_sum: tl.tensor
    log_s: tl.tensor
    tail_slope: tl.tensor


# -- the log-ratio ------------------------------------------------------------------------------


@triton.jit
def at_least_lowest(x, GUARDED: tl.constexpr = True):
    """max(x, LOWEST), and LOWEST for a NaN: (-inf) - (-inf) of an entry that is left out."""
    if GUARDED:
        x = tl.where(x > LOWEST, x, LOWEST)
    return x


@triton.jit
def difference(z, w, student_max, teacher_max, GUARDED: tl.constexpr):
    """d of each entry, with hardly a rounding where the models are close or far apart."""
    BITS: tl.constexpr = max(z.dtype.primitive_bitwidth, w.dtype.primitive_bitwidth)
    z = z.to(tl.float32)
    w = w.to(tl.float32)
    if BITS == 16:
        # Numbers of so few digits are subtracted exactly.
        d = (z - student_max) - (w - teacher_max)
    else:
        # z - w is exact for close numbers, where z - m and w - m_w would each be rounded. So the
        # integer part of m - m_w is taken off the larger side first (a large offset between the
        # models must not cost digits either), and the rest of it last.
        coarse = tl.floor(student_max - teacher_max + 0.5)
        larger = tl.abs(student_max) > tl.abs(teacher_max)
        off_student = tl.where(larger, coarse, 0.0)
        off_teacher = tl.where(larger, 0.0, -coarse)
        rest = (student_max - off_student) - (teacher_max - off_teacher)
        d = (z - off_student) - (w - off_teacher) - rest
    return at_least_lowest(d, GUARDED)


# -- one online sweep ---------------------------------------------------------------------------


@triton.jit
def _packed(terms, P: tl.constexpr):
    packed = (terms.student_sum, terms.student_x)
    if P.members > 0:
        packed = packed + (terms.teacher_sum,)
    if P.student_d:
        packed = packed + (terms.student_d,)
    if P.teacher_d:
        packed = packed + (terms.teacher_d, terms.teacher_allowed)
    return packed


@triton.jit
def _unpacked(packed, P: tl.constexpr):
    zero = tl.full((), 0.0, tl.float32)
    teacher_sum = zero
    student_d = zero
    teacher_d = zero
    teacher_allowed = zero
    if P.members > 0:
        teacher_sum = packed[2]
    if P.student_d:
        student_d = packed[3]
    if P.teacher_d:
        teacher_d = packed[len(packed) - 2]
        teacher_allowed = packed[len(packed) - 1]
    return Terms(packed[0], packed[1], teacher_sum, student_d, teacher_d, teacher_allowed)


@triton.jit
def no_sums(P: tl.constexpr):
    """The sums of no entries."""
    top = tl.full((), START, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    terms = _packed(Terms(zero, zero, zero, zero, zero, zero), P)
    sums = ()
    SUMS: tl.constexpr = P.sums
    for _ in tl.static_range(SUMS):
        sums = sums + (Sums(top, top, terms),)
    return sums


@triton.jit
def sums_of(tiles, constants, P: tl.constexpr, GUARDED: tl.constexpr = True):
    """The sums of the entries of some tiles."""
    sums = ()
    SUMS: tl.constexpr = P.sums
    for i in tl.static_range(SUMS):
        sums = sums + (_member_sums(tiles, i, constants, P, GUARDED),)
    return sums


@triton.jit
def _member_sums(tiles, i: tl.constexpr, constants, P: tl.constexpr, GUARDED: tl.constexpr):
    top = tiles[0][0].to(tl.float32)
    for j in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tiles[j][0].to(tl.float32))
    if P.full > 0:
        teacher_top = tiles[0][1][i].to(tl.float32)
        for j in tl.static_range(1, len(tiles)):
            teacher_top = tl.maximum(teacher_top, tiles[j][1][i].to(tl.float32))
        if P.full > 1:
            # By itself, the student's is the same operation for all of them, and done once.
            student_max = tl.max(top, 0)
            teacher_max = tl.max(teacher_top, 0)
        else:
            student_max, teacher_max = max_2(top, teacher_top)
        teacher_max = tl.maximum(teacher_max, START)
        student_max = tl.maximum(student_max, START)
    else:
        student_max = tl.maximum(tl.max(top, 0), START)
        teacher_max = student_max
    # Entry by entry first: a thread adds up what it holds before threads add up what they have.
    lanes = _summands(tiles[0], i, student_max, teacher_max, constants, P, GUARDED)
    for j in tl.static_range(1, len(tiles)):
        tile = _summands(tiles[j], i, student_max, teacher_max, constants, P, GUARDED)
        lanes = _added(lanes, tile)
    return Sums(student_max, teacher_max, sum_each(lanes))


@triton.jit
def _summands(
    tile,
    i: tl.constexpr,
    student_max,
    teacher_max,
    constants,
    P: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """What each entry adds to the sums."""
    z = tile[0]
    zero = tl.full((), 0.0, tl.float32)
    f = zero
    e_d = zero
    f_d = zero
    allowed = zero
    x = z.to(tl.float32) - student_max
    e = tl.exp2(x * constants.scale)
    if P.k > 0:
        f = tl.where(tile[1][0] != 0, 0.0, e)
    if P.full > 0:
        w = tile[1][i]
        f = tl.exp2((w.to(tl.float32) - teacher_max) * constants.scale)
        d = difference(z, w, student_max, teacher_max, GUARDED)
        if P.student_d:
            e_d = e * d
        if P.teacher_d:
            allowed = f
            if GUARDED:
                allowed = tl.where(z.to(tl.float32) > LOWEST, f, 0.0)
                # q = 0 where the teacher forbids a token: its 0 * inf counts as 0.
                d = tl.minimum(d, -LOWEST)
            f_d = allowed * d
    return _packed(Terms(e, e * at_least_lowest(x, GUARDED), f, e_d, f_d, allowed), P)


@triton.jit
def _added(a, b):
    """Sums about the same maxima, one by one."""
    added = ()
    for i in tl.static_range(len(a)):
        added = added + (a[i] + b[i],)
    return added


@triton.jit
def merge(a, b, scale, P: tl.constexpr):
    """The sums of the entries of both: the online log-sum-exp update."""
    merged = ()
    for i in tl.static_range(len(a)):
        one = Sums(*a[i])
        other = Sums(*b[i])
        student_max = tl.maximum(one.student_max, other.student_max)
        teacher_max = tl.maximum(one.teacher_max, other.teacher_max)
        terms = about(one, student_max, teacher_max, scale, P)
        terms = _added(terms, about(other, student_max, teacher_max, scale, P))
        merged = merged + (Sums(student_max, teacher_max, terms),)
    return merged


@triton.jit
def about(sums, student_max, teacher_max, scale, P: tl.constexpr):
    """The terms of sums, about other maxima.

    x and d move by a step and the weights by a factor: sum' = factor * (sum + weight * step).
    """
    student_step = at_least_lowest(sums.student_max - student_max)
    teacher_step = at_least_lowest(sums.teacher_max - teacher_max)
    factor = tl.exp2(student_step * scale)
    teacher_factor = tl.exp2(teacher_step * scale)
    delta = student_step - teacher_step
    terms = _unpacked(sums.terms, P)
    moved = Terms(
        factor * terms.student_sum,
        factor * (terms.student_x + terms.student_sum * student_step),
        teacher_factor * terms.teacher_sum,
        factor * (terms.student_d + terms.student_sum * delta),
        teacher_factor * (terms.teacher_d + terms.teacher_allowed * delta),
        teacher_factor * terms.teacher_allowed,
    )
    return _packed(moved, P)


@triton.jit
def is_finite(sums, P: tl.constexpr):
    """Whether tiles held finite numbers only: an infinite one leaves an infinity or 0 * inf."""
    probe = _unpacked(Sums(*sums[0]).terms, P).student_x
    for i in tl.static_range(len(sums)):
        terms = _unpacked(Sums(*sums[i]).terms, P)
        probe += terms.student_d + terms.teacher_d
    return probe - probe == 0.0


# -- from sums to statistics ---------------------------------------------------------------------


@triton.jit
def _log_sum(maximum, total):
    """log of a sum of exponentials; NaN for a row of -inf, and for a NaN."""
    return tl.where((maximum > LOWEST) & (total > 0.0), tl.log(total), float("nan"))


@triton.jit
def normalisers(sums, constants, P: tl.constexpr):
    """The statistics of a row from its sums, all but those of its divergence.

    A maximum drops a NaN, and a row of nothing but NaN would look like one of -inf, which a rank's
    part of the vocabulary may be: so it takes the NaN of the sum.
    """
    zero = tl.full((), 0.0, tl.float32)
    stats = ()
    for i in tl.static_range(len(sums)):
        maxima = Sums(*sums[i])
        terms = _unpacked(maxima.terms, P)
        student_max = maxima.student_max + 0.0 * terms.student_sum
        student_lse = _log_sum(maxima.student_max, terms.student_sum)
        entropy = student_lse - terms.student_x / terms.student_sum * constants.inv_t
        teacher_max = zero
        teacher_lse = zero
        shift = zero
        if P.full > 0:
            teacher_max = maxima.teacher_max + 0.0 * terms.teacher_sum
            teacher_lse = _log_sum(teacher_max, terms.teacher_sum)
            shift = teacher_lse - student_lse
        if P.k > 0:
            teacher_lse = tl.log(terms.teacher_sum) - student_lse
        stat = Statistics(
            student_max, teacher_max, student_lse, teacher_lse, shift, entropy, zero, zero, zero
        )
        stats = stats + (stat,)
    return stats


@triton.jit
def with_slopes(stat, student, slope_sum, log_s, tail_slope):
    """The statistics with what the divergence adds, and the student's from `student`: those of all
    members are equal, and known to be so once they are the same."""
    return Statistics(
        student.student_max,
        stat.teacher_max,
        student.student_lse,
        stat.teacher_lse,
        stat.shift,
        student.entropy,
        slope_sum,
        log_s,
        tail_slope,
    )


@triton.jit
def swept_divergences(sums, stats, constants, P: tl.constexpr):
    """Value and sum of slopes, for each member, from the sums of one sweep."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(stats)):
        terms = _unpacked(Sums(*sums[i]).terms, P)
        shift = Statistics(*stats[i]).shift
        reverse = terms.student_d / terms.student_sum * constants.inv_t + shift
        allowed = terms.teacher_allowed / terms.teacher_sum
        forward = -(terms.teacher_d / terms.teacher_sum * constants.inv_t + shift * allowed)
        if P.student_d and P.teacher_d:
            values = values + (reverse + forward,)
            slopes = slopes + (reverse - allowed,)
        elif P.student_d:
            values = values + (reverse,)
            slopes = slopes + (reverse,)
        else:
            values = values + (forward,)
            slopes = slopes + (-allowed,)
    return values, slopes


@triton.jit
def settle(value, slope_sum, shift, parameter, P: tl.constexpr):
    """What a row's divergence makes of the sums of its terms and slopes, and its edge cases.

    Returns the value, the sum of slopes, and log S, which the slopes of Renyi's divergence need.
    Its terms are p^a q^(1-a) - p, which give S - 1 where S is near 1, and in the place of the sum
    of slopes stands log S as a log-sum-exp; its own slopes sum to 0.

    +inf where the teacher forbids what the student may say: there 0 * inf may have made a NaN,
    which with two finite normalisers can mean nothing else. NaN where a normaliser is NaN, even if
    a minimum or maximum has dropped the NaN of an entry.
    """
    log_s = tl.full((), 0.0, tl.float32)
    if P.diverges:
        infinite = (value != value) | (value == float("inf"))
        value = tl.where(infinite, float("inf"), value)
        slope_sum = tl.where(infinite, float("inf"), slope_sum)
    if P.tilted:
        near = tl.abs(value) < 0.5
        log_s = tl.where(near, log1p(tl.where(near, value, 0.0)), slope_sum)
        value = log_s / (parameter - 1.0)
        slope_sum = tl.where(log_s == float("inf"), log_s, 0.0)
    finite = shift == shift
    value = tl.where(finite, value, float("nan"))
    return value, tl.where(finite, slope_sum, float("nan")), log_s


@triton.jit
def settled(values, slopes, stats, constants, P: tl.constexpr):
    """`settle` for each member: the weighted sum of their divergences, and their statistics."""
    total = tl.full((), 0.0, tl.float32)
    members = ()
    for i in tl.static_range(len(stats)):
        stat = Statistics(*stats[i])
        value, slope_sum, log_s = settle(values[i], slopes[i], stat.shift, constants.parameter, P)
        total += constants.shares[i] * value
        members = members + (with_slopes(stat, Statistics(*stats[0]), slope_sum, log_s, 0.0),)
    return total, members


@triton.jit
def is_small(value, constants):
    """Whether a weighted sum of divergences is so small that it has to be summed a second time."""
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(constants.shares)):
        total += constants.shares[i]
    return value < SMALL_DIVERGENCE * total


# -- one entry, once both normalisers are known --------------------------------------------------


@triton.jit
def student_probability(z, stat, constants):
    x = z.to(tl.float32) - stat.student_max
    return tl.exp2(x * constants.scale - stat.student_lse * LOG2E)


@triton.jit
def student_log_prob(z, stat, constants):
    return (z.to(tl.float32) - stat.student_max) * constants.inv_t - stat.student_lse


@triton.jit
def entry_of(z, w, stat, constants, P: tl.constexpr, GUARDED: tl.constexpr = True):
    """Both probabilities and their log-ratio; q = 0 where z = -inf, and outside the row."""
    p = student_probability(z, stat, constants)
    x = w.to(tl.float32) - stat.teacher_max
    raw_q = tl.exp2(x * constants.scale - stat.teacher_lse * LOG2E)
    q = raw_q
    d = difference(z, w, stat.student_max, stat.teacher_max, GUARDED)
    log_ratio = d * constants.inv_t + stat.shift
    log_p = student_log_prob(z, stat, constants)
    if P.floor:
        log_ratio = tl.minimum(log_ratio, tl.maximum(log_p - constants.floor, LOWEST))
        q = tl.maximum(q, tl.exp2(constants.floor * LOG2E))
    if GUARDED:
        q = tl.where(z.to(tl.float32) > LOWEST, q, 0.0)
    return Entry(p, q, raw_q, log_p, log_ratio)


@triton.jit
def _term_and_slope(
    tile, i: tl.constexpr, stat, constants, P: tl.constexpr, D: tl.constexpr, SMALL: tl.constexpr
):
    """t and s of each entry; in the place of Renyi's s the exponent whose log-sum-exp is log S."""
    entry = entry_of(tile[0], tile[1][i], stat, constants, P)
    parameter = constants.parameter
    t, u, v = D(entry, parameter, 0.0, SMALL)
    s = entry.p * u + v
    if P.tilted:
        s = entry.log_p + (parameter - 1.0) * entry.log_ratio
    return t, s


@triton.jit
def values_and_slopes(
    tiles, stats, constants, P: tl.constexpr, D: tl.constexpr, SMALL: tl.constexpr = False
):
    """What tiles add to the divergence and the sum of slopes of each member, all normalisers known;
    under SMALL the divergence is the sum that is right where it is small, too."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(stats)):
        stat = Statistics(*stats[i])
        t, s = _term_and_slope(tiles[0], i, stat, constants, P, D, SMALL)
        for j in tl.static_range(1, len(tiles)):
            t_j, s_j = _term_and_slope(tiles[j], i, stat, constants, P, D, SMALL)
            t += t_j
            s = together(s, s_j, P)
        if P.tilted:
            values = values + (tl.sum(t, 0),)
            slopes = slopes + (all_together(s, P),)
        else:
            sums = sum_each((t, s))
            values = values + (sums[0],)
            slopes = slopes + (sums[1],)
    return values, slopes


@triton.jit
def add_values_and_slopes(a, b, P: tl.constexpr):
    """The results of `values_and_slopes` of the entries of both."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(a[0])):
        values = values + (a[0][i] + b[0][i],)
        slopes = slopes + (together(a[1][i], b[1][i], P),)
    return values, slopes


@triton.jit
def small_value(tiles, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """What tiles add to the weighted sum of divergences, where that is small."""
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(stats)):
        stat = Statistics(*stats[i])
        t, _ = _term_and_slope(tiles[0], i, stat, constants, P, D, True)
        for j in tl.static_range(1, len(tiles)):
            t_j, _ = _term_and_slope(tiles[j], i, stat, constants, P, D, True)
            t += t_j
        total += constants.shares[i] * tl.sum(t, 0)
    return total


@triton.jit
def teacher_log_prob(w_token, stats, constants, P: tl.constexpr):
    """log q(y): the weighted mean over the members."""
    total = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(w_token)):
        stat = Statistics(*stats[i])
        log_q = (w_token[i] - stat.teacher_max) * constants.inv_t - stat.teacher_lse
        if P.floor:
            log_q = tl.where(log_q < constants.floor, constants.floor, log_q)
        total += constants.shares[i]
        mean += constants.shares[i] * log_q
    return mean / total
