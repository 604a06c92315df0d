"""The divergences, entry by entry, and the functions that they are made of.

Of one entry p, q and l = log p - log q are given. A divergence is a sum of terms t; its logit
gradient follows from their slopes s = dt/dlog p as s_v - p_v sum s. `reference.py` has the values
that these must give, `math.py` the sums over a row and the conventions for entries that take no
part.
"""

import triton
import triton.language as tl
from triton.language import target_info

from hybrid_kernels import divergences, rows
from hybrid_kernels.kernels.reduce import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(rows.LOWEST)
# Where a running maximum starts: finite, so that differences with it are never inf - inf.
START = tl.constexpr(-3.4028234663852886e38)


@triton.constexpr_function
def needs_student_d(divergence):
    return divergence in ("reverse_kl", "jeffreys")


@triton.constexpr_function
def needs_teacher_d(divergence):
    return divergence in ("forward_kl", "jeffreys")


@triton.constexpr_function
def is_alpha(divergence):
    return divergence in ("alpha", "renyi")


@triton.constexpr_function
def has_v(divergence):
    return divergence in ("forward_kl", "jeffreys", "alpha", "renyi")


@triton.constexpr_function
def has_small_terms(divergence):
    return divergences.FAMILIES[divergence].one_sweep


@triton.jit
def slopes(p, q, log_p, log_ratio, log_s, parameter, DIVERGENCE: tl.constexpr):
    """u and v of the slope s = dt/dlog p = p u + v of each entry's term t.

    u up to a constant, which no logit gradient sees: it is chosen such that u is 0 where p = q, for
    a difference of numbers around 1 would have lost its digits there. `log_p` and `log_s` are for
    Renyi's divergence alone.
    """
    u = tl.zeros_like(log_ratio)
    v = u
    if needs_student_d(DIVERGENCE):
        u = log_ratio
    elif DIVERGENCE == "jsd":
        u = (parameter - 1.0) * mixture_log_ratio(log_ratio, parameter)
    elif DIVERGENCE == "skew_reverse_kl":
        log_p_over_m = -mixture_log_ratio(log_ratio, 1.0 - parameter)
        u = log_p_over_m - parameter * expm1(log_p_over_m)
    elif DIVERGENCE == "skew_forward_kl":
        log_q_over_m = -(log_ratio + mixture_log_ratio(log_ratio, parameter))
        u = (parameter - 1.0) * expm1(log_q_over_m)
    elif is_alpha(DIVERGENCE):
        # (p^a q^(1-a) / S - p) over a-1, from p as long as the ratio of the two is no large number.
        exponent = (parameter - 1.0) * log_ratio - log_s
        plain = tl.abs(exponent) < 30.0
        factor = 1.0 / (parameter - 1.0)
        if DIVERGENCE == "renyi":
            factor *= parameter
            whole = tl.exp2((log_p + exponent) * LOG2E)
        else:
            whole = geometric(p, q, log_ratio, parameter)
        u = factor * tl.where(plain, expm1(tl.where(plain, exponent, 0.0)), -1.0)
        v = factor * tl.where(plain, 0.0, whole)
    elif DIVERGENCE == "tv":
        u = tl.where(log_ratio > 0.0, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0))
    if needs_teacher_d(DIVERGENCE):
        v = -q
    return u, v


@triton.jit
def terms(p, q, raw_q, log_ratio, parameter, DIVERGENCE: tl.constexpr):
    """t of each entry: the divergence is their sum. `raw_q` is the teacher's own probability, q
    that of an entry which takes part, raised to the floor."""
    if DIVERGENCE == "reverse_kl":
        t = p * log_ratio
    elif DIVERGENCE == "forward_kl":
        t = -q * tl.minimum(log_ratio, -LOWEST)
    elif DIVERGENCE == "jeffreys":
        t = (p - q) * log_ratio
    elif DIVERGENCE == "jsd":
        log_m_over_p = mixture_log_ratio(log_ratio, parameter)
        below = tl.minimum(log_ratio, -LOWEST)
        t = (parameter - 1.0) * p * log_m_over_p - parameter * q * (below + log_m_over_p)
    elif DIVERGENCE == "skew_reverse_kl":
        t = -p * mixture_log_ratio(log_ratio, 1.0 - parameter)
    elif DIVERGENCE == "skew_forward_kl":
        below = tl.minimum(log_ratio, -LOWEST)
        t = -q * (below + mixture_log_ratio(log_ratio, parameter))
    elif DIVERGENCE == "renyi":
        exponent = (parameter - 1.0) * log_ratio
        plain = tl.abs(exponent) < 30.0
        t = p * expm1(tl.where(plain, exponent, 0.0))
        t = tl.where(plain, t, geometric(p, q, log_ratio, parameter) - p)
    elif DIVERGENCE == "alpha":
        # a p + (1-a) q - p^a q^(1-a) over a (1-a): positive, and of sum (1 - S)/(a (1-a)). With
        # x = -|l| that is c (e^x - 1) - (e^(cx) - 1) times the larger of p and q, where c is a or
        # 1-a; near x = 0 less the parts of first order, which cancel.
        below = log_ratio < 0.0
        base = tl.where(below, q, p)
        c = tl.where(below, parameter, 1.0 - parameter)
        x = -tl.abs(log_ratio)
        near = tl.maximum(tl.abs(x), tl.abs(c * x)) < 0.5
        bounded = tl.where(near, x, 0.0)
        t = c * expm1(x) - expm1(c * x)
        t = tl.where(near, c * excess(-bounded) - excess(-c * bounded), t)
        t = tl.where(base > 0.0, base * t, 0.0)
        # Where the teacher forbids an entry, however small p, there is no limit for a > 1.
        endless = tl.where(parameter > 1.0, -float("inf"), t)
        t = tl.where(log_ratio > -LOWEST * 0.5, endless, t) / (parameter * (1.0 - parameter))
        t += (raw_q - q) / parameter
    else:
        near = tl.abs(log_ratio) < 0.5
        bounded = tl.where(near, log_ratio, 0.0)
        t = 0.5 * tl.where(near, p * tl.abs(excess(bounded) - bounded), tl.abs(p - q))
    return t


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
def together(a, b, DIVERGENCE: tl.constexpr):
    """What `value_and_slope` tells second, of two parts as one."""
    if DIVERGENCE == "renyi":
        top = tl.maximum(a, b)
        low = tl.minimum(a, b)
        added = top + log1p(tl.exp2(tl.where(low > -float("inf"), low - top, low) * LOG2E))
        return tl.where(low > -float("inf"), added, top)
    else:
        return a + b


@triton.jit
def all_together(x, DIVERGENCE: tl.constexpr):
    """The same of a whole tensor."""
    if DIVERGENCE == "renyi":
        return log_sum_exp(x)
    else:
        return tl.sum(x, 0)


@triton.jit
def nothing(DIVERGENCE: tl.constexpr):
    """The same of no entry at all."""
    if DIVERGENCE == "renyi":
        return tl.full((), -float("inf"), tl.float32)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def geometric(p, q, log_ratio, a):
    """p^a q^(1-a), from the side on which the exponential of 0 < a < 1 is at most 1."""
    below = log_ratio < 0.0
    base = tl.where(below, q, p)
    power = tl.exp2(tl.where(below, a, a - 1.0) * log_ratio * LOG2E)
    product = tl.where(base > 0.0, base * power, 0.0)
    # Where the teacher forbids an entry, however small p, a limit that no product has.
    forbidden = tl.where(a > 1.0, float("inf"), 0.0)
    return tl.where(log_ratio > -LOWEST * 0.5, forbidden, product)


@triton.jit
def mixture_log_ratio(log_ratio, beta):
    """log(m/p) = log(beta e^-l + 1 - beta), with m = beta q + (1-beta) p.

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
def expm1(x):
    """e^x - 1."""
    near = tl.abs(x) < 0.5
    bounded = tl.where(near, x, 0.0)
    return tl.where(near, bounded + excess(-bounded), tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), with the relative precision of a small x."""
    s = x / (2.0 + x)
    s2 = s * s
    near = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0))))
    return tl.where(tl.abs(x) < 0.2, near, tl.log(1.0 + x))


@triton.jit
def log_sum_exp(x):
    """log sum e^x; -inf of nothing."""
    top = tl.max(x, 0)
    bounded = tl.minimum(tl.maximum(top, START), -START)
    total = tl.sum(tl.exp2((x - bounded) * LOG2E), 0)
    return tl.where(top == float("inf"), top, bounded + tl.log(total))
