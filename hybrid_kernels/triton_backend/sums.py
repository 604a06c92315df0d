"""The sums over a row that its statistics are made of; nothing here accesses memory.

Per row, z and w are the logits of student and teacher, m and m_w their maxima, p and q the
softmaxes at temperature T, l = log p - log q, x = z - m and d = (z - m) - (w - m_w). P is the
`Plan`, D the divergence's function (`divergences.py`). Conventions:

- Exponentials are base 2 of `x * scale` with scale = log2(e)/T. The difference comes first: scaling
  z and m separately would cost four digits at |z| = 1e4.
- Logits may be -inf, or stand for it: -1e9, a dtype's lowest number. 0 times the infinite l of an
  entry without probability would be NaN, and sums of lowest numbers overflow. So `GUARDED`
  functions select, and keep x and d in units of 2^28 nats, where they have room. The others are for
  ordinary numbers, in units of 2^-28 nats: anything beyond 2^100 nats leaves a NaN in a sum, which
  shows that guards are needed without a test for each entry (`is_ordinary`). Units that are powers
  of two round nothing and cost nothing: the difference becomes an FMA.
- A tile is (z, ws) as loaded, because 16-bit numbers allow shorter arithmetic. There is one w for
  each teacher known by its logits. Under a top-K support the only w holds marks, 1 on the support,
  so that a sweep finds the student's mass outside it.
- Lanes outside the vocabulary hold -inf on both sides and add nothing. Without guards they hold
  `Plan.pad`, an ordinary number too low to add anything.
- What depends on a teacher is a tuple with one element for each, or for the student alone if there
  is no teacher. Triton 3.6 forgets the type of a NamedTuple that is an element of a tuple built by
  addition; hence `Sums(*sums[i])` where a field is wanted.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels import rows
from hybrid_kernels.triton_backend.divergences import LEAST, LOG2E, LOWEST, NATS, START, log1p
from hybrid_kernels.triton_backend.reduce import added, max_2, sum_each

SMALL_DIVERGENCE = tl.constexpr(rows.SMALL_DIVERGENCE)


class Constants(NamedTuple):
    """A row's 1/T, log2(e)/T, teacher floor, divergence parameter and weights of the teachers."""

    inv_t: tl.tensor
    scale: tl.tensor
    floor: tl.tensor
    parameter: tl.tensor
    shares: tl.tensor


class Sums(NamedTuple):
    """The sums over part of a row, relative to the maxima of its entries. `terms` holds the `Terms`
    that the plan needs, in that order, with x and d in units of 2^28 nats."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    terms: tl.tensor


class Terms(NamedTuple):
    """What one entry or all of them add to the sums; 0 for what the plan does not need. With
    d of `difference` and exponents divided by T,

    student_sum = sum e^x        student_x = sum e^x x       student_d = sum e^x d
    teacher_sum = sum e^(w-m_w)  teacher_d = sum e^(w-m_w) d

    Under a support teacher_sum is sum e^x outside it, and the teacher's maximum is the student's.
    """

    student_sum: tl.tensor
    student_x: tl.tensor
    teacher_sum: tl.tensor
    student_d: tl.tensor
    teacher_d: tl.tensor


class Statistics(NamedTuple):
    """The statistics of a row and one teacher, see `rows.FIELDS` and `rows.MEMBER`; `shift` is
    l - d/T. Under a support teacher_lse is log(1 - P)."""

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


@triton.constexpr_function
def unit(guarded):
    """The factor of x and d, one over their unit in nats."""
    return 1 / NATS.value if guarded else NATS.value


@triton.constexpr_function
def nats(guarded):
    """How many nats a unit is."""
    return 1 / unit(guarded)


@triton.jit
def centred(logits, maximum, GUARDED: tl.constexpr = True):
    """x, or its counterpart for a teacher, in its unit."""
    UNIT: tl.constexpr = unit(GUARDED)
    # By itself, the compiler would contract the other product into the FMA.
    return tl.fma(logits.to(tl.float32), UNIT, -(maximum * UNIT))


@triton.jit
def at_least_lowest(x, GUARDED: tl.constexpr = True):
    """x, with a finite number in place of -inf, below the x of any finite logit."""
    if GUARDED:
        x = tl.maximum(x, LOWEST)
    return x


@triton.jit
def difference(
    z, w, student_max, teacher_max, GUARDED: tl.constexpr = True, BOUNDED: tl.constexpr = False
):
    """d of each entry in its unit, almost exact whether the models are close or far apart; infinite
    or NaN where a side is -inf, unless BOUNDED."""
    BITS: tl.constexpr = max(z.dtype.primitive_bitwidth, w.dtype.primitive_bitwidth)
    if BITS == 16:
        # Numbers with so few digits subtract exactly.
        x = centred(z, student_max, GUARDED)
        u = centred(w, teacher_max, GUARDED)
        return at_least_lowest(x, BOUNDED) - at_least_lowest(u, BOUNDED)
    else:
        # z - w is exact for close numbers, unlike z - m and w - m_w. So that a large offset costs
        # no digits, the larger side first loses the integer part of m - m_w; the rest comes last.
        coarse = tl.floor(student_max - teacher_max + 0.5)
        larger = tl.abs(student_max) > tl.abs(teacher_max)
        off_student = tl.where(larger, coarse, 0.0)
        off_teacher = tl.where(larger, 0.0, -coarse)
        rest = (student_max - off_student) - (teacher_max - off_teacher)
        UNIT: tl.constexpr = unit(GUARDED)
        x = at_least_lowest(centred(z, off_student, GUARDED), BOUNDED)
        return x - at_least_lowest(centred(w, off_teacher, GUARDED), BOUNDED) - rest * UNIT


# -- one online sweep ---------------------------------------------------------------------------


@triton.jit
def _packed(terms, P: tl.constexpr):
    packed = (terms.student_sum, terms.student_x)
    if P.members > 0:
        packed = packed + (terms.teacher_sum,)
    if P.student_d:
        packed = packed + (terms.student_d,)
    if P.teacher_d:
        packed = packed + (terms.teacher_d,)
    return packed


@triton.jit
def _unpacked(packed, P: tl.constexpr):
    zero = tl.full((), 0.0, tl.float32)
    teacher_sum = zero
    student_d = zero
    teacher_d = zero
    if P.members > 0:
        teacher_sum = packed[2]
    if P.student_d:
        student_d = packed[3]
    if P.teacher_d:
        teacher_d = packed[len(packed) - 1]
    return Terms(packed[0], packed[1], teacher_sum, student_d, teacher_d)


@triton.jit
def no_sums(P: tl.constexpr):
    """The sums of no entries."""
    top = tl.full((), START, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    terms = _packed(Terms(zero, zero, zero, zero, zero), P)
    sums = ()
    SUMS: tl.constexpr = P.sums
    for _ in tl.static_range(SUMS):
        sums = sums + (Sums(top, top, terms),)
    return sums


@triton.jit
def sums_of(tile, constants, P: tl.constexpr, GUARDED: tl.constexpr = True):
    """The sums of the entries of a tile."""
    sums = ()
    SUMS: tl.constexpr = P.sums
    for i in tl.static_range(SUMS):
        sums = sums + (_member_sums(tile, i, constants, P, GUARDED),)
    return sums


@triton.jit
def _member_sums(tile, i: tl.constexpr, constants, P: tl.constexpr, GUARDED: tl.constexpr):
    top = tile[0].to(tl.float32)
    if P.full > 0:
        teacher_top = tile[1][i].to(tl.float32)
        if P.full > 1:
            # Computed alone, the student's maximum is common to all members, and found once.
            student_max = tl.max(top, 0)
            teacher_max = tl.max(teacher_top, 0)
        else:
            student_max, teacher_max = max_2(top, teacher_top)
        teacher_max = tl.maximum(teacher_max, START)
        student_max = tl.maximum(student_max, START)
    else:
        student_max = tl.maximum(tl.max(top, 0), START)
        teacher_max = student_max
    terms = sum_each(_summands(tile, i, student_max, teacher_max, constants, P, GUARDED))
    if not GUARDED:
        few = _unpacked(terms, P)
        CHANGE: tl.constexpr = unit(True) * nats(False)
        terms = Terms(
            few.student_sum,
            few.student_x * CHANGE,
            few.teacher_sum,
            few.student_d * CHANGE,
            few.teacher_d * CHANGE,
        )
        terms = _packed(terms, P)
    return Sums(student_max, teacher_max, terms)


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
    scale = constants.scale * nats(GUARDED)
    x = centred(z, student_max, GUARDED)
    e = tl.exp2(x * scale)
    if P.k > 0:
        f = tl.where(tile[1][0] != 0, 0.0, e)
    if P.full > 0:
        w = tile[1][i]
        u = centred(w, teacher_max, GUARDED)
        f = tl.exp2(u * scale)
        d = difference(z, w, student_max, teacher_max, GUARDED)
        if P.student_d:
            e_d = e * _of_some(d, x * scale, GUARDED)
        if P.teacher_d:
            f_d = f * _of_some(d, u * scale, GUARDED)
    return _packed(Terms(e, e * _of_some(x, x * scale, GUARDED), f, e_d, f_d), P)


@triton.jit
def _of_some(factor, exponent, GUARDED: tl.constexpr = True):
    """The factor of a probability 2^exponent; 0 where the probability is 0."""
    if GUARDED:
        factor = tl.where(exponent > LEAST * LOG2E, factor, 0.0)
    return factor


@triton.jit
def merge(a, b, scale, P: tl.constexpr):
    """The sums of two parts together: the online log-sum-exp update."""
    merged = ()
    for i in tl.static_range(len(a)):
        one = Sums(*a[i])
        other = Sums(*b[i])
        student_max = tl.maximum(one.student_max, other.student_max)
        teacher_max = tl.maximum(one.teacher_max, other.teacher_max)
        terms = about(one, student_max, teacher_max, scale, P)
        terms = added(terms, about(other, student_max, teacher_max, scale, P))
        merged = merged + (Sums(student_max, teacher_max, terms),)
    return merged


@triton.jit
def about(sums, student_max, teacher_max, scale, P: tl.constexpr):
    """The terms relative to other maxima: x and d move by a step, the weights by a factor, and
    sum' = factor * (sum + weight * step)."""
    student_step = at_least_lowest(centred(sums.student_max, student_max))
    teacher_step = at_least_lowest(centred(sums.teacher_max, teacher_max))
    student_exponent = student_step * (scale * nats(True))
    teacher_exponent = teacher_step * (scale * nats(True))
    factor = tl.exp2(student_exponent)
    teacher_factor = tl.exp2(teacher_exponent)
    delta = student_step - teacher_step
    terms = _unpacked(sums.terms, P)
    student_d = terms.student_d + terms.student_sum * delta
    teacher_d = terms.teacher_d + terms.teacher_sum * delta
    moved = Terms(
        factor * terms.student_sum,
        factor * (terms.student_x + terms.student_sum * student_step),
        teacher_factor * terms.teacher_sum,
        factor * _of_some(student_d, student_exponent),
        teacher_factor * _of_some(teacher_d, teacher_exponent),
    )
    return _packed(moved, P)


@triton.jit
def is_ordinary(sums, constants, P: tl.constexpr):
    """Whether unguarded sums are right: all numbers are ordinary, and padding added nothing."""
    probe = _unpacked(Sums(*sums[0]).terms, P).student_x
    for i in tl.static_range(len(sums)):
        terms = _unpacked(Sums(*sums[i]).terms, P)
        probe += terms.student_d + terms.teacher_d
    return (probe - probe == 0.0) & is_above_padding(sums, constants, P)


@triton.jit
def is_above_padding(parts, constants, P: tl.constexpr):
    """Whether `Plan.pad` is too far below the maxima of `Sums` or `Statistics` to add anything."""
    lowest = parts[0][0]
    for i in tl.static_range(len(parts)):
        lowest = tl.minimum(lowest, parts[i][0])
        if P.full > 0:
            lowest = tl.minimum(lowest, parts[i][1])
    # 2^-160 is 0 in fp32.
    return (lowest - P.pad) * constants.scale > 160.0


# -- from sums to statistics ---------------------------------------------------------------------


@triton.jit
def _log_sum(total):
    """log of a sum of exponentials; NaN for a row of -inf and for NaN."""
    return tl.where(total > 0.0, tl.log(total), float("nan"))


@triton.jit
def normalisers(sums, constants, P: tl.constexpr):
    """A row's statistics from its sums, without the divergence's. The maxima take the NaN of the
    sums, or a row of NaN would look like one of -inf, as a rank's part of a row may be."""
    zero = tl.full((), 0.0, tl.float32)
    stats = ()
    for i in tl.static_range(len(sums)):
        maxima = Sums(*sums[i])
        terms = _unpacked(maxima.terms, P)
        student_max = maxima.student_max + 0.0 * terms.student_sum
        student_lse = _log_sum(terms.student_sum)
        inv_t = constants.inv_t * nats(True)
        entropy = student_lse - terms.student_x / terms.student_sum * inv_t
        teacher_max = zero
        teacher_lse = zero
        shift = zero
        if P.full > 0:
            teacher_max = maxima.teacher_max + 0.0 * terms.teacher_sum
            teacher_lse = _log_sum(terms.teacher_sum)
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
    """The statistics with what the divergence adds. All members get the student's from `student`,
    so that the compiler knows them to be equal."""
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
    """Each member's divergence and sum of slopes, from the sums of one sweep."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(stats)):
        terms = _unpacked(Sums(*sums[i]).terms, P)
        shift = Statistics(*stats[i]).shift
        inv_t = constants.inv_t * nats(True)
        reverse = terms.student_d / terms.student_sum * inv_t + shift
        forward = -(terms.teacher_d / terms.teacher_sum * inv_t + shift)
        if P.student_d and P.teacher_d:
            values = values + (reverse + forward,)
            slopes = slopes + (reverse - 1.0,)
        elif P.student_d:
            values = values + (reverse,)
            slopes = slopes + (reverse,)
        else:
            values = values + (forward,)
            slopes = slopes + (tl.full((), -1.0, tl.float32),)
    return values, slopes


@triton.jit
def settle(value, slope_sum, shift, parameter, P: tl.constexpr):
    """The divergence, the sum of slopes and log S (for Renyi's slopes), from the sums of a row.

    Renyi's terms p^a q^(1-a) - p give S - 1, used near S = 1, and its `slope_sum` is log S as a
    log-sum-exp; its true slopes sum to 0. A KL is +inf where one side forbids what the other may
    say and a term has no limit: with finite normalisers a NaN can only be the 0 * inf of such a
    term. All are NaN where a normaliser is, even if an entry's NaN was dropped by a maximum.
    """
    log_s = tl.full((), 0.0, tl.float32)
    if P.kl_family:
        value = tl.where(value == value, value, float("inf"))
        slope_sum = tl.where(slope_sum == slope_sum, slope_sum, float("inf"))
    if P.tilted:
        near = tl.abs(value) < 0.5
        log_s = tl.where(near, log1p(tl.where(near, value, 0.0)), slope_sum)
        value = log_s / (parameter - 1.0)
        slope_sum = tl.where(tl.abs(log_s) == float("inf"), float("inf"), 0.0)
    finite = shift == shift
    value = tl.where(finite, value, float("nan"))
    return value, tl.where(finite, slope_sum, float("nan")), log_s


@triton.jit
def settled(values, slopes, stats, constants, P: tl.constexpr):
    """`settle` for all members: the weighted sum of divergences, and the statistics."""
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
    """Whether a weighted sum of divergences is so small that it must be summed a second time."""
    return value < SMALL_DIVERGENCE * total_of(constants.shares)


@triton.jit
def total_of(shares):
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(shares)):
        total += shares[i]
    return total
