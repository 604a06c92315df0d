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
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import target_info

from hybrid_kernels import rows
from hybrid_kernels.kernels.reduce import INTERPRETED, max_2, sum_2, sum_3, sum_4, sum_5, sum_6

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(rows.LOWEST)
# Where a running maximum starts: finite, so that differences with it are never inf - inf.
START = tl.constexpr(-3.4028234663852886e38)


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

    (exponents divided by T). Which of the last five are kept depends on the divergence.
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
    """The statistics of a whole row, as `rows.FIELDS` defines them; `shift` is l - d/T."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    student_lse: tl.tensor
    teacher_lse: tl.tensor
    shift: tl.tensor
    entropy: tl.tensor
    slope_sum: tl.tensor


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


@triton.constexpr_function
def needs_student_d(divergence):
    return divergence in ("reverse_kl", "jeffreys")


@triton.constexpr_function
def needs_teacher_d(divergence):
    return divergence in ("forward_kl", "jeffreys")


@triton.jit
def no_sums():
    """The sums of nothing."""
    top = tl.full((), START, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    return Sums(top, top, zero, zero, zero, zero, zero, zero)


@triton.jit
def tile_sums(
    zs,
    ws,
    constants,
    CHUNKS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    GUARDED: tl.constexpr = True,
):
    """The sums of one tile, given as tuples of CHUNKS parts."""
    zero = tl.full((), 0.0, tl.float32)
    top = zs[0].to(tl.float32)
    for i in tl.static_range(1, CHUNKS):
        top = tl.maximum(top, zs[i].to(tl.float32))
    if HAS_TEACHER:
        teacher_top = ws[0].to(tl.float32)
        for i in tl.static_range(1, CHUNKS):
            teacher_top = tl.maximum(teacher_top, ws[i].to(tl.float32))
        student_max, teacher_max = max_2(top, teacher_top)
        teacher_max = tl.maximum(teacher_max, START)
    else:
        student_max = tl.max(top, 0)
        teacher_max = zero
    student_max = tl.maximum(student_max, START)
    # Entry by entry first: a thread adds up what it holds before threads add up what they have.
    lanes = _summands(
        zs[0], ws[0], student_max, teacher_max, constants, HAS_TEACHER, DIVERGENCE, GUARDED
    )
    for i in tl.static_range(1, CHUNKS):
        more = _summands(
            zs[i], ws[i], student_max, teacher_max, constants, HAS_TEACHER, DIVERGENCE, GUARDED
        )
        lanes = plus(lanes, more)
    teacher_sum = zero
    student_d = zero
    teacher_d = zero
    teacher_kept = zero
    if not HAS_TEACHER:
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
def is_finite(sums):
    """Whether a tile held finite numbers only: an infinite one leaves an infinity or 0 * inf."""
    probe = sums.student_x + sums.student_d + sums.teacher_d
    return probe - probe == 0.0


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
    """The statistics of a row from its sums, all but those of its divergence."""
    zero = tl.full((), 0.0, tl.float32)
    student_lse = log_sum(sums.student_max, sums.student_sum)
    entropy = student_lse - sums.student_x / sums.student_sum * constants.inv_t
    teacher_max = zero
    teacher_lse = zero
    shift = zero
    if HAS_TEACHER:
        teacher_max = sums.teacher_max
        teacher_lse = log_sum(teacher_max, sums.teacher_sum)
        shift = teacher_lse - student_lse
    return Row(sums.student_max, teacher_max, student_lse, teacher_lse, shift, entropy, zero)


@triton.jit
def with_slope_sum(row, slope_sum):
    return Row(
        row.student_max,
        row.teacher_max,
        row.student_lse,
        row.teacher_lse,
        row.shift,
        row.entropy,
        slope_sum,
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
def settle(value, slope_sum, shift, DIVERGENCE: tl.constexpr):
    """What the edge cases make of a row's sums.

    +inf where the teacher forbids what the student may say: there 0 * inf may have made a NaN,
    which with both normalisers sound can mean nothing else. NaN where a normaliser is not sound,
    even if a minimum or maximum has dropped the NaN of an entry.
    """
    if needs_student_d(DIVERGENCE):
        infinite = (value != value) | (value == float("inf"))
        value = tl.where(infinite, float("inf"), value)
        slope_sum = tl.where(infinite, float("inf"), slope_sum)
    sound = shift == shift
    return tl.where(sound, value, float("nan")), tl.where(sound, slope_sum, float("nan"))


# -- one entry, once both normalisers are known --------------------------------------------------


@triton.jit
def student_probability(z, row, constants):
    x = z.to(tl.float32) - row.student_max
    return tl.exp2(x * constants.scale - row.student_lse * LOG2E)


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
        log_p = (z.to(tl.float32) - row.student_max) * constants.inv_t - row.student_lse
        log_ratio = tl.minimum(log_ratio, tl.maximum(log_p - constants.floor, LOWEST))
        q = tl.maximum(q, tl.exp2(constants.floor * LOG2E))
    if GUARDED:
        q = tl.where(z.to(tl.float32) > LOWEST, q, 0.0)
    return p, q, log_ratio


@triton.jit
def slope(log_ratio, parameter, DIVERGENCE: tl.constexpr):
    """u of the slope s = dt/dlog p = p u + v of each entry's term t.

    Up to a constant, which no logit gradient sees.
    """
    u = 0.0
    if needs_student_d(DIVERGENCE):
        u = log_ratio
    elif DIVERGENCE == "jsd":
        u = (parameter - 1.0) * jsd_log_ratio(log_ratio, parameter)
    return u


@triton.jit
def teacher_slope(q, DIVERGENCE: tl.constexpr):
    """v of the slope s = p u + v."""
    v = 0.0
    if needs_teacher_d(DIVERGENCE):
        v = -q
    return v


@triton.jit
def excess(log_ratio):
    """exp(-l) - 1 + l for |l| < 0.5, by its series: the difference itself would cancel."""
    series = 1.0 / 40320 - log_ratio * (1.0 / 362880)
    series = 1.0 / 5040 - log_ratio * series
    series = 1.0 / 720 - log_ratio * series
    series = 1.0 / 120 - log_ratio * series
    series = 1.0 / 24 - log_ratio * series
    series = 1.0 / 6 - log_ratio * series
    series = 0.5 - log_ratio * series
    return series * log_ratio * log_ratio


@triton.jit
def terms(p, q, log_ratio, parameter, DIVERGENCE: tl.constexpr):
    """t of each entry: the divergence is their sum."""
    if DIVERGENCE == "reverse_kl":
        t = p * log_ratio
    elif DIVERGENCE == "forward_kl":
        t = -q * tl.minimum(log_ratio, -LOWEST)
    elif DIVERGENCE == "jeffreys":
        t = (p - q) * log_ratio
    else:
        log_m_over_p = jsd_log_ratio(log_ratio, parameter)
        below = tl.minimum(log_ratio, -LOWEST)
        t = (parameter - 1.0) * p * log_m_over_p - parameter * q * (below + log_m_over_p)
    return t


@triton.jit
def jsd_log_ratio(log_ratio, beta):
    """log(m/p) = log(beta e^-l + 1 - beta).

    Near p = q it is a series in l, whose first term carries the relative precision: the cumulants
    of a coin that falls to 1 with probability beta. Elsewhere it is taken from the side where the
    exponential is at most 1.
    """
    v = beta * (1.0 - beta)
    skew = 1.0 - 2.0 * beta
    t = -log_ratio
    series = v * (1.0 - v * (126.0 - v * (1680.0 - 5040.0 * v))) / 40320.0
    series = v * skew * (1.0 - v * (60.0 - 360.0 * v)) / 5040.0 + t * series
    series = v * (1.0 - v * (30.0 - 120.0 * v)) / 720.0 + t * series
    series = v * skew * (1.0 - 12.0 * v) / 120.0 + t * series
    series = v * (1.0 - 6.0 * v) / 24.0 + t * series
    series = v * skew / 6.0 + t * series
    series = v * 0.5 + t * series
    series = t * (beta + t * series)
    near = tl.where(log_ratio > 0.0, 1.0 - beta, beta)
    ratio = near + (1.0 - near) * tl.exp2(-tl.abs(log_ratio) * LOG2E)
    far = _fast_log2(ratio) * LN2 - tl.minimum(log_ratio, 0.0)
    return tl.where(tl.abs(log_ratio) < 0.5, series, far)


@triton.jit
def _fast_log2(x):
    """log2 of positive normal numbers with an absolute error of 2^-22, where the GPU has one."""
    if INTERPRETED:
        return tl.log2(x)
    elif target_info.is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def small_terms(p, q, raw_q, log_ratio, DIVERGENCE: tl.constexpr):
    """Terms whose sum is a KL as a sum of positive numbers: right where p is close to q.

    The identities sum p = sum q = 1 behind this form must hold: so an entry that takes no part
    (z = -inf) gives back the teacher's mass there, and a raised one the mass it was raised by.
    """
    near = tl.abs(log_ratio) < 0.5
    bounded = tl.where(near, log_ratio, 0.0)
    far = tl.where(near, 0.0, log_ratio)
    missing = raw_q - q
    if DIVERGENCE == "reverse_kl":
        t = tl.where(near, p * excess(bounded), q - p + p * far) + missing
    elif DIVERGENCE == "forward_kl":
        t = tl.where(near, q * excess(-bounded), p - q - q * tl.minimum(far, -LOWEST)) - missing
    else:
        t = tl.where(near, p * (bounded - excess(bounded)) * bounded, (p - q) * far)
    return t


@triton.jit
def value_and_slope(
    zs,
    ws,
    row,
    constants,
    CHUNKS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A tile's part of the divergence and of the sum of slopes, both normalisers known."""
    value, slopes = _values_and_slopes(zs[0], ws[0], row, constants, HAS_FLOOR, DIVERGENCE)
    for i in tl.static_range(1, CHUNKS):
        t, s = _values_and_slopes(zs[i], ws[i], row, constants, HAS_FLOOR, DIVERGENCE)
        value += t
        slopes += s
    return sum_2(value, slopes)


@triton.jit
def _values_and_slopes(z, w, row, constants, HAS_FLOOR: tl.constexpr, DIVERGENCE: tl.constexpr):
    p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR)
    t = terms(p, q, log_ratio, constants.parameter, DIVERGENCE)
    s = p * slope(log_ratio, constants.parameter, DIVERGENCE) + teacher_slope(q, DIVERGENCE)
    return t, s


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
    value = _small_values(zs[0], ws[0], row, constants, HAS_FLOOR, DIVERGENCE)
    for i in tl.static_range(1, CHUNKS):
        value += _small_values(zs[i], ws[i], row, constants, HAS_FLOOR, DIVERGENCE)
    return tl.sum(value, 0)


@triton.jit
def _small_values(z, w, row, constants, HAS_FLOOR: tl.constexpr, DIVERGENCE: tl.constexpr):
    p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR)
    return small_terms(p, q, teacher_probability(w, row, constants), log_ratio, DIVERGENCE)


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
        p, q, log_ratio = point(z, w, row, constants, HAS_FLOOR, GUARDED)
        if needs_student_d(DIVERGENCE) and not HAS_FLOOR:
            # u = l: what is the same for all entries is added once.
            constant = weights.divergence * (row.shift - row.slope_sum)
            inner += tl.where(silent, 0.0, constant)
            d = difference(z, w, row.student_max, row.teacher_max, GUARDED)
            own = (weights.divergence * constants.inv_t) * d
        else:
            u = slope(log_ratio, constants.parameter, DIVERGENCE)
            own = weights.divergence * (u - row.slope_sum)
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
        if needs_teacher_d(DIVERGENCE):
            own = weights.divergence * teacher_slope(q, DIVERGENCE)
            if GUARDED:
                own = tl.where(silent, 0.0, own)
            gradient += own
    return gradient
