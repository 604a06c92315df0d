"""How the row kernels reach memory: their arguments, and the tiles, edges and scalars of a row.

A row that does not begin at a 16-byte boundary, or whose length is not a multiple of 8, can't be
moved in 128-bit pieces as a whole. `Plan.edges` splits it: the *body* begins at the first boundary
and holds whole groups of 8 entries; the *edges*, up to 7 entries before it and the rest after it,
are a narrow tile. Rows that need no split are all body.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.rows import FIELDS, MEMBER, MEMBER_FIELDS, STUDENT_FIELDS
from hybrid_kernels.triton_backend.divergences import LOG2E
from hybrid_kernels.triton_backend.sums import Constants, Statistics

_DIVERGENCE = tl.constexpr(FIELDS.divergence)
_LOG_PROB = tl.constexpr(FIELDS.log_prob)
_TEACHER_LOG_PROB = tl.constexpr(FIELDS.teacher_log_prob)
_ENTROPY = tl.constexpr(FIELDS.entropy)
_LOGSUMEXP = tl.constexpr(FIELDS.logsumexp)
STUDENT_MASS = tl.constexpr(FIELDS.student_mass)
TAIL_CORRECTION = tl.constexpr(FIELDS.tail_correction)
_STUDENT_MAX = tl.constexpr(FIELDS.student_max)
_STUDENT_LSE = tl.constexpr(FIELDS.student_lse)
_STUDENT_FIELDS = tl.constexpr(STUDENT_FIELDS)
# The fields of each member follow the student's.
_TEACHER_MAX = tl.constexpr(MEMBER.teacher_max)
_TEACHER_LSE = tl.constexpr(MEMBER.teacher_lse)
_SLOPE_SUM = tl.constexpr(MEMBER.slope_sum)
_LOG_S = tl.constexpr(MEMBER.log_s)
_TAIL_SLOPE = tl.constexpr(MEMBER.tail_slope)
_MEMBER_FIELDS = tl.constexpr(MEMBER_FIELDS)

# Entries in a group that begins at a boundary: 16 bytes in a 16-bit format.
GROUP = 8
_GROUP = tl.constexpr(GROUP)
_EDGES = tl.constexpr(2 * GROUP)


class Side(NamedTuple):
    """`[O, I, V]` entries, of logits or of a gradient, with two row strides."""

    ptr: tl.tensor
    stride_o: tl.tensor
    stride_i: tl.tensor


class PerRow(NamedTuple):
    """A number for each row, the element `row // repeat * stride`. `ptr` may be None."""

    ptr: tl.tensor
    repeat: tl.tensor
    stride: tl.tensor


class Support(NamedTuple):
    """The top-K supports and their buffers, all contiguous.

    given: `[N, K]`, the ids as passed; ids: int32 `[N, K]`, the ids that count; logits: fp32
    `[N, K]`, the student's; marks: uint8 `[N, mark_bytes(V)]`; words: the marks as int32;
    token_log_prob: fp32 `[N]` or None; resolution: the rounding of the log-probabilities.
    """

    given: tl.tensor
    ids: tl.tensor
    logits: tl.tensor
    marks: tl.tensor
    words: tl.tensor
    token_log_prob: tl.tensor
    resolution: tl.tensor


class Arguments(NamedTuple):
    """Everything that a kernel takes at run time; None for what it does not need.

    Attributes:
        student: a `Side`.
        teachers: one for each member; under a support their log-probabilities `[N, K]`.
        shares: a weight for each member; (1,) without members.
        support: a `Support`.
        token_ids, valid: `[N]`.
        count: N.
        inner: I; None if all rows are `Side.stride_i` apart.
        inv_t: 1/T.
        temperature: T of each row, replaces inv_t, `PerRow`.
        floor, parameter: the teacher's floor and the divergence's parameter.
        statistics: fp32 `[fields, N]`, see `rows.FIELDS`.
        gradient: a `Side`.
        c_div, c_logp, c_ent: the coefficients of the gradient's terms, `PerRow`.
        published, pieces, counters: for programs that share rows, see `meeting.py`.
        declined: int8 `[N]`, the rows that the row-resident form leaves to the sweeping form,
            which then processes only these.
        row_values: the output of `values_kernel`.
        factor: the factor of `scale_kernel`, `PerRow`.
    """

    student: tl.tensor = None
    teachers: tl.tensor = None
    shares: tl.tensor = None
    support: tl.tensor = None
    token_ids: tl.tensor = None
    valid: tl.tensor = None
    count: tl.tensor = None
    inner: tl.tensor = None
    inv_t: tl.tensor = None
    temperature: tl.tensor = None
    floor: tl.tensor = None
    parameter: tl.tensor = None
    statistics: tl.tensor = None
    gradient: tl.tensor = None
    c_div: tl.tensor = None
    c_logp: tl.tensor = None
    c_ent: tl.tensor = None
    published: tl.tensor = None
    pieces: tl.tensor = None
    counters: tl.tensor = None
    declined: tl.tensor = None
    row_values: tl.tensor = None
    factor: tl.tensor = None


class Place(NamedTuple):
    """Where a row is, or a program's part of it.

    student, teachers, gradient, marks: the row's first entry on each side; head: where the body
    begins; body: its number of entries; row, part: the indices of the row and the part.
    """

    student: tl.tensor
    teachers: tl.tensor
    gradient: tl.tensor
    marks: tl.tensor
    head: tl.tensor
    body: tl.tensor
    row: tl.tensor
    part: tl.tensor


class Token(NamedTuple):
    """A row's sampled token: its id (-1 for none), its logits from the student and each full
    teacher; under a support, whether it is in it and the correction of its advantage."""

    id: tl.tensor
    z: tl.tensor
    ws: tl.tensor
    in_support: tl.tensor
    correction: tl.tensor


@triton.jit
def _row_start(side, row, inner):
    """A row's first entry. Offsets are 64-bit: N * V may pass 2^31 (N itself may not)."""
    if inner is None:
        return side.ptr + tl.cast(row, tl.int64) * side.stride_i
    else:
        outer = row // inner
        within = row - outer * inner
        start = side.ptr + tl.cast(outer, tl.int64) * side.stride_o
        return start + tl.cast(within, tl.int64) * side.stride_i


@triton.jit
def locate(args, row, part, P: tl.constexpr):
    """A row on all sides and, if it is written, in the gradient."""
    student = _row_start(args.student, row, args.inner)
    teachers = ()
    if P.full > 0:
        for i in tl.static_range(len(args.teachers)):
            teachers = teachers + (_row_start(args.teachers[i], row, args.inner),)
    gradient = student
    if P.write:
        gradient = _row_start(args.gradient, row, args.inner)
    marks = student
    if P.k > 0:
        marks = args.support.marks + tl.cast(row, tl.int64) * mark_bytes(P.vocabulary)
    head = tl.full((), 0, tl.int32)
    body = tl.full((), P.vocabulary, tl.int32)
    if P.edges:
        # The launcher has checked that this splits all sides at boundaries.
        size: tl.constexpr = student.dtype.element_ty.primitive_bitwidth // 8
        past = ((student.to(tl.int64) // size) % _GROUP).to(tl.int32)
        head = tl.minimum((_GROUP - past) % _GROUP, P.vocabulary)
        body = (P.vocabulary - head) // _GROUP * _GROUP
        if P.most < P.vocabulary:
            body = tl.minimum(body, P.most)
    return Place(student, teachers, gradient, marks, head, body, row, part)


@triton.constexpr_function
def mark_bytes(vocabulary):
    """Bytes of a row's marks, one bit for each entry: first the body, then the edges, padded to a
    multiple of 16 bytes."""
    return (edge_byte(vocabulary) + 2 + 15) // 16 * 16


@triton.constexpr_function
def edge_byte(vocabulary):
    """Where the marks of the edges begin."""
    return (vocabulary + 7) // 8


# -- tiles ---------------------------------------------------------------------------------------


@triton.jit
def body_of(row_ptr, head, P: tl.constexpr):
    """The first entry of a row's body."""
    if P.edges:
        row_ptr = tl.multiple_of(row_ptr + head, 16)
    return row_ptr


@triton.jit
def load_tile(where, start, limit, P: tl.constexpr, GUARDED: tl.constexpr = True):
    """A tile of a row's body, up to a limit, on all sides as stored; marks for a support's teacher.

    Lanes outside hold -inf on all sides or, unguarded, the plan's padding.
    """
    PAD: tl.constexpr = -float("inf") if GUARDED else P.pad
    offsets = start + tl.arange(0, P.block)
    inside = offsets < limit
    z = tl.load(body_of(where.student, where.head, P) + offsets, mask=inside, other=PAD)
    ws = ()
    if P.k > 0:
        byte = start // 8 + tl.arange(0, P.block // 8)
        marks = tl.load(where.marks + byte, mask=byte * 8 < limit, other=0).to(tl.int32)
        ws = ((marks[:, None] >> tl.arange(0, 8)[None, :] & 1).reshape((P.block,)),)
    for i in tl.static_range(len(where.teachers)):
        ptr = body_of(where.teachers[i], where.head, P)
        ws = ws + (tl.load(ptr + offsets, mask=inside, other=PAD),)
    return z, ws


@triton.jit
def store_tile(where, start, limit, gradient, P: tl.constexpr):
    """Stores a tile of the body of a row's gradient."""
    offsets = start + tl.arange(0, P.block)
    ptr = body_of(where.gradient, where.head, P)
    tl.store(ptr + offsets, gradient.to(ptr.dtype.element_ty), mask=offsets < limit)


@triton.jit
def edge_lanes(where, lane, P: tl.constexpr):
    """Offsets of the entries outside the body, and which lanes have one."""
    offsets = tl.where(lane < _GROUP, lane, where.head + where.body + lane - _GROUP)
    return offsets, tl.where(lane < _GROUP, lane < where.head, offsets < P.vocabulary)


@triton.jit
def load_edges(where, is_read, P: tl.constexpr):
    """The edges of a row as a tile; loads nothing unless `is_read`."""
    offsets, inside = edge_lanes(where, tl.arange(0, _EDGES), P)
    inside = inside & (offsets < tl.where(is_read, P.vocabulary, 0))
    z = tl.load(where.student + offsets, mask=inside, other=-float("inf"))
    ws = ()
    if P.k > 0:
        lane = tl.arange(0, _EDGES)
        ptr = where.marks + edge_byte(P.vocabulary) + lane // 8
        ws = (tl.load(ptr, mask=inside, other=0).to(tl.int32) >> lane % 8 & 1,)
    for i in tl.static_range(len(where.teachers)):
        w = tl.load(where.teachers[i] + offsets, mask=inside, other=-float("inf"))
        ws = ws + (w,)
    return z, ws


@triton.jit
def store_edges(where, gradient, P: tl.constexpr):
    offsets, inside = edge_lanes(where, tl.arange(0, _EDGES), P)
    tl.store(where.gradient + offsets, gradient.to(where.gradient.dtype.element_ty), mask=inside)


@triton.jit
def clear_edges(where, P: tl.constexpr):
    """Zeros the edges of a masked row's gradient."""
    store_edges(where, tl.zeros((_EDGES,), tl.float32), P)


@triton.jit
def mark_of(where, token, P: tl.constexpr):
    """The bit among a row's marks that stands for a token."""
    in_body = (token >= where.head) & (token < where.head + where.body)
    edge = tl.where(token < where.head, token, token - where.head - where.body + _GROUP)
    return tl.where(in_body, token - where.head, edge_byte(P.vocabulary) * 8 + edge)


# -- scalars -------------------------------------------------------------------------------------


@triton.jit
def number_of(per_row, row):
    return tl.load(per_row.ptr + row // per_row.repeat * per_row.stride).to(tl.float32)


@triton.jit
def coefficient(per_row, row, inv_t):
    """A row's coefficient times 1/T; 0 if there is none."""
    value = tl.full((), 0.0, tl.float32)
    if per_row.ptr is not None:
        value = number_of(per_row, row) * inv_t
    return value


@triton.jit
def constants_of(args, row, P: tl.constexpr):
    if P.row_temperature:
        inv_t = tl.div_rn(1.0, number_of(args.temperature, row))
        return Constants(inv_t, inv_t * LOG2E, args.floor, args.parameter, args.shares)
    else:
        return Constants(args.inv_t, args.inv_t * LOG2E, args.floor, args.parameter, args.shares)


@triton.jit
def is_valid(args, row):
    """Whether a row is not masked."""
    valid = True
    if args.valid is not None:
        valid = tl.load(args.valid + row) != 0
    return valid


@triton.jit
def no_token(P: tl.constexpr):
    zero = tl.full((), 0.0, tl.float32)
    ws = ()
    FULL: tl.constexpr = P.full
    for _ in tl.static_range(FULL):
        ws = ws + (zero,)
    return Token(tl.full((), -1, tl.int32), zero, ws, tl.full((), 0, tl.int1), zero)


@triton.jit
def sampled_id(args, row, P: tl.constexpr):
    """A row's sampled token; -1 for an id outside the vocabulary."""
    token_id = tl.load(args.token_ids + row)
    return tl.where((token_id >= 0) & (token_id < P.vocabulary), token_id, -1).to(tl.int32)


@triton.jit
def sampled_token(args, where, P: tl.constexpr):
    """A row's sampled token; NaN logits for an id outside the vocabulary. Must be read before the
    gradient is written, which may overwrite the logits."""
    token = no_token(P)
    if args.token_ids is not None:
        token_id = sampled_id(args, where.row, P)
        z = _logit(where.student, token_id)
        ws = ()
        for i in tl.static_range(len(where.teachers)):
            ws = ws + (_logit(where.teachers[i], token_id),)
        # This is False: a constant would cost some kernels a register too many.
        token = Token(token_id, z, ws, token_id < -1, token.correction)
    return token


@triton.jit
def _logit(row_ptr, token):
    return tl.load(row_ptr + token, mask=token >= 0, other=float("nan")).to(tl.float32)


# -- statistics ----------------------------------------------------------------------------------


@triton.jit
def _fields(args, row):
    """A pointer to a row's first statistic, and the distance to the next."""
    # With a single row N is a constant, which has no `.to`.
    return args.statistics + row, tl.cast(args.count, tl.int64)


@triton.jit
def write_statistics(args, row, stats, inv_t, P: tl.constexpr):
    """Writes all fields but the divergence, the token's log-probabilities, and those of a support,
    which `topk.compare` writes."""
    student = Statistics(*stats[0])
    ptr, count = _fields(args, row)
    tl.store(ptr + _ENTROPY * count, student.entropy)
    tl.store(ptr + _LOGSUMEXP * count, student.student_max * inv_t + student.student_lse)
    tl.store(ptr + _STUDENT_MAX * count, student.student_max)
    tl.store(ptr + _STUDENT_LSE * count, student.student_lse)
    if P.k == 0:
        for field in tl.static_range(STUDENT_MASS, TAIL_CORRECTION + 1):
            tl.store(ptr + field * count, 0.0)
    for i in tl.static_range(len(stats)):
        first = ptr + (_STUDENT_FIELDS + i * _MEMBER_FIELDS) * count
        member = Statistics(*stats[i])
        tl.store(first + _TEACHER_MAX * count, member.teacher_max)
        tl.store(first + _TEACHER_LSE * count, member.teacher_lse)
        tl.store(first + _SLOPE_SUM * count, member.slope_sum)
        tl.store(first + _LOG_S * count, member.log_s)
        tl.store(first + _TAIL_SLOPE * count, member.tail_slope)


@triton.jit
def write_log_probs(args, row, log_prob, teacher_log_prob):
    ptr, count = _fields(args, row)
    tl.store(ptr + _LOG_PROB * count, log_prob)
    tl.store(ptr + _TEACHER_LOG_PROB * count, teacher_log_prob)


@triton.jit
def write_divergence(args, row, value):
    ptr, count = _fields(args, row)
    tl.store(ptr + _DIVERGENCE * count, value)


@triton.jit
def read_statistics(args, row, P: tl.constexpr):
    """The statistics that the gradient needs."""
    ptr, count = _fields(args, row)
    student_max = tl.load(ptr + _STUDENT_MAX * count)
    student_lse = tl.load(ptr + _STUDENT_LSE * count)
    entropy = tl.load(ptr + _ENTROPY * count)
    stats = ()
    MEMBERS: tl.constexpr = max(P.members, 1)
    for i in tl.static_range(MEMBERS):
        first = ptr + (_STUDENT_FIELDS + i * _MEMBER_FIELDS) * count
        teacher_max = tl.load(first + _TEACHER_MAX * count)
        teacher_lse = tl.load(first + _TEACHER_LSE * count)
        slope_sum = tl.load(first + _SLOPE_SUM * count)
        log_s = tl.load(first + _LOG_S * count)
        tail_slope = tl.load(first + _TAIL_SLOPE * count)
        shift = teacher_lse - student_lse
        member = Statistics(
            student_max,
            teacher_max,
            student_lse,
            teacher_lse,
            shift,
            entropy,
            slope_sum,
            log_s,
            tail_slope,
        )
        stats = stats + (member,)
    return stats


@triton.jit
def clear_statistics(args, row, P: tl.constexpr):
    """Zeros the statistics of a masked row."""
    ptr, count = _fields(args, row)
    FIELDS: tl.constexpr = _STUDENT_FIELDS + max(P.members, 1) * _MEMBER_FIELDS
    for field in tl.static_range(FIELDS):
        tl.store(ptr + field * count, 0.0)
