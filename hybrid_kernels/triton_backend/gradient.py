"""The gradient of a row's entries, once its statistics are known."""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.divergences import LOWEST
from hybrid_kernels.triton_backend.entries import entry_of, student_probability
from hybrid_kernels.triton_backend.memory import coefficient
from hybrid_kernels.triton_backend.sums import Statistics, centred, difference, nats, unit


class Weights(NamedTuple):
    """A row's coefficients of dD/dz, dlog p(y)/dz and dH/dz, with the 1/T of a logit gradient;
    `rest` stands for the second in all but the sampled token's own term. (Outside a support the
    divergence's gradient is a multiple of p, as that of log p(y) is.)"""

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
    return Weights(divergence, log_prob, entropy, rest)


@triton.jit
def tile_gradient(tile, stats, weights, constants, P: tl.constexpr, D: tl.constexpr):
    """The gradient of each entry, all but the sampled token's own term c_logp 1[v = y]:

    c_div (s - p sum s) - c_logp p - c_ent p (log p + H), with s = p u + v,

    where the first is a weighted sum over the members.
    """
    gradient = _member_gradient(tile, 0, stats, weights, constants, P, D)
    PULLS: tl.constexpr = P.pulls
    for i in tl.static_range(1, PULLS):
        gradient += _member_gradient(tile, i, stats, weights, constants, P, D)
    return gradient


@triton.jit
def _member_gradient(
    tile,
    i: tl.constexpr,
    stats,
    weights,
    constants,
    P: tl.constexpr,
    D: tl.constexpr,
):
    """The part of one member; that of the first has the student's own terms."""
    z = tile[0]
    stat = Statistics(*stats[i])
    weight = weights.divergence * constants.shares[i]
    # A weight of 0 makes 0 of an infinite divergence.
    silent = weight == 0.0
    # The log-ratio of ordinary probabilities may be so large that only its product with p is a
    # number. So what multiplies p is kept in units of 2^28, too.
    LARGE: tl.constexpr = P.pulls > 0 and P.student_d and not P.floor
    UNIT: tl.constexpr = unit(True) if LARGE else 1.0
    inner = tl.full((), -0.0, tl.float32)  # which the compiler leaves out of a sum
    if i == 0:
        inner = -weights.rest * UNIT
        if P.entropy:
            inner += weights.entropy * (stat.student_lse - stat.entropy) * UNIT
    if P.pulls > 0:
        w = tile[1][i]
        entry = entry_of(z, w, stat, constants, P)
        p = entry.p
        v = -entry.q
        if P.student_d and not P.floor:
            # u = l: what is the same for all entries is added once.
            constant = weight * UNIT * (stat.shift - stat.slope_sum)
            inner += tl.where(silent, 0.0, constant)
            teacher_max = tl.where(silent, 0.0, stat.teacher_max)  # which may be NaN
            d = difference(z, w, stat.student_max, teacher_max, True, True)
            inner = (weight * constants.inv_t * (nats(True) * UNIT)) * d + inner
        else:
            _, u, v = D(entry, constants.parameter, stat.log_s, False)
            pull = weight * (u - stat.slope_sum)
            inner += tl.where(silent, 0.0, pull)
    else:
        p = student_probability(z, stat, constants)
    if i == 0 and P.entropy:
        x = tl.maximum(centred(z, stat.student_max), LOWEST * unit(True))
        inner -= (weights.entropy * constants.inv_t * (nats(True) * UNIT)) * x
    gradient = p * inner
    if LARGE:
        gradient *= nats(True)
    if P.pulls > 0 and P.has_v:
        gradient += tl.where(silent, 0.0, weight * v)
    return gradient


@triton.jit
def store_sampled(where, token, stats, weights, constants, P: tl.constexpr, D: tl.constexpr):
    """Writes the sampled token's gradient over what its tile has stored: that, and its own term.

    One entry written afterwards costs less than a comparison in every lane. A support has its own
    way with tokens in it.
    """
    gradient = tile_gradient((token.z, token.ws), stats, weights, constants, P, D)
    gradient = (gradient + weights.log_prob).to(where.gradient.dtype.element_ty)
    written = tl.where(token.in_support, -1, token.id)
    tl.debug_barrier()
    tl.store(where.gradient + written, gradient, mask=written >= 0)
