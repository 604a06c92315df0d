"""The gradient of a row's entries, once its statistics are known."""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.divergences import LOWEST
from hybrid_kernels.triton_backend.entries import entry_of, student_probability
from hybrid_kernels.triton_backend.memory import coefficient
from hybrid_kernels.triton_backend.sums import Statistics, centred, difference, nats, unit


class RowCoefficients(NamedTuple):
    """A row's coefficients of dD/dz, dlog p(y)/dz and dH/dz, each divided by T.

    `rest` replaces the second in every term but the sampled token's own: outside a support the
    divergence's gradient is a multiple of p, like the gradient of log p(y).
    """

    divergence: tl.tensor
    log_prob: tl.tensor
    entropy: tl.tensor
    rest: tl.tensor


@triton.jit
def weights_of(args, where, token, stats, constants, P: tl.constexpr):
    divergence = coefficient(args.c_div, where.row, constants.inv_t)
    log_prob = coefficient(args.c_logp, where.row, constants.inv_t)
    entropy = coefficient(args.c_ent, where.row, constants.inv_t)
    rest = log_prob
    if P.k > 0:
        # A = advantage - dense weight * correction, in terms of coefficients.
        log_prob += tl.where(divergence == 0.0, 0.0, divergence * token.correction)
        rest = log_prob
        if P.tail == "bucket":
            for i in tl.static_range(len(args.teachers)):
                stat = Statistics(*stats[i])
                pull = divergence * constants.shares[i] * (stat.tail_slope - stat.slope_sum)
                rest -= tl.where(divergence == 0.0, 0.0, pull)
    return RowCoefficients(divergence, log_prob, entropy, rest)


@triton.jit
def tile_gradient(tile, stats, coefficients, constants, P: tl.constexpr, D: tl.constexpr):
    """The gradient of each entry, without the sampled token's own term c_logp 1[v = y]:

    c_div (s - p sum s) - c_logp p - c_ent p (log p + H), with s = p u + v,

    whose first term is a weighted sum over the members.
    """
    gradient = _member_gradient(tile, 0, stats, coefficients, constants, P, D)
    PULLS: tl.constexpr = P.pulls
    for i in tl.static_range(1, PULLS):
        gradient += _member_gradient(tile, i, stats, coefficients, constants, P, D)
    return gradient


@triton.jit
def _member_gradient(
    tile,
    i: tl.constexpr,
    stats,
    coefficients,
    constants,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """One member's part; the first also has the student's own terms."""
    z = tile[0]
    stat = Statistics(*stats[i])
    weight = coefficients.divergence * constants.shares[i]
    # A weight of 0 turns even an infinite divergence into 0.
    silent = weight == 0.0
    # The log-ratio may be so large that only its product with p is finite, so the factor of p is
    # kept in units of 2^28 as well.
    LARGE: tl.constexpr = P.pulls > 0 and P.student_d and not P.floor
    UNIT: tl.constexpr = unit(True) if LARGE else 1.0
    inner = tl.full((), -0.0, tl.float32)  # -0.0, which the compiler can drop from a sum
    if i == 0:
        inner = -coefficients.rest * UNIT
        if P.entropy:
            inner += coefficients.entropy * (stat.student_lse - stat.entropy) * UNIT
    if P.pulls > 0:
        w = tile[1][i]
        entry = entry_of(z, w, stat, constants, P)
        p = entry.p
        v = -entry.q
        if P.student_d and not P.floor:
            # Here u = l, and its part common to all entries is added once.
            constant = weight * UNIT * (stat.shift - stat.slope_sum)
            inner += tl.where(silent, 0.0, constant)
            d = difference(z, w, stat.student_max, stat.teacher_max, True, True)
            d = tl.where(silent, 0.0, d)  # the teacher may be NaN
            inner = (weight * constants.inv_t * (nats(True) * UNIT)) * d + inner
        else:
            _, u, v = D(entry, constants.parameter, stat.log_s, False)
            pull = weight * (u - stat.slope_sum)
            inner += tl.where(silent, 0.0, pull)
    else:
        p = student_probability(z, stat, constants)
    if i == 0 and P.entropy:
        x = tl.maximum(centred(z, stat.student_max), LOWEST * unit(True))
        inner -= (coefficients.entropy * constants.inv_t * (nats(True) * UNIT)) * x
    gradient = p * inner
    if LARGE:
        gradient *= nats(True)
    if P.pulls > 0 and P.has_v:
        gradient += tl.where(silent, 0.0, weight * v)
    return gradient


@triton.jit
def store_sampled(where, token, stats, coefficients, constants, P: tl.constexpr, D: tl.constexpr):
    """Rewrites the sampled token's entry of the gradient, with its own term.

    One late write costs less than a comparison in every lane. For a token in a support,
    `topk.store_support` does it.
    """
    gradient = tile_gradient((token.z, token.ws), stats, coefficients, constants, P, D)
    gradient = (gradient + coefficients.log_prob).to(where.gradient.dtype.element_ty)
    written = tl.where(token.in_support, -1, token.id)
    tl.debug_barrier()
    tl.store(where.gradient + written, gradient, mask=written >= 0)
