"""How the row kernels reach memory: tiles of a row, its edges, its scalars, its statistics.

A row that does not begin at a 16-byte boundary, or whose length is no multiple of 8, can't be moved
in 128-bit pieces as a whole. `EDGES` splits it: the *body* begins at the first boundary and holds
whole groups of 8 entries; the up to 7 entries before it and the up to 7 after it, the *edges*, are
one narrow tile of their own. Rows for which nothing has to be split are all body.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.kernels.math import (
    Row,
    Weights,
    full_gradient,
    sides,
)
from hybrid_kernels.rows import FIELDS, MEMBER, MEMBER_FIELDS, STUDENT_FIELDS

_DIVERGENCE = tl.constexpr(FIELDS.divergence)
_LOG_PROB = tl.constexpr(FIELDS.log_prob)
_TEACHER_LOG_PROB = tl.constexpr(FIELDS.teacher_log_prob)
_ENTROPY = tl.constexpr(FIELDS.entropy)
_LOGSUMEXP = tl.constexpr(FIELDS.logsumexp)
_STUDENT_MASS = tl.constexpr(FIELDS.student_mass)
_TAIL_CORRECTION = tl.constexpr(FIELDS.tail_correction)
_STUDENT_MAX = tl.constexpr(FIELDS.student_max)
_STUDENT_LSE = tl.constexpr(FIELDS.student_lse)
_STUDENT_FIELDS = tl.constexpr(STUDENT_FIELDS)
# Those of a member follow the student's, member by member.
_TEACHER_MAX = tl.constexpr(MEMBER.teacher_max)
_TEACHER_LSE = tl.constexpr(MEMBER.teacher_lse)
_SLOPE_SUM = tl.constexpr(MEMBER.slope_sum)
_LOG_S = tl.constexpr(MEMBER.log_s)
_TAIL_SLOPE = tl.constexpr(MEMBER.tail_slope)
_MEMBER_FIELDS = tl.constexpr(MEMBER_FIELDS)

# Entries in a group that begins at a boundary; 16 bytes of a 16-bit format.
GROUP = 8
_GROUP = tl.constexpr(GROUP)
_EDGES = tl.constexpr(2 * GROUP)


class Side(NamedTuple):
    """`[O, I, V]` entries, of logits or of a gradient, with two row strides."""

    ptr: tl.tensor
    stride_o: tl.tensor
    stride_i: tl.tensor


class Problem(NamedTuple):
    """What a kernel reads: the rows of `rows.Rows`, and the numbers of a launch.

    Attributes:
        student: a `Side`.
        teachers: one for each member; under TOPK the members' log-probabilities `[N, K]`.
        shares: a weight for each member.
        support: under TOPK a `topk.Support`, else None.
        token_ids, valid: `[N]`, or None.
        count: N.
        inner: I.
        inv_t, floor, parameter: as in `math.Constants`.
    """

    student: tl.tensor
    teachers: tl.tensor
    shares: tl.tensor
    support: tl.tensor
    token_ids: tl.tensor
    valid: tl.tensor
    count: tl.tensor
    inner: tl.tensor
    inv_t: tl.tensor
    floor: tl.tensor
    parameter: tl.tensor


class Target(NamedTuple):
    """Where a gradient goes, and the coefficients of its terms, each a pointer (or None) and the
    stride from row to row."""

    gradient: tl.tensor
    divergence: tl.tensor
    divergence_stride: tl.tensor
    log_prob: tl.tensor
    log_prob_stride: tl.tensor
    entropy: tl.tensor
    entropy_stride: tl.tensor


class Place(NamedTuple):
    """Where a row is: its first entries on all sides and in the gradient, its body, its number."""

    student: tl.tensor
    teachers: tl.tensor
    gradient: tl.tensor
    marks: tl.tensor
    head: tl.tensor
    body: tl.tensor


@triton.jit
def row_start(side, row, inner):
    """A row's first entry. Offsets are 64-bit: N * V may pass 2^31 (N itself may not)."""
    outer = row // inner
    within = row - outer * inner
    start = side.ptr + tl.cast(outer, tl.int64) * side.stride_o
    return start + tl.cast(within, tl.int64) * side.stride_i


@triton.jit
def locate(
    problem, target, row, V: tl.constexpr, EDGES: tl.constexpr, MEMBERS: tl.constexpr,
    TOPK: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """A row on all sides and, where there is a target, in its gradient."""
    student = row_start(problem.student, row, problem.inner)
    teachers = ()
    if not TOPK:
        for i in tl.static_range(MEMBERS):
            teachers = teachers + (row_start(problem.teachers[i], row, problem.inner),)
    gradient = student
    if WRITES:
        gradient = row_start(target.gradient, row, problem.inner)
    marks = student
    if TOPK:
        marks = problem.support.marks + tl.cast(row, tl.int64) * mark_bytes(V)
    return place(student, teachers, gradient, marks, V, EDGES)


@triton.jit
def place(student, teachers, gradient, marks, V: tl.constexpr, EDGES: tl.constexpr):
    """A row from where it begins on all sides: its body and edges."""
    head = tl.full((), 0, tl.int32)
    body = tl.full((), V, tl.int32)
    if EDGES:
        # The launcher has made sure that this splits all sides at boundaries.
        size: tl.constexpr = student.dtype.element_ty.primitive_bitwidth // 8
        past = ((student.to(tl.int64) // size) % _GROUP).to(tl.int32)
        head = tl.minimum((_GROUP - past) % _GROUP, V)
        body = (V - head) // _GROUP * _GROUP
    return Place(student, teachers, gradient, marks, head, body)


@triton.constexpr_function
def mark_bytes(vocabulary):
    """Bytes of a row's marks, one bit for each entry: those of the body, those of the edges behind
    them, and what fills up 16 bytes."""
    return (edge_byte(vocabulary) + 2 + 15) // 16 * 16


@triton.constexpr_function
def edge_byte(vocabulary):
    """Where the marks of the edges begin."""
    return (vocabulary + 7) // 8


@triton.jit
def body_ptr(row_ptr, head, EDGES: tl.constexpr):
    """The first entry of a row's body."""
    if EDGES:
        row_ptr = tl.multiple_of(row_ptr + head, 16)
    return row_ptr


@triton.jit
def load_body(
    where,
    start,
    limit,
    SIZE: tl.constexpr,
    PAD: tl.constexpr,
    EDGES: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK: tl.constexpr,
):
    """SIZE entries of a row's body, up to a limit, on all sides as stored, padded with PAD (the
    same on all sides, so that they differ by nothing there); under TOPK the marks."""
    offsets = start + tl.arange(0, SIZE)
    inside = offsets < limit
    z = tl.load(body_ptr(where.student, where.head, EDGES) + offsets, mask=inside, other=PAD)
    ws = ()
    if TOPK:
        byte = start // 8 + tl.arange(0, SIZE // 8)
        marks = tl.load(where.marks + byte, mask=byte * 8 < limit, other=0).to(tl.int32)
        ws = ((marks[:, None] >> tl.arange(0, 8)[None, :] & 1).reshape((SIZE,)),)
    else:
        for i in tl.static_range(MEMBERS):
            ptr = body_ptr(where.teachers[i], where.head, EDGES)
            ws = ws + (tl.load(ptr + offsets, mask=inside, other=PAD),)
    return z, ws


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
def load_edges(
    where, wanted, V: tl.constexpr, PAD: tl.constexpr, MEMBERS: tl.constexpr, TOPK: tl.constexpr
):
    """All sides of a row's edges, as tiles of one chunk; nothing is read unless `wanted`."""
    offsets, inside = edge_lanes(where, V)
    inside = inside & (offsets < tl.where(wanted, V, 0))
    z = tl.load(where.student + offsets, mask=inside, other=PAD)
    wss = ()
    if TOPK:
        lane = tl.arange(0, _EDGES)
        byte = tl.load(where.marks + edge_byte(V) + lane // 8, mask=inside, other=0).to(tl.int32)
        wss = ((byte >> lane % 8 & 1,),)
    else:
        for i in tl.static_range(MEMBERS):
            w = tl.load(where.teachers[i] + offsets, mask=inside, other=PAD)
            wss = wss + ((w,),)
    return (z,), wss


@triton.jit
def mark_of(where, token, V: tl.constexpr):
    """The bit among a row's marks that stands for a token."""
    in_body = (token >= where.head) & (token < where.head + where.body)
    edge = tl.where(token < where.head, token, token - where.head - where.body + _GROUP)
    return tl.where(in_body, token - where.head, edge_byte(V) * 8 + edge)


@triton.jit
def chunk(wss, i, MEMBERS: tl.constexpr):
    """Chunk i of each member."""
    ws = ()
    for j in tl.static_range(MEMBERS):
        ws = ws + (wss[j][i],)
    return ws


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
def sampled_by_all(where, token, MEMBERS: tl.constexpr, TOPK: tl.constexpr):
    """The same of each teacher that is known by logits."""
    found = ()
    if not TOPK:
        for i in tl.static_range(MEMBERS):
            found = found + (sampled(where.teachers[i], token),)
    return found


@triton.jit
def coefficient(ptr, row, stride, inv_t):
    """A row's coefficient with the 1/T of every logit gradient; 0 where there is none."""
    value = tl.full((), 0.0, tl.float32)
    if ptr is not None:
        value = tl.load(ptr + row * stride) * inv_t
    return value


@triton.jit
def row_weights(target, row, inv_t):
    return Weights(
        coefficient(target.divergence, row, target.divergence_stride, inv_t),
        coefficient(target.log_prob, row, target.log_prob_stride, inv_t),
        coefficient(target.entropy, row, target.entropy_stride, inv_t),
    )


@triton.jit
def store_sampled(
    where,
    token,
    z,
    ws,
    stats,
    shares,
    weights,
    own,
    constants,
    MEMBERS: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Writes the sampled token's gradient over what its tile has stored: that, and `own`.

    One entry mended afterwards costs less than a comparison in every lane.
    """
    gradient = full_gradient(
        z, ws, stats, shares, weights, constants, MEMBERS, HAS_FLOOR, HAS_ENTROPY, DIVERGENCE
    )
    gradient = (gradient + own).to(where.gradient.dtype.element_ty)
    tl.debug_barrier()
    tl.store(where.gradient + token, gradient, mask=token >= 0)


@triton.jit
def student_log_prob(z, row, inv_t):
    """log p of the entry with logit z."""
    return (z - row.student_max) * inv_t - row.student_lse


@triton.jit
def teacher_log_prob(w_token, stats, shares, constants, MEMBERS: tl.constexpr, HAS_FLOOR):
    """log q(y): the weighted mean over the members."""
    total = tl.full((), 0.0, tl.float32)
    mean = tl.full((), 0.0, tl.float32)
    for i in tl.static_range(MEMBERS):
        row = Row(*stats[i])
        log_q = (w_token[i] - row.teacher_max) * constants.inv_t - row.teacher_lse
        if HAS_FLOOR:
            log_q = tl.where(log_q < constants.floor, constants.floor, log_q)
        total += shares[i]
        mean += shares[i] * log_q
    if MEMBERS > 0:
        mean = mean / total
    return mean


@triton.jit
def write_statistics(
    statistics_ptr, row, count, stats, log_prob, teacher_log_prob, inv_t, SIDES: tl.constexpr,
    TOPK: tl.constexpr,
):  # fmt: skip
    """Every field but the divergence; those of a support are written where it is compared."""
    student = Row(*stats[0])
    ptr = statistics_ptr + row
    count = tl.cast(count, tl.int64)  # a constant where there is one row, which has no .to
    tl.store(ptr + _LOG_PROB * count, log_prob)
    tl.store(ptr + _TEACHER_LOG_PROB * count, teacher_log_prob)
    tl.store(ptr + _ENTROPY * count, student.entropy)
    tl.store(ptr + _LOGSUMEXP * count, student.student_max * inv_t + student.student_lse)
    tl.store(ptr + _STUDENT_MAX * count, student.student_max)
    tl.store(ptr + _STUDENT_LSE * count, student.student_lse)
    if not TOPK:
        for field in tl.static_range(_STUDENT_MASS, _TAIL_CORRECTION + 1):
            tl.store(ptr + field * count, 0.0)
    for i in tl.static_range(SIDES):
        own = ptr + (_STUDENT_FIELDS + i * _MEMBER_FIELDS) * count
        member = Row(*stats[i])
        tl.store(own + _TEACHER_MAX * count, member.teacher_max)
        tl.store(own + _TEACHER_LSE * count, member.teacher_lse)
        tl.store(own + _SLOPE_SUM * count, member.slope_sum)
        tl.store(own + _LOG_S * count, member.log_s)
        tl.store(own + _TAIL_SLOPE * count, member.tail_slope)


@triton.jit
def write_divergence(statistics_ptr, row, count, value):
    tl.store(statistics_ptr + row + _DIVERGENCE * tl.cast(count, tl.int64), value)


@triton.jit
def read_statistics(statistics_ptr, row, count, SIDES: tl.constexpr):
    """What the gradient needs."""
    ptr = statistics_ptr + row
    count = tl.cast(count, tl.int64)
    student_max = tl.load(ptr + _STUDENT_MAX * count)
    student_lse = tl.load(ptr + _STUDENT_LSE * count)
    entropy = tl.load(ptr + _ENTROPY * count)
    found = ()
    for i in tl.static_range(SIDES):
        own = ptr + (_STUDENT_FIELDS + i * _MEMBER_FIELDS) * count
        teacher_max = tl.load(own + _TEACHER_MAX * count)
        teacher_lse = tl.load(own + _TEACHER_LSE * count)
        slope_sum = tl.load(own + _SLOPE_SUM * count)
        log_s = tl.load(own + _LOG_S * count)
        tail_slope = tl.load(own + _TAIL_SLOPE * count)
        shift = teacher_lse - student_lse
        row_of_member = Row(
            student_max, teacher_max, student_lse, teacher_lse, shift, entropy, slope_sum,
            log_s, tail_slope,
        )  # fmt: skip
        found = found + (row_of_member,)
    return found


@triton.jit
def clear_statistics(statistics_ptr, row, count, MEMBERS: tl.constexpr):
    """The statistics of a masked row."""
    FIELDS: tl.constexpr = _STUDENT_FIELDS + sides(MEMBERS, False) * _MEMBER_FIELDS
    for field in tl.static_range(FIELDS):
        tl.store(statistics_ptr + row + field * tl.cast(count, tl.int64), 0.0)
