"""The mathematics of the row kernels, written once, in small functions without a memory access.

Notation, per row: z and w the logits of student and teacher, m and m_w their maxima, p and q the
softmaxes at temperature T, l = log p - log q, x = z - m and d = (z - m) - (w - m_w). Conventions:

- Exponentials are base 2 of `x * scale` with scale = log2(e)/T. The difference is taken first:
  scaling z and m separately would cost four digits at |z| = 1e4.
- An entry with z = -inf takes no part in a divergence, and one with w = -inf makes some of them
  infinite. In place of -inf a logarithm then holds `LOWEST`, because 0 * -inf would be NaN. These
  guards are a tenth of the instructions, so there is a version of the functions without them
  (`GUARDED` False), for tiles that hold finite numbers only.
- Tiles come as they were loaded, because 16-bit numbers allow for shorter arithmetic.
- Lanes outside the vocabulary hold `LOWEST` on both sides: finite, and adding 0 to every sum. (Both
  hold -inf where one is fp16, which ends before.)
- What a row is compared with are its MEMBERS: the teachers of a mixture, or one. All that depends
  on a teacher is a tuple, with one element for each; without a teacher there is one element, of the
  student alone. Under TOPK teachers are known on a support only (`topk.py`), and a sweep over the
  vocabulary tells the student's mass outside it: in the place of the teacher's logits stand marks,
  which are 1 on the support.
- Triton 3.6 forgets the type of a NamedTuple that is an element of a tuple built by addition; hence
  `Row(*stats[i])` where a field is wanted.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels import rows
from hybrid_kernels.kernels.divergences import (
    LOG2E,
    LOWEST,
    START,
    has_v,
    log1p,
    log_sum_exp,
    needs_student_d,
    needs_teacher_d,
    slopes,
    small_terms,
    terms,
    together,
)
from hybrid_kernels.kernels.reduce import max_2, sum_2, sum_3, sum_4, sum_5, sum_6

_SMALL = tl.constexpr(rows.SMALL_DIVERGENCE)


class Constants(NamedTuple):
    """The numbers of a launch: 1/T, log2(e)/T, the teacher's floor, the divergence's parameter."""

    inv_t: tl.tensor
    scale: tl.tensor
    floor: tl.tensor
    parameter: tl.tensor


class Sums(NamedTuple):
    """What a sweep keeps of the entries seen so far. With x = z - m and d of `difference`,

    student_sum = sum e^x        student_x = sum e^x x       student_d = sum e^x d
    teacher_sum = sum e^(w-m_w)  teacher_d = sum e^(w-m_w) d  teacher_kept = sum over z > -inf

    (exponents divided by T). Which of the last five are kept depends on the divergence. Under TOPK
    teacher_sum is sum e^x outside the support, and teacher_max the student's.
    """

    student_max: tl.tensor
    teacher_max: tl.tensor
    student_sum: tl.tensor
    student_x: tl.tensor
    teacher_sum: tl.tensor
    student_d: tl.tensor
    teacher_d: tl.tensor
    teacher_kept: tl.tensor


class Row(NamedTuple):
    """The statistics of a whole row and one teacher, as `rows.FIELDS` and `rows.MEMBER` define
    them; `shift` is l - d/T."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    student_lse: tl.tensor
    teacher_lse: tl.tensor
    shift: tl.tensor
    entropy: tl.tensor
    slope_sum: tl.tensor
    log_s: tl.tensor
    tail_slope: tl.tensor


class Weights(NamedTuple):
    """A row's coefficients of dD/dz, dlog p(y)/dz and dH/dz, with the 1/T of a logit gradient."""

    divergence: tl.tensor
    log_prob: tl.tensor
    entropy: tl.tensor


# -- the log-ratio ------------------------------------------------------------------------------


@triton.jit
def at_least_lowest(x, GUARDED: tl.constexpr = True):
    """max(x, LOWEST), and LOWEST for a NaN: (-inf) - (-inf) of an entry that takes no part."""
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
def no_sums():
    """The sums of nothing."""
    top = tl.full((), START, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    return Sums(top, top, zero, zero, zero, zero, zero, zero)


@triton.constexpr_function
def sides(members, topk):
    """How many `Sums` there are."""
    return 1 if topk else max(members, 1)


@triton.jit
def all_sums(
    zs,
    wss,
    constants,
    CHUNKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr = True,
):
    """The sums of one tile, given as tuples of CHUNKS parts: one `Sums` for each member."""
    found = ()
    for i in tl.static_range(sides(MEMBERS, TOPK)):
        ws = zs
        if MEMBERS > 0:
            ws = wss[i]
        own = tile_sums(
            zs, ws, constants, CHUNKS, 0 if TOPK else MEMBERS, TOPK, DIVERGENCE, GUARDED
        )
        found = found + (own,)
    return found


@triton.jit
def tile_sums(
    zs,
    ws,
    constants,
    CHUNKS: tl.constexpr,
    TEACHERS: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr = True,
):
    """The sums of one tile, given as tuples of CHUNKS parts, for one member."""
    HAS_TEACHER: tl.constexpr = TEACHERS > 0
    zero = tl.full((), 0.0, tl.float32)
    top = zs[0].to(tl.float32)
    for i in tl.static_range(1, CHUNKS):
        top = tl.maximum(top, zs[i].to(tl.float32))
    if HAS_TEACHER:
        teacher_top = ws[0].to(tl.float32)
        for i in tl.static_range(1, CHUNKS):
            teacher_top = tl.maximum(teacher_top, ws[i].to(tl.float32))
        if TEACHERS > 1:
            # Apart, the student's is the same operation for all of them, and done once.
            student_max = tl.max(top, 0)
            teacher_max = tl.max(teacher_top, 0)
        else:
            student_max, teacher_max = max_2(top, teacher_top)
        teacher_max = tl.maximum(teacher_max, START)
    else:
        student_max = tl.max(top, 0)
        teacher_max = zero
    student_max = tl.maximum(student_max, START)
    if TOPK:
        teacher_max = student_max
    # Entry by entry first: a thread adds up what it holds before threads add up what they have.
    lanes = _summands(
        zs[0], ws[0], student_max, teacher_max, constants, HAS_TEACHER, TOPK, DIVERGENCE, GUARDED
    )
    for i in tl.static_range(1, CHUNKS):
        more = _summands(
            zs[i], ws[i], student_max, teacher_max, constants, HAS_TEACHER, TOPK, DIVERGENCE,
            GUARDED,
        )  # fmt: skip
        lanes = plus(lanes, more)
    teacher_sum = zero
    student_d = zero
    teacher_d = zero
    teacher_kept = zero
    if TOPK:
        student_sum, student_x, teacher_sum = sum_3(
            lanes.student_sum, lanes.student_x, lanes.teacher_sum
        )
    elif not HAS_TEACHER:
        student_sum, student_x = sum_2(lanes.student_sum, lanes.student_x)
    elif needs_student_d(DIVERGENCE) and needs_teacher_d(DIVERGENCE):
        student_sum, student_x, teacher_sum, student_d, teacher_d, teacher_kept = sum_6(
            lanes.student_sum, lanes.student_x, lanes.teacher_sum, lanes.student_d,
            lanes.teacher_d, lanes.teacher_kept,
        )  # fmt: skip
    elif needs_student_d(DIVERGENCE):
        student_sum, student_x, teacher_sum, student_d = sum_4(
            lanes.student_sum, lanes.student_x, lanes.teacher_sum, lanes.student_d
        )
    elif needs_teacher_d(DIVERGENCE):
        student_sum, student_x, teacher_sum, teacher_d, teacher_kept = sum_5(
            lanes.student_sum, lanes.student_x, lanes.teacher_sum, lanes.teacher_d,
            lanes.teacher_kept,
        )  # fmt: skip
    else:
        student_sum, student_x, teacher_sum = sum_3(
            lanes.student_sum, lanes.student_x, lanes.teacher_sum
        )
    return Sums(
        student_max,
        teacher_max,
        student_sum,
        student_x,
        teacher_sum,
        student_d,
        teacher_d,
        teacher_kept,
    )


@triton.jit
def _summands(
    z,
    w,
    student_max,
    teacher_max,
    constants,
    HAS_TEACHER: tl.constexpr,
    TOPK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """What each entry adds to the sums; 0 to those that the divergence has no use for."""
    zero = tl.full((), 0.0, tl.float32)
    f = zero
    e_d = zero
    f_d = zero
    kept = zero
    x = z.to(tl.float32) - student_max
    e = tl.exp2(x * constants.scale)
    if TOPK:
        f = tl.where(w != 0, 0.0, e)
    if HAS_TEACHER:
        f = tl.exp2((w.to(tl.float32) - teacher_max) * constants.scale)
        d = difference(z, w, student_max, teacher_max, GUARDED)
        if needs_student_d(DIVERGENCE):
            e_d = e * d
        if needs_teacher_d(DIVERGENCE):
            kept = f
            if GUARDED:
                kept = tl.where(z.to(tl.float32) > LOWEST, f, 0.0)
                # q = 0 where the teacher forbids a token: its 0 * inf counts as 0.
                d = tl.minimum(d, -LOWEST)
            f_d = kept * d
    e_x = e * at_least_lowest(x, GUARDED)
    return Sums(student_max, teacher_max, e, e_x, f, e_d, f_d, kept)


@triton.jit
def plus(a, b):
    """The sums of the entries of both, which are about the same maxima."""
    return Sums(
        a.student_max,
        a.teacher_max,
        a.student_sum + b.student_sum,
        a.student_x + b.student_x,
        a.teacher_sum + b.teacher_sum,
        a.student_d + b.student_d,
        a.teacher_d + b.teacher_d,
        a.teacher_kept + b.teacher_kept,
    )


@triton.jit
def is_finite(sums, COUNT: tl.constexpr):
    """Whether a tile held finite numbers only: an infinite one leaves an infinity or 0 * inf."""
    probe = Sums(*sums[0]).student_x
    for i in tl.static_range(COUNT):
        probe += Sums(*sums[i]).student_d + Sums(*sums[i]).teacher_d
    return probe - probe == 0.0


@triton.jit
def no_sums_of(COUNT: tl.constexpr):
    """`no_sums` for each member."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (no_sums(),)
    return found


@triton.jit
def merge_all(a, b, scale, COUNT: tl.constexpr):
    """`merge` for each member."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (merge(Sums(*a[i]), Sums(*b[i]), scale),)
    return found


@triton.jit
def merge(a, b, scale):
    """The sums of the entries of both: the online log-sum-exp update."""
    student_max = tl.maximum(a.student_max, b.student_max)
    teacher_max = tl.maximum(a.teacher_max, b.teacher_max)
    a = about(a, student_max, teacher_max, scale)
    return plus(a, about(b, student_max, teacher_max, scale))


@triton.jit
def about(sums, student_max, teacher_max, scale):
    """The same sums about other maxima.

    x and d move by a step and the weights by a factor: sum' = factor * (sum + weight * step).
    """
    student_step = at_least_lowest(sums.student_max - student_max)
    teacher_step = at_least_lowest(sums.teacher_max - teacher_max)
    factor = tl.exp2(student_step * scale)
    teacher_factor = tl.exp2(teacher_step * scale)
    delta = student_step - teacher_step
    return Sums(
        student_max,
        teacher_max,
        factor * sums.student_sum,
        factor * (sums.student_x + sums.student_sum * student_step),
        teacher_factor * sums.teacher_sum,
        factor * (sums.student_d + sums.student_sum * delta),
        teacher_factor * (sums.teacher_d + sums.teacher_kept * delta),
        teacher_factor * sums.teacher_kept,
    )


@triton.jit
def log_sum(maximum, total):
    """log of a sum of exponentials; NaN for a row of -inf, and for a NaN."""
    return tl.where((maximum > LOWEST) & (total > 0.0), tl.log(total), float("nan"))


@triton.jit
def normalisers(sums, constants, HAS_TEACHER: tl.constexpr):
    """The statistics of a row from its sums, all but those of its divergence.

    A maximum drops a NaN, and a row of nothing but NaN would look like one of -inf, which a rank's
    part of the vocabulary may be: so it takes the NaN of the sum.
    """
    zero = tl.full((), 0.0, tl.float32)
    student_max = sums.student_max + 0.0 * sums.student_sum
    student_lse = log_sum(sums.student_max, sums.student_sum)
    entropy = student_lse - sums.student_x / sums.student_sum * constants.inv_t
    teacher_max = zero
    teacher_lse = zero
    shift = zero
    if HAS_TEACHER:
        teacher_max = sums.teacher_max + 0.0 * sums.teacher_sum
        teacher_lse = log_sum(teacher_max, sums.teacher_sum)
        shift = teacher_lse - student_lse
    return Row(student_max, teacher_max, student_lse, teacher_lse, shift, entropy, zero, zero, zero)


@triton.jit
def with_slopes(row, student, slope_sum, log_s, tail_slope):
    """The row with what its divergence adds, and the student's statistics from `student`: those of
    all members are equal, and known to be so once they are the same."""
    return Row(
        student.student_max,
        row.teacher_max,
        student.student_lse,
        row.teacher_lse,
        row.shift,
        student.entropy,
        slope_sum,
        log_s,
        tail_slope,
    )


@triton.jit
def swept_divergence(sums, row, constants, DIVERGENCE: tl.constexpr):
    """Value and sum of slopes from the sums of one sweep."""
    reverse = sums.student_d / sums.student_sum * constants.inv_t + row.shift
    kept = sums.teacher_kept / sums.teacher_sum
    forward = -(sums.teacher_d / sums.teacher_sum * constants.inv_t + row.shift * kept)
    if DIVERGENCE == "reverse_kl":
        value = reverse
        slope_sum = reverse
    elif DIVERGENCE == "forward_kl":
        value = forward
        slope_sum = -kept
    else:
        value = reverse + forward
        slope_sum = reverse - kept
    return value, slope_sum


@triton.jit
def settle(value, slope_sum, shift, parameter, DIVERGENCE: tl.constexpr):
    """What a row's divergence makes of the sums of its terms and slopes, and the edge cases of it.

    Returns the value, the sum of slopes, and what the slopes of Renyi's divergence need of the row:
    log S. Its terms are p^a q^(1-a) - p, which give S - 1 where S is near 1, and in the place of
    the slopes' sum stands log S as a log-sum-exp; its own slopes sum to 0.

    +inf where the teacher forbids what the student may say: there 0 * inf may have made a NaN,
    which with both normalisers sound can mean nothing else. NaN where a normaliser is not sound,
    even if a minimum or maximum has dropped the NaN of an entry.
    """
    log_s = tl.full((), 0.0, tl.float32)
    if needs_student_d(DIVERGENCE):
        infinite = (value != value) | (value == float("inf"))
        value = tl.where(infinite, float("inf"), value)
        slope_sum = tl.where(infinite, float("inf"), slope_sum)
    if DIVERGENCE == "renyi":
        near = tl.abs(value) < 0.5
        log_s = tl.where(near, log1p(tl.where(near, value, 0.0)), slope_sum)
        value = log_s / (parameter - 1.0)
        slope_sum = tl.where(log_s == float("inf"), log_s, 0.0)
    sound = shift == shift
    value = tl.where(sound, value, float("nan"))
    return value, tl.where(sound, slope_sum, float("nan")), log_s


@triton.jit
def is_small(value, shares, MEMBERS: tl.constexpr):
    """Whether a weighted sum of divergences is so small that it has to be summed anew."""
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(MEMBERS):
        total += shares[i]
    return value < _SMALL * total


@triton.jit
def settle_all(
    values, slope_sums, stats, shares, parameter, MEMBERS: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """`settle` for each member: the weighted sum of their divergences, and their rows."""
    total = tl.full((), 0.0, tl.float32)
    rows = ()
    for i in tl.static_range(MEMBERS):
        value, slope_sum, log_s = settle(
            values[i], slope_sums[i], Row(*stats[i]).shift, parameter, DIVERGENCE
        )
        total += shares[i] * value
        rows = rows + (with_slopes(Row(*stats[i]), Row(*stats[0]), slope_sum, log_s, 0.0),)
    return total, rows


# -- one entry, once both normalisers are known --------------------------------------------------


@triton.jit
def student_probability(z, row, constants):
    x = z.to(tl.float32) - row.student_max
    return tl.exp2(x * constants.scale - row.student_lse * LOG2E)


@triton.jit
def student_log_probability(z, row, constants):
    return (z.to(tl.float32) - row.student_max) * constants.inv_t - row.student_lse


@triton.jit
def teacher_probability(w, row, constants):
    x = w.to(tl.float32) - row.teacher_max
    return tl.exp2(x * constants.scale - row.teacher_lse * LOG2E)


@triton.jit
def point(z, w, row, constants, HAS_FLOOR: tl.constexpr, GUARDED: tl.constexpr = True):
    """p, q and l of each entry; q = 0 for an entry that takes no part, and outside the row."""
    p = student_probability(z, row, constants)
    q = teacher_probability(w, row, constants)
    d = difference(z, w, row.student_max, row.teacher_max, GUARDED)
    log_ratio = d * constants.inv_t + row.shift
    if HAS_FLOOR:
        log_p = student_log_probability(z, row, constants)
        log_ratio = tl.minimum(log_ratio, tl.maximum(log_p - constants.floor, LOWEST))
        q = tl.maximum(q, tl.exp2(constants.floor * LOG2E))
    if GUARDED:
        q = tl.where(z.to(tl.float32) > LOWEST, q, 0.0)
    return p, q, log_ratio


@triton.jit
def value_and_slope(
    zs,
    ws,
    row,
    constants,
    CHUNKS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMALL: tl.constexpr = False,
):
    """A tile's part of the divergence and of the sum of slopes, both normalisers known.

    (For Renyi's divergence of log S in the place of the latter: see `settle`.) Under SMALL the
    divergence is the sum that is right where it is small, too.
    """
    value, other = _entry_values(zs[0], ws[0], row, constants, HAS_FLOOR, DIVERGENCE, SMALL)
    for i in tl.static_range(1, CHUNKS):
        t, s = _entry_values(zs[i], ws[i], row, constants, HAS_FLOOR, DIVERGENCE, SMALL)
        value += t
        other = together(other, s, DIVERGENCE)
    if DIVERGENCE == "renyi":
        return tl.sum(value, 0), log_sum_exp(other)
    else:
        return sum_2(value, other)


@triton.jit
def _entry_values(
    z, w, row, constants, HAS_FLOOR: tl.constexpr, DIVERGENCE: tl.constexpr, SMALL: tl.constexpr
):  # fmt: skip
    p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR)
    parameter = constants.parameter
    raw_q = q
    if SMALL or DIVERGENCE == "alpha":
        raw_q = teacher_probability(w, row, constants)
    if SMALL:
        t = small_terms(p, q, raw_q, log_ratio, DIVERGENCE)
    else:
        t = terms(p, q, raw_q, log_ratio, parameter, DIVERGENCE)
    if DIVERGENCE == "renyi":
        s = student_log_probability(z, row, constants) + (parameter - 1.0) * log_ratio
    else:
        u, v = slopes(p, q, p, log_ratio, 0.0, parameter, DIVERGENCE)
        s = p * u + v
    return t, s


@triton.jit
def values_and_slopes(
    zs,
    wss,
    stats,
    constants,
    CHUNKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMALL: tl.constexpr = False,
):
    """`value_and_slope` for each member."""
    values = ()
    slopes = ()
    for i in tl.static_range(MEMBERS):
        t, s = value_and_slope(
            zs, wss[i], Row(*stats[i]), constants, CHUNKS, HAS_FLOOR, DIVERGENCE, SMALL
        )
        values = values + (t,)
        slopes = slopes + (s,)
    return values, slopes


@triton.jit
def swept_divergences(sums, stats, constants, MEMBERS: tl.constexpr, DIVERGENCE: tl.constexpr):
    """`swept_divergence` for each member."""
    values = ()
    slopes = ()
    for i in tl.static_range(MEMBERS):
        t, s = swept_divergence(Sums(*sums[i]), Row(*stats[i]), constants, DIVERGENCE)
        values = values + (t,)
        slopes = slopes + (s,)
    return values, slopes


@triton.jit
def each_together(a, b, COUNT: tl.constexpr, DIVERGENCE: tl.constexpr):
    """`together`, element by element of two tuples."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (together(a[i], b[i], DIVERGENCE),)
    return found


@triton.jit
def all_normalisers(sums, constants, MEMBERS: tl.constexpr, TOPK: tl.constexpr):
    """`normalisers` for each member."""
    found = ()
    for i in tl.static_range(sides(MEMBERS, TOPK)):
        found = found + (normalisers(Sums(*sums[i]), constants, MEMBERS > 0 and not TOPK),)
    return found


@triton.jit
def small_values(
    zs,
    wss,
    stats,
    shares,
    constants,
    CHUNKS: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """The weighted sum of `small_value` over the members."""
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(MEMBERS):
        total += shares[i] * small_value(
            zs, wss[i], Row(*stats[i]), constants, CHUNKS, HAS_FLOOR, DIVERGENCE
        )
    return total


@triton.jit
def small_value(
    zs,
    ws,
    row,
    constants,
    CHUNKS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A tile's part of a divergence below `SMALL_DIVERGENCE`."""
    value = _small_entries(zs[0], ws[0], row, constants, HAS_FLOOR, DIVERGENCE)
    for i in tl.static_range(1, CHUNKS):
        value += _small_entries(zs[i], ws[i], row, constants, HAS_FLOOR, DIVERGENCE)
    return tl.sum(value, 0)


@triton.jit
def _small_entries(z, w, row, constants, HAS_FLOOR: tl.constexpr, DIVERGENCE: tl.constexpr):
    p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR)
    return small_terms(p, q, teacher_probability(w, row, constants), log_ratio, DIVERGENCE)


@triton.jit
def full_gradient(
    z,
    ws,
    stats,
    shares,
    weights,
    constants,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr = True,
):
    """`logit_gradient` of all members, of which the first has the student's own terms."""
    w = z
    own = weights
    if MEMBERS > 0:
        w = ws[0]
        own = Weights(weights.divergence * shares[0], weights.log_prob, weights.entropy)
    gradient = logit_gradient(
        z,
        w,
        Row(*stats[0]),
        own,
        constants,
        HAS_FLOOR,
        MEMBERS > 0,
        HAS_ENTROPY,
        DIVERGENCE,
        GUARDED,
    )
    for i in tl.static_range(1, MEMBERS):
        own = Weights(weights.divergence * shares[i], 0.0, 0.0)
        gradient += logit_gradient(
            z, ws[i], Row(*stats[i]), own, constants, HAS_FLOOR, True, False, DIVERGENCE, GUARDED
        )
    return gradient


@triton.jit
def logit_gradient(
    z,
    w,
    row,
    weights,
    constants,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr = True,
):
    """The gradient of each entry, all but the sampled token's own term c_logp 1[v = y]:

    c_div (s - p sum s) - c_logp p - c_ent p (log p + H), with s = p u + v.

    Not GUARDED, it takes finite entries and a c_div other than 0.
    """
    inner = -weights.log_prob
    if HAS_ENTROPY:
        inner += weights.entropy * (row.student_lse - row.entropy)
    if HAS_DIVERGENCE:
        # A weight of 0 leaves nothing of an infinite divergence.
        silent = weights.divergence == 0.0
        weight = weights.divergence
        p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR, GUARDED)
        v = -q
        if needs_student_d(DIVERGENCE) and not HAS_FLOOR:
            # u = l: what is the same for all entries is added once.
            constant = weight * (row.shift - row.slope_sum)
            inner += tl.where(silent, 0.0, constant)
            d = difference(z, w, row.student_max, row.teacher_max, GUARDED)
            own = (weight * constants.inv_t) * d
        else:
            log_p = student_log_probability(z, row, constants)
            u, v = slopes(p, q, log_p, log_ratio, row.log_s, constants.parameter, DIVERGENCE)
            own = weight * (u - row.slope_sum)
        if GUARDED:
            own = tl.where(silent, 0.0, own)
        inner = own + inner
    else:
        p = student_probability(z, row, constants)
    if HAS_ENTROPY:
        log_p = at_least_lowest(z.to(tl.float32) - row.student_max, GUARDED)
        inner -= (weights.entropy * constants.inv_t) * log_p
    gradient = p * inner
    if HAS_DIVERGENCE:
        if has_v(DIVERGENCE):
            own = weight * v
            if GUARDED:
                own = tl.where(silent, 0.0, own)
            gradient += own
    return gradient
