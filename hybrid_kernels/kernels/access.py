"""How the row kernels reach memory: tiles of a row, its edges, its scalars, its statistics.

A row that does not begin at a 16-byte boundary, or whose length is no multiple of 8, can't be moved
in 128-bit pieces as a whole. `EDGES` splits it: the *body* begins at the first boundary and holds
whole groups of 8 entries; the up to 7 entries before it and the up to 7 after it, the *edges*, are
one narrow tile of their own. Rows for which nothing has to be split are all body.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.kernels.math import Row, Weights, logit_gradient
from hybrid_kernels.rows import FIELDS, LOWEST, STATISTICS

_DIVERGENCE = tl.constexpr(FIELDS.divergence)
_LOG_PROB = tl.constexpr(FIELDS.log_prob)
_TEACHER_LOG_PROB = tl.constexpr(FIELDS.teacher_log_prob)
_ENTROPY = tl.constexpr(FIELDS.entropy)
_LOGSUMEXP = tl.constexpr(FIELDS.logsumexp)
_STUDENT_MAX = tl.constexpr(FIELDS.student_max)
_TEACHER_MAX = tl.constexpr(FIELDS.teacher_max)
_STUDENT_LSE = tl.constexpr(FIELDS.student_lse)
_TEACHER_LSE = tl.constexpr(FIELDS.teacher_lse)
_SLOPE_SUM = tl.constexpr(FIELDS.slope_sum)
_STATISTICS = tl.constexpr(STATISTICS)

# Entries in a group that begins at a boundary; 16 bytes of a 16-bit format.
GROUP = 8
_GROUP = tl.constexpr(GROUP)
_EDGES = tl.constexpr(2 * GROUP)


class Place(NamedTuple):
    """Where a row is: its first entries on both sides and in the gradient, and its body."""

    student: tl.tensor
    teacher: tl.tensor
    gradient: tl.tensor
    head: tl.tensor
    body: tl.tensor


@triton.constexpr_function
def padding(student_dtype, teacher_dtype):
    """What lanes outside the row hold: the same on both sides, so that they differ by nothing."""
    fp16 = "fp16" in (str(student_dtype), str(teacher_dtype))
    return -math.inf if fp16 else LOWEST


@triton.jit
def row_start(ptr, row, inner, stride_o, stride_i):
    """A row's first entry. Offsets are 64-bit: N * V may pass 2^31 (N itself may not)."""
    outer = row // inner
    within = row - outer * inner
    return ptr + tl.cast(outer, tl.int64) * stride_o + tl.cast(within, tl.int64) * stride_i


@triton.jit
def locate(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    row,
    inner,
    student_stride_o,
    student_stride_i,
    teacher_stride_o,
    teacher_stride_i,
    gradient_stride_o,
    gradient_stride_i,
    V: tl.constexpr,
    EDGES: tl.constexpr,
):
    """A row on both sides and in the gradient; a side that is None takes the student's place."""
    student = row_start(student_ptr, row, inner, student_stride_o, student_stride_i)
    teacher = student
    if teacher_ptr is not None:
        teacher = row_start(teacher_ptr, row, inner, teacher_stride_o, teacher_stride_i)
    gradient = student
    if gradient_ptr is not None:
        gradient = row_start(gradient_ptr, row, inner, gradient_stride_o, gradient_stride_i)
    head = tl.full((), 0, tl.int32)
    body = tl.full((), V, tl.int32)
    if EDGES:
        # The launcher has made sure that this splits all three at boundaries.
        size: tl.constexpr = student_ptr.dtype.element_ty.primitive_bitwidth // 8
        past = ((student.to(tl.int64) // size) % _GROUP).to(tl.int32)
        head = tl.minimum((_GROUP - past) % _GROUP, V)
        body = (V - head) // _GROUP * _GROUP
    return Place(student, teacher, gradient, head, body)


@triton.jit
def body_ptr(row_ptr, head, EDGES: tl.constexpr):
    """The first entry of a row's body."""
    if EDGES:
        row_ptr = tl.multiple_of(row_ptr + head, 16)
    return row_ptr


@triton.jit
def load_both(z_ptr, w_ptr, offsets, inside, HAS_TEACHER: tl.constexpr):
    """The same entries of both sides as stored, padded; without a teacher the student's twice."""
    PAD: tl.constexpr = padding(z_ptr.dtype.element_ty, w_ptr.dtype.element_ty)
    z = tl.load(z_ptr + offsets, mask=inside, other=PAD)
    w = z
    if HAS_TEACHER:
        w = tl.load(w_ptr + offsets, mask=inside, other=PAD)
    return z, w


@triton.jit
def load_body(where, offsets, inside, EDGES: tl.constexpr, HAS_TEACHER: tl.constexpr):
    """Entries of a row's body, on both sides."""
    z_ptr = body_ptr(where.student, where.head, EDGES)
    w_ptr = body_ptr(where.teacher, where.head, EDGES)
    return load_both(z_ptr, w_ptr, offsets, inside, HAS_TEACHER)


@triton.jit
def store_body(where, offsets, inside, gradient, EDGES: tl.constexpr):
    """Entries of the body of a row's gradient."""
    ptr = body_ptr(where.gradient, where.head, EDGES)
    tl.store(ptr + offsets, gradient.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def edge_lanes(where, V: tl.constexpr):
    """Offsets of the entries outside the body, and which lanes have one."""
    lane = tl.arange(0, _EDGES)
    offsets = tl.where(lane < _GROUP, lane, where.head + where.body + lane - _GROUP)
    return offsets, tl.where(lane < _GROUP, lane < where.head, offsets < V)


@triton.jit
def load_edges(where, wanted, V: tl.constexpr, HAS_TEACHER: tl.constexpr):
    """Both sides of a row's edges; nothing is read unless `wanted`."""
    offsets, inside = edge_lanes(where, V)
    inside = inside & (offsets < tl.where(wanted, V, 0))
    return load_both(where.student, where.teacher, offsets, inside, HAS_TEACHER)


@triton.jit
def store_edges(where, gradient, V: tl.constexpr):
    offsets, inside = edge_lanes(where, V)
    tl.store(where.gradient + offsets, gradient.to(where.gradient.dtype.element_ty), mask=inside)


@triton.jit
def clear_edges(where, V: tl.constexpr):
    """The edges of a masked row's gradient."""
    store_edges(where, tl.zeros((_EDGES,), tl.float32), V)


@triton.jit
def sampled_token(token_ptr, row, V: tl.constexpr):
    """A row's token id; -1 for one outside the vocabulary."""
    token = tl.load(token_ptr + row)
    return tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)


@triton.jit
def sampled(row_ptr, token):
    """The logit of the sampled token; NaN for an id outside the vocabulary."""
    return tl.load(row_ptr + token, mask=token >= 0, other=float("nan")).to(tl.float32)


@triton.jit
def coefficient(ptr, row, stride, inv_t):
    """A row's coefficient with the 1/T of every logit gradient; 0 where there is none."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + row * stride) * inv_t
    return value


@triton.jit
def row_weights(div_ptr, logp_ptr, ent_ptr, row, div_stride_n, logp_stride_n, ent_stride_n, inv_t):
    return Weights(
        coefficient(div_ptr, row, div_stride_n, inv_t),
        coefficient(logp_ptr, row, logp_stride_n, inv_t),
        coefficient(ent_ptr, row, ent_stride_n, inv_t),
    )


@triton.jit
def store_sampled(
    where,
    token,
    z,
    w,
    stats,
    weights,
    constants,
    HAS_FLOOR: tl.constexpr,
    HAS_DIVERGENCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Writes the sampled token's gradient over what its tile has stored.

    One entry mended afterwards costs less than a comparison in every lane.
    """
    gradient = logit_gradient(
        z, w, stats, weights, constants, HAS_FLOOR, HAS_DIVERGENCE, HAS_ENTROPY, DIVERGENCE
    )
    gradient = (gradient + weights.log_prob).to(where.gradient.dtype.element_ty)
    tl.debug_barrier()
    tl.store(where.gradient + token, gradient, mask=token >= 0)


@triton.jit
def token_statistics(
    z_token, w_token, stats, constants, HAS_TEACHER: tl.constexpr, HAS_FLOOR: tl.constexpr
):
    """log p(y) and log q(y)."""
    log_prob = (z_token - stats.student_max) * constants.inv_t - stats.student_lse
    teacher_log_prob = 0.0
    if HAS_TEACHER:
        teacher_log_prob = (w_token - stats.teacher_max) * constants.inv_t - stats.teacher_lse
        if HAS_FLOOR:
            teacher_log_prob = tl.where(
                teacher_log_prob < constants.floor, constants.floor, teacher_log_prob
            )
    return log_prob, teacher_log_prob


@triton.jit
def write_statistics(statistics_ptr, row, rows, stats, log_prob, teacher_log_prob, inv_t):
    """Every field but the divergence."""
    ptr = statistics_ptr + row
    rows = tl.cast(rows, tl.int64)  # a constant where there is one row, which has no .to
    tl.store(ptr + _LOG_PROB * rows, log_prob)
    tl.store(ptr + _TEACHER_LOG_PROB * rows, teacher_log_prob)
    tl.store(ptr + _ENTROPY * rows, stats.entropy)
    tl.store(ptr + _LOGSUMEXP * rows, stats.student_max * inv_t + stats.student_lse)
    tl.store(ptr + _STUDENT_MAX * rows, stats.student_max)
    tl.store(ptr + _TEACHER_MAX * rows, stats.teacher_max)
    tl.store(ptr + _STUDENT_LSE * rows, stats.student_lse)
    tl.store(ptr + _TEACHER_LSE * rows, stats.teacher_lse)
    tl.store(ptr + _SLOPE_SUM * rows, stats.slope_sum)


@triton.jit
def write_divergence(statistics_ptr, row, rows, value):
    tl.store(statistics_ptr + row + _DIVERGENCE * tl.cast(rows, tl.int64), value)


@triton.jit
def read_statistics(statistics_ptr, row, rows):
    """What the gradient needs."""
    ptr = statistics_ptr + row
    rows = tl.cast(rows, tl.int64)
    student_max = tl.load(ptr + _STUDENT_MAX * rows)
    teacher_max = tl.load(ptr + _TEACHER_MAX * rows)
    student_lse = tl.load(ptr + _STUDENT_LSE * rows)
    teacher_lse = tl.load(ptr + _TEACHER_LSE * rows)
    shift = teacher_lse - student_lse
    entropy = tl.load(ptr + _ENTROPY * rows)
    slope_sum = tl.load(ptr + _SLOPE_SUM * rows)
    return Row(student_max, teacher_max, student_lse, teacher_lse, shift, entropy, slope_sum)


@triton.jit
def clear_statistics(statistics_ptr, row, rows):
    """The statistics of a masked row."""
    for field in tl.static_range(_STATISTICS):
        tl.store(statistics_ptr + row + field * tl.cast(rows, tl.int64), 0.0)
