"""Entries of a row whose normalisers are known: probabilities, values and slopes.

The conventions of `sums.py` apply.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.divergences import (
    LOG2E,
    Entry,
    all_together,
    log_geometric,
    together,
)
from hybrid_kernels.triton_backend.reduce import sum_each
from hybrid_kernels.triton_backend.sums import (
    Statistics,
    centred,
    difference,
    nats,
    total_of,
    unit,
)


@triton.jit
def student_probability(z, stat, constants):
    x = centred(z, stat.student_max)
    return tl.exp2(x * (constants.scale * nats(True)) - stat.student_lse * LOG2E)


@triton.jit
def student_log_prob(z, stat, constants):
    x = centred(z, stat.student_max)
    return x * (constants.inv_t * nats(True)) - stat.student_lse


@triton.jit
def entry_of(z, w, stat, constants, P: tl.constexpr):
    """What a divergence needs of an entry."""
    inv_t = constants.inv_t * nats(True)
    p = student_probability(z, stat, constants)
    log_p = student_log_prob(z, stat, constants)
    u = centred(w, stat.teacher_max)
    raw_q = tl.exp2(u * (constants.scale * nats(True)) - stat.teacher_lse * LOG2E)
    q = raw_q
    log_q = u * inv_t - stat.teacher_lse
    d = difference(z, w, stat.student_max, stat.teacher_max)
    log_ratio = d * inv_t + stat.shift
    scaled = d * constants.inv_t + stat.shift * unit(True)
    if P.floor:
        # The floor does not apply where both sides are -inf.
        x = centred(z, stat.student_max)
        some = (x > -float("inf")) | (u > -float("inf"))
        q = tl.where(some, tl.maximum(q, tl.exp2(constants.floor * LOG2E)), 0.0)
        log_q = tl.where(some, tl.maximum(log_q, constants.floor), log_q)
        log_ratio = tl.where(some, tl.minimum(log_ratio, log_p - constants.floor), float("nan"))
        least = x * constants.inv_t - (stat.student_lse + constants.floor) * unit(True)
        scaled = tl.minimum(scaled, least)
    return Entry(p, q, raw_q, log_p, log_q, log_ratio, scaled)


@triton.jit
def _term_and_slope(
    tile, i: tl.constexpr, stats, constants, P: tl.constexpr, D: tl.constexpr, SMALL: tl.constexpr
):
    """t and s of each entry; for Renyi, s is the exponent whose log-sum-exp is log S."""
    entry = entry_of(tile[0], tile[1][i], Statistics(*stats[i]), constants, P)
    parameter = constants.parameter
    t, u, v = D(entry, parameter, 0.0, SMALL)
    s = entry.p * u + v
    if P.tilted:
        s = log_geometric(entry, parameter)
    return t, s


@triton.jit
def values_and_slopes(
    tile, stats, constants, P: tl.constexpr, D: tl.constexpr, SMALL: tl.constexpr = False
):
    """What a tile adds to each member's divergence and sum of slopes, once all normalisers are
    known; under SMALL the divergence is accurate even if it is small."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(stats)):
        t, s = _term_and_slope(tile, i, stats, constants, P, D, SMALL)
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
    """The results of `values_and_slopes` for two parts together."""
    values = ()
    slopes = ()
    for i in tl.static_range(len(a[0])):
        values = values + (a[0][i] + b[0][i],)
        slopes = slopes + (together(a[1][i], b[1][i], P),)
    return values, slopes


@triton.jit
def small_value(tile, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """What a tile adds to a small weighted sum of divergences."""
    total = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(stats)):
        t, _ = _term_and_slope(tile, i, stats, constants, P, D, True)
        total += constants.shares[i] * tl.sum(t, 0)
    return total


@triton.jit
def teacher_log_prob(w_token, stats, constants, P: tl.constexpr):
    """log q(y): the weighted mean over the members."""
    total = total_of(constants.shares)
    mean = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(len(w_token)):
        stat = Statistics(*stats[i])
        # Weighted first, because log q of a lowest logit might overflow.
        weight = constants.shares[i] / total
        u = w_token[i] - stat.teacher_max
        log_q = u * (weight * constants.inv_t) - weight * stat.teacher_lse
        if P.floor:
            log_q = tl.where(log_q < weight * constants.floor, weight * constants.floor, log_q)
        mean += log_q
    return mean
