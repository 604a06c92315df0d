"""What follows the sums of a swept row: its statistics, and the last entries of its gradient."""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import topk
from hybrid_kernels.triton_backend.entries import student_log_prob, teacher_log_prob
from hybrid_kernels.triton_backend.gradient import store_sampled
from hybrid_kernels.triton_backend.memory import (
    write_divergence,
    write_log_probs,
    write_statistics,
)
from hybrid_kernels.triton_backend.sums import Statistics, settled


@triton.jit
def conclude(args, where, token, stats, divergences, constants, P: tl.constexpr, D: tl.constexpr):
    """Completes the statistics and writes them.

    `stats` come from `normalisers`; `divergences` are the values and slope sums of full teachers.
    Returns the divergence, the statistics and the token, both complete.
    """
    value = tl.full((), 0.0, tl.float32)
    log_q = tl.full((), 0.0, tl.float32)
    if P.k > 0:
        value, stats, log_q, token = topk.compare(args, where, token, stats, constants, P, D)
    elif P.members > 0:
        value, stats = settled(divergences[0], divergences[1], stats, constants, P)
    log_p = tl.full((), 0.0, tl.float32)
    if args.token_ids is not None:
        log_p = student_log_prob(token.z, Statistics(*stats[0]), constants)
        if P.full > 0:
            log_q = teacher_log_prob(token.ws, stats, constants, P)
    write_statistics(args, where.row, stats, constants.inv_t, P)
    write_log_probs(args, where.row, log_p, log_q)
    write_divergence(args, where.row, value)
    return value, stats, token


@triton.jit
def finish_gradient(
    args, where, token, stats, coefficients, constants, P: tl.constexpr, D: tl.constexpr
):
    """Completes the gradient after the tiles: the sampled token's entry and the support's."""
    if P.log_prob or P.corrects:
        store_sampled(where, token, stats, coefficients, constants, P, D)
    if P.k > 0:
        topk.store_support(args, where, token, stats, coefficients, constants, P, D)
