"""The mathematics of the row kernels, written once, in small functions without a memory access.

Notation, per row: z and w the logits of student and teacher, m and m_w their maxima, p and q the
softmaxes at temperature T, l = log p - log q. Conventions:

- Exponentials are base 2 of `difference * scale` with scale = log2(e)/T. The difference is taken
  first: scaling z and m separately would cost four digits at |z| = 1e4.
- Lanes outside the vocabulary hold -inf on both sides, and then add 0 to every sum.
- An entry with z = -inf takes no part in a divergence. In place of -inf a log-ratio holds `LOWEST`,
  because 0 * -inf would be NaN.
"""

import triton
import triton.language as tl

from hybrid_kernels import rows

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(rows.LOWEST)
# Where a running maximum starts: finite, so that differences with it are never inf - inf.
START = tl.constexpr(-3.4028234663852886e38)


# -- the log-ratio ------------------------------------------------------------------------------


@triton.jit
def offsets(student_max, teacher_max):
    """What to take off each side before subtracting them, and what is left of m - m_w after that.

    z - w is exact for close numbers, where z - m and w - m_w would each be rounded. So the integer
    part of m - m_w is taken off the larger side first (a large offset between the models must not
    cost digits either), and the rest of it last.
    """
    coarse = tl.floor(student_max - teacher_max + 0.5)
    larger = tl.abs(student_max) > tl.abs(teacher_max)
    off_student = tl.where(larger, coarse, 0.0)
    off_teacher = tl.where(larger, 0.0, -coarse)
    return off_student, off_teacher, (student_max - off_student) - (teacher_max - off_teacher)


@triton.jit
def difference(z, w, student_max, teacher_max):
    """(z - m) - (w - m_w), and `LOWEST` for an entry that takes no part."""
    off_student, off_teacher, rest = offsets(student_max, teacher_max)
    d = (z - off_student) - (w - off_teacher) - rest
    return tl.where(z == -float("inf"), LOWEST, d)


# -- one online sweep ---------------------------------------------------------------------------


@triton.jit
def start_sweep():
    """The running sums of a row before its first tile; see `online_step`."""
    top = tl.full((), START, tl.float32)
    zero = tl.full((), 0.0, tl.float32)
    return top, top, zero, zero, zero, zero, zero, zero


@triton.jit
def online_step(
    z,
    w,
    student_max,
    teacher_max,
    student_sum,
    teacher_sum,
    student_x,
    student_d,
    teacher_d,
    teacher_kept,
    scale,
    HAS_TEACHER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Adds one tile to the running sums. With x = z - m and d = (z - m) - (w - m_w) they are

    student_sum = sum e^x        student_x = sum e^x x       student_d = sum e^x d
    teacher_sum = sum e^(w-m_w)  teacher_d = sum e^(w-m_w) d  teacher_kept = sum over z > -inf

    (exponents divided by T). When a maximum moves, d moves by `delta` and the weights by a factor:
    sum' = factor * (sum + weight * delta).
    """
    new_max = tl.maximum(student_max, tl.max(z, 0))
    factor = tl.exp2((student_max - new_max) * scale)
    step = tl.maximum(student_max - new_max, LOWEST)
    x = z - new_max
    e = tl.exp2(x * scale)
    if HAS_TEACHER:
        new_teacher_max = tl.maximum(teacher_max, tl.max(w, 0))
        teacher_factor = tl.exp2((teacher_max - new_teacher_max) * scale)
        teacher_step = tl.maximum(teacher_max - new_teacher_max, LOWEST)
        f = tl.exp2((w - new_teacher_max) * scale)
        d = difference(z, w, new_max, new_teacher_max)
        delta = step - teacher_step
        if DIVERGENCE == "reverse_kl" or DIVERGENCE == "jeffreys":
            student_d = factor * (student_d + student_sum * delta) + tl.sum(e * d, 0)
        if DIVERGENCE == "forward_kl" or DIVERGENCE == "jeffreys":
            f_kept = tl.where(z == -float("inf"), 0.0, f)
            # q = 0 where the teacher forbids a token: its 0 * inf counts as 0.
            below = tl.minimum(d, -LOWEST)
            teacher_d = teacher_factor * (teacher_d + teacher_kept * delta)
            teacher_d += tl.sum(f_kept * below, 0)
            teacher_kept = teacher_factor * teacher_kept + tl.sum(f_kept, 0)
        teacher_sum = teacher_factor * teacher_sum + tl.sum(f, 0)
        teacher_max = new_teacher_max
    student_x = factor * (student_x + student_sum * step) + tl.sum(e * tl.maximum(x, LOWEST), 0)
    student_sum = factor * student_sum + tl.sum(e, 0)
    return (
        new_max,
        teacher_max,
        student_sum,
        teacher_sum,
        student_x,
        student_d,
        teacher_d,
        teacher_kept,
    )


@triton.jit
def log_sum(total):
    """log of a sum of exponentials; NaN for the empty sum of a row of -inf, and for a NaN."""
    return tl.where(total > 0.0, tl.log(total), float("nan"))


@triton.jit
def swept_divergence(
    student_sum,
    teacher_sum,
    student_d,
    teacher_d,
    teacher_kept,
    shift,
    inv_t,
    DIVERGENCE: tl.constexpr,
):
    """Value and sum of slopes from the sums of one sweep; shift = log-sum of w minus that of z."""
    reverse = student_d / student_sum * inv_t + shift
    kept = teacher_kept / teacher_sum
    forward = -(teacher_d / teacher_sum * inv_t + shift * kept)
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
    """What the edge cases make of a row's sums; `shift` is the difference of the log-sums.

    +inf where the teacher forbids what the student may say: there 0 * inf may have made a NaN,
    which with both normalisers sound can mean nothing else. NaN where a normaliser is not sound,
    even if a minimum or maximum has dropped the NaN of an entry.
    """
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "jeffreys":
        infinite = (value != value) | (value == float("inf"))
        value = tl.where(infinite, float("inf"), value)
        slope_sum = tl.where(infinite, float("inf"), slope_sum)
    sound = shift == shift
    return tl.where(sound, value, float("nan")), tl.where(sound, slope_sum, float("nan"))


# -- one entry, once both normalisers are known --------------------------------------------------


@triton.jit
def point(
    z,
    w,
    student_max,
    teacher_max,
    student_lse,
    teacher_lse,
    inv_t,
    scale,
    floor,
    HAS_FLOOR: tl.constexpr,
):
    """p, q and l of each entry; q = 0 for an entry that takes no part."""
    p = tl.exp2((z - student_max) * scale - student_lse * LOG2E)
    q = tl.exp2((w - teacher_max) * scale - teacher_lse * LOG2E)
    log_ratio = difference(z, w, student_max, teacher_max) * inv_t + (teacher_lse - student_lse)
    if HAS_FLOOR:
        log_p = (z - student_max) * inv_t - student_lse
        log_ratio = tl.minimum(log_ratio, tl.maximum(log_p - floor, LOWEST))
        q = tl.maximum(q, tl.exp2(floor * LOG2E))
    q = tl.where(z == -float("inf"), 0.0, q)
    return p, q, log_ratio


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
def log1p(y):
    """log(1 + y) for -1 <= y <= 0, with the rounding of 1 + y made good."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def slopes(p, q, log_ratio, parameter, DIVERGENCE: tl.constexpr):
    """s = dt/dlog p of each entry's term t, up to a multiple of p, which no logit gradient sees."""
    if DIVERGENCE == "reverse_kl":
        s = p * log_ratio
    elif DIVERGENCE == "forward_kl":
        s = -q
    elif DIVERGENCE == "jeffreys":
        s = p * log_ratio - q
    else:
        s = (parameter - 1.0) * p * jsd_log_ratio(log_ratio, parameter)
    return s


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
    """log(m/p) = log(beta e^-l + 1 - beta), from the side where the exponential is at most 1."""
    a = tl.minimum(tl.abs(log_ratio), -LOWEST)
    expm1 = tl.where(a < 0.5, excess(a) - a, tl.exp2(-a * LOG2E) - 1.0)
    weight = tl.where(log_ratio > 0.0, beta, 1.0 - beta)
    return log1p(weight * expm1) - tl.minimum(log_ratio, 0.0)


@triton.jit
def small_terms(z, p, q, raw_q, log_ratio, DIVERGENCE: tl.constexpr):
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
def logit_gradient(
    p,
    s,
    x,
    slope_sum,
    student_lse,
    entropy,
    c_div,
    c_logp,
    c_ent,
    inv_t,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """c_div (s - p sum s) - c_logp p - c_ent p (log p + H): all but the sampled token's 1[v = y].

    The coefficients already hold the 1/T of every logit gradient.
    """
    inner = -c_logp
    if HAS_DIVERGENCE:
        # A weight of 0 leaves nothing of an infinite divergence.
        inner -= tl.where(c_div == 0.0, 0.0, c_div * slope_sum)
    if HAS_ENTROPY:
        inner += c_ent * (student_lse - entropy)
        inner -= c_ent * tl.maximum(x * inv_t, LOWEST)
    gradient = p * inner
    if HAS_DIVERGENCE:
        gradient += tl.where(c_div == 0.0, 0.0, c_div * s)
    return gradient
