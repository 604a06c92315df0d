"""The divergences, entry by entry, and the functions that they are built from.

A divergence is a sum of terms t over the entries of a row; its logit gradient follows from their
slopes s = dt/dlog p as s_v - p_v sum s. Each divergence is one function, which a kernel takes as a
constexpr parameter: (entry, parameter, log_s, SMALL) -> (t, u, v) with s = p u + v.

- u is defined up to a constant, on which no logit gradient depends. It is chosen so that u = 0
  where p = q: a difference of numbers near 1 would have lost its digits there.
- `log_s` is for Renyi's divergence: log sum p^a q^(1-a) of the whole row.
- SMALL asks the KL family for terms whose sum is accurate even where p is close to q.
- Logits may be -inf, or so low that l is infinite or, where both are, NaN. What has a limit is
  computed from the larger of p and q, with l bounded. Without a limit, p l and q l are 0 if the
  probability is 0 (`LEAST`), otherwise infinite or NaN, see `sums.settle`.

A kernel uses some of the three results, and the compiler removes the cost of the others.
`reference.py` has the right values, `sums.py` the conventions for entries that do not count.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import target_info

from hybrid_kernels import rows
from hybrid_kernels.triton_backend.reduce import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(rows.LOWEST)
LEAST = tl.constexpr(rows.LEAST)
# How many nats a unit of `Entry.scaled` is.
NATS = tl.constexpr(2.0**28)
# Where a running maximum starts: finite, so that differences with it are never inf - inf.
START = tl.constexpr(-3.4028234663852886e38)


class Entry(NamedTuple):
    """Entries of both distributions.

    p, q: probabilities; q is raised to the teacher's floor.
    raw_q: the teacher's own probability.
    log_p, log_q: their logarithms.
    log_ratio: l = log p - log q; NaN where both are -inf.
    scaled: the same in units of 2^28 nats, finite for all finite logits.
    """

    p: tl.tensor
    q: tl.tensor
    raw_q: tl.tensor
    log_p: tl.tensor
    log_q: tl.tensor
    log_ratio: tl.tensor
    scaled: tl.tensor


@triton.jit
def reverse_kl(entry, parameter, log_s, SMALL: tl.constexpr):
    p, log_ratio = entry.p, tl.where(entry.log_p > LEAST, entry.log_ratio, 0.0)
    t = _times(entry, p, entry.log_p)
    if SMALL:
        near, close = _near(entry)
        missing = entry.raw_q - entry.q
        t = tl.where(near, p * excess(close), entry.q - p + t) + missing
    return t, log_ratio, tl.zeros_like(log_ratio)


@triton.jit
def forward_kl(entry, parameter, log_s, SMALL: tl.constexpr):
    p, q = entry.p, entry.q
    t = -_times(entry, q, entry.log_q)
    if SMALL:
        near, close = _near(entry)
        missing = entry.raw_q - q
        t = tl.where(near, q * excess(-close), p - q + t) - missing
    return t, tl.zeros_like(entry.log_ratio), -q


@triton.jit
def _times(entry, probability, log_probability):
    """A probability times l, which may be finite even where l overflows."""
    return tl.where(log_probability > LEAST, probability * NATS * entry.scaled, 0.0)


@triton.jit
def jeffreys(entry, parameter, log_s, SMALL: tl.constexpr):
    p, q = entry.p, entry.q
    t, log_ratio, _ = reverse_kl(entry, parameter, log_s, False)
    t -= _times(entry, q, entry.log_q)
    if SMALL:
        near, close = _near(entry)
        t = tl.where(near, p * (close - excess(close)) * close, t)
    return t, log_ratio, -q


@triton.jit
def _near(entry):
    """Which log-ratios are near 0, and their values (0 for the others).

    The terms of a small KL are made positive by sum p = sum q = 1, so an entry raised to the floor
    must subtract the added mass.
    """
    near = tl.abs(entry.log_ratio) < 0.5
    return near, tl.where(near, entry.log_ratio, 0.0)


@triton.jit
def jsd(entry, beta, log_s, SMALL: tl.constexpr):
    log_m_over_p, log_m_over_q = mixture_log_ratios(entry, beta)
    t = (beta - 1.0) * entry.p * log_m_over_p - beta * entry.q * log_m_over_q
    return t, (beta - 1.0) * log_m_over_p, tl.zeros_like(entry.p)


@triton.jit
def skew_reverse_kl(entry, alpha, log_s, SMALL: tl.constexpr):
    log_m_over_p, _ = mixture_log_ratios(entry, 1.0 - alpha)
    u = -log_m_over_p - alpha * expm1(-log_m_over_p)
    return -entry.p * log_m_over_p, u, tl.zeros_like(entry.p)


@triton.jit
def skew_forward_kl(entry, alpha, log_s, SMALL: tl.constexpr):
    _, log_m_over_q = mixture_log_ratios(entry, alpha)
    u = (alpha - 1.0) * expm1(-log_m_over_q)
    return -entry.q * log_m_over_q, u, tl.zeros_like(entry.p)


@triton.jit
def alpha(entry, a, log_s, SMALL: tl.constexpr):
    # t is a p + (1-a) q - p^a q^(1-a) over a (1-a): positive, with the sum (1 - S)/(a (1-a)). For
    # x = -|l| this is c (e^x - 1) - (e^(cx) - 1) times the larger of p and q, where c is a or 1-a.
    # Near x = 0 the first-order parts, which cancel, are omitted.
    p, q = entry.p, entry.q
    log_ratio = _zero_of_none(entry.log_ratio)
    below = log_ratio < 0.0
    base = tl.where(below, q, p)
    c = tl.where(below, a, 1.0 - a)
    x = -tl.abs(log_ratio)
    near = tl.maximum(tl.abs(x), tl.abs(c * x)) < 0.5
    close = tl.where(near, x, 0.0)
    whole = _geometric(entry, base, a)
    t = c * (tl.where(below, p, q) - base) - (whole - base)
    t = tl.where(near, base * (c * excess(-close) - excess(-c * close)), t) / (a * (1.0 - a))
    t += (entry.raw_q - q) / a
    # The slope is (p^a q^(1-a) - p) / (a-1).
    exponent = (a - 1.0) * log_ratio
    u, v = _tilted_slope(exponent, whole, 1.0 / (a - 1.0))
    return t, u, v


@triton.jit
def renyi(entry, a, log_s, SMALL: tl.constexpr):
    # t is p^a q^(1-a) - p, with the sum S - 1.
    exponent = (a - 1.0) * tl.maximum(entry.log_ratio, LOWEST)
    plain = tl.abs(exponent) < 30.0
    t = entry.p * expm1(tl.where(plain, exponent, 0.0))
    t = tl.where(plain, t, tl.exp2(log_geometric(entry, a) * LOG2E) - entry.p)
    # The slope is (p^a q^(1-a) / S - p) a/(a-1).
    exponent = exponent - log_s
    # At most 1, even if large logarithms were rounded up.
    whole = tl.exp2(tl.minimum(log_geometric(entry, a) - log_s, 0.0) * LOG2E)
    u, v = _tilted_slope(exponent, whole, a * (1.0 / (a - 1.0)))
    return t, u, v


@triton.jit
def _tilted_slope(exponent, whole, factor):
    """u and v of (whole - p) factor, where whole = p e^exponent, computed from p unless the ratio
    of the two is extreme."""
    plain = tl.abs(exponent) < 30.0
    u = factor * tl.where(plain, expm1(tl.where(plain, exponent, 0.0)), -1.0)
    return u, factor * tl.where(plain, 0.0, whole)


@triton.jit
def tv(entry, parameter, log_s, SMALL: tl.constexpr):
    p, q, log_ratio = entry.p, entry.q, entry.log_ratio
    near, close = _near(entry)
    t = 0.5 * tl.where(near, p * tl.abs(excess(close) - close), tl.abs(p - q))
    u = tl.where(log_ratio > 0.0, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0))
    return t, u, tl.zeros_like(p)


# -- sums of slopes ------------------------------------------------------------------------------
# The slopes of Renyi's divergence sum to 0; log S, a log-sum-exp, takes the place of their sum.


@triton.jit
def together(a, b, P: tl.constexpr):
    """The sum of slopes of two parts of a row."""
    if P.tilted:
        top = tl.maximum(a, b)
        low = tl.minimum(a, b)
        added = top + log1p(tl.exp2(tl.where(low > -float("inf"), low - top, low) * LOG2E))
        return tl.where((low > -float("inf")) & (low < float("inf")), added, top)
    else:
        return a + b


@triton.jit
def all_together(x, P: tl.constexpr):
    """The sum of slopes of all parts."""
    if P.tilted:
        return log_sum_exp(x)
    else:
        return tl.sum(x, 0)


@triton.jit
def no_slopes(P: tl.constexpr):
    """The sum of slopes of no entries."""
    if P.tilted:
        return tl.full((), -float("inf"), tl.float32)
    else:
        return tl.full((), 0.0, tl.float32)


# -- functions of one number ---------------------------------------------------------------------


@triton.jit
def _zero_of_none(log_ratio):
    """l, and 0 where both sides are -inf."""
    return tl.where(log_ratio == log_ratio, log_ratio, 0.0)


@triton.jit
def log_geometric(entry, a):
    """log p^a q^(1-a) for a > 0; -inf where p = 0."""
    # l is bounded, so that its -inf never meets the -inf of log p.
    exponent = entry.log_p + (a - 1.0) * tl.maximum(entry.log_ratio, START)
    return tl.maximum(exponent, -float("inf"))  # the maximum drops NaN


@triton.jit
def _geometric(entry, larger, a):
    """p^a q^(1-a) for any a, from the larger of p and q: what is added to its logarithm is then at
    most 0 for 0 < a < 1. Where the larger one underflows, from its logarithm."""
    log_ratio = _zero_of_none(entry.log_ratio)
    below = log_ratio < 0.0
    log_larger = tl.maximum(tl.where(below, entry.log_q, entry.log_p), LOWEST)
    added = tl.where(below, a, a - 1.0) * log_ratio
    is_number = (larger > 1e-30) & (added < 80.0)
    exponent = tl.where(is_number, 0.0, log_larger) + added
    return tl.where(is_number, larger, 1.0) * tl.exp2(exponent * LOG2E)


@triton.jit
def mixture_log_ratios(entry, beta):
    """log(m/p) and log(m/q) of m = beta q + (1-beta) p, from the larger of p and q.

    For the larger it is s = log(c e^-|l| + 1 - c), where c is the weight of the smaller. For the
    smaller it is |l| + s, from which s could not be recovered where l is large.

    Near p = q both come from a series in l, whose first term keeps the relative precision: its
    coefficients are the cumulants of a Bernoulli variable of mean beta.
    """
    # This also replaces NaN, for which neither result is used.
    log_ratio = tl.maximum(entry.log_ratio, LOWEST)
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
    c = tl.where(log_ratio > 0.0, beta, 1.0 - beta)
    distance = tl.abs(log_ratio)
    series = distance * (distance * series - c)
    far = fast_log2(1.0 - c + c * tl.exp2(-distance * LOG2E)) * LN2
    s = tl.where(distance < 0.5, series, far)
    above = tl.maximum(tl.minimum(log_ratio, -LOWEST), 0.0)
    return s - tl.minimum(log_ratio, 0.0), s + above


@triton.jit
def fast_log2(x):
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
    """exp(-l) - 1 + l for |l| < 0.5, by its series, because the difference would cancel."""
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
    """log sum e^x; -inf for no terms."""
    top = tl.max(x, 0)
    bounded = tl.minimum(tl.maximum(top, START), -START)
    total = tl.sum(tl.exp2((x - bounded) * LOG2E), 0)
    return tl.where(top == float("inf"), top, bounded + tl.log(total))
