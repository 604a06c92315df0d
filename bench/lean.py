"""A prototype: the row-resident kernel for one problem alone, with as few instructions as may be.

The problem is reverse KL with a policy gradient and an entropy bonus: bf16, rows that begin at 16
bytes, every row wanted, every logit finite and far from the ends of its range. What the shipped
kernel (`triton_backend/resident.py`) does besides is left out, to see what the rest can be worth.
Nothing but the benchmarks calls it.

A row is cut into SPLITS slices, one for each program of a *group*, as in the shipped kernel: a
program keeps its slice in registers, publishes its sums, waits for its siblings, merges all sums
and writes its slice of the gradient. The ideas under test:

- Logits stay packed, two to a register, and are unpacked where they are used, twice. So a prefetch
  of the next row is not waited for where it was begun, and half as many registers hold a slice.
- Statistics are alike in all lanes of a warp: tiles are [W, 128] for W warps, sums are [W, 1]. No
  reduction crosses warps; each warp publishes its own sums and merges those of all warps. (Not
  with WORDS, which are too many for that: programs publish.)
- A row's coefficients and its sampled token are read before the wait.
- An exponent is one fused multiply-add of the raw logit, the same in sums and gradient.
- sum e d, for the divergence, is sum e y - sum e u; see below.
- LAG: a program publishes its sums of the next row before it waits for those of this one, so that
  what is waited for has had the time of a gradient to arrive.
- TWO: loads begin into the registers that a gradient frees, so that there are never more than two
  rows in registers, where LAG alone has three.
- WORDS: every number is published in 64 bits together with the meeting that it belongs to. So a
  single read tells whether it is there and what it is; there are no fences and no counters.
  (Aligned accesses of 64 bits are not torn.)

With s = log2(e)/T, and M and N the maxima of s z and s w:

    y = s z - M,  u = s w - N,  e = 2^y,  f = 2^u,  E = sum e,  F = sum f
    log p = ln2 (y - log2 E),  log q = ln2 (u - log2 F)
    KL(p||q) = ln2 ((sum e y - sum e u) / E - log2 E + log2 F)
    H(p) = ln2 (log2 E - sum e y / E)
    T dD/dz = p (log p - log q - KL),  T dH/dz = -p (log p + H),  T dlog p(i)/dz = [v = i] - p

so that a gradient is e (a + b y + c u), whose a, b and c are constants of the row, and the sampled
token's own term. M is s max z as rounded, in every program: slices are merged by differences of
these rounded products, so that their rounding cancels, however far from 0 the logits are.

What a group publishes lies in SLOTS slots in turn, each with a counter of its own unless there are
WORDS. A program that arrives at meeting k has passed the wait for k - 1 (k - 2 under LAG), for
which every sibling had arrived, after reading what it was to read of k - 2 (k - 4). So two slots
are enough, and four under LAG, where one counter for all would not do: a fast program's next
arrival would pass for a slow one's. (With WORDS to publish is to arrive: all threads of a program
have read a meeting before their sums of a later one are reduced.)

On an H100, counted on the same bytes, `add` runs at 100 %, this at 70 %, with LAG at 80 %, with
LAG and WORDS at 83 to 89 % (bench/results). Asking the L2 cache for rows ahead, and looking at the
meeting before the sums instead of after them, were tried and were slower by 3 to 14 %.

PLAIN replaces inline assembly, for the interpreter, which has none.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.meeting import MAX_POLLS, wait

SLOTS = 4
# That a program publishes, for each of its warps or once in words: the fields of `Sums`.
PUBLISHED = 6
_PUBLISHED = tl.constexpr(PUBLISHED)
# Numbers of 32 bits that a warp holds of a tile: four in a thread, which are loaded at once. Triton
# cuts every tile [W, TILE] alike, a row to a warp; others it moves through shared memory.
TILE = 4 * plan.WARP
_TILE = tl.constexpr(TILE)
# 128 bytes, so that groups count in different lines of the cache.
COUNTERS = 32
_COUNTERS = tl.constexpr(COUNTERS)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Two entries of -2^100 in one register. The product of a power of two with the scale is exact, so
# that y is 0 where a warp has nothing else. Of another number, a fused multiply-add and the rounded
# product would leave 1e22, whose exponential is infinite.
PADDING = tl.constexpr(-0x0E7F0E80)


class Sums(NamedTuple):
    """Of a warp's part of a row, or of the row; [W, 1] each. M and N, E, F, sum e y, sum e u."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    student: tl.tensor
    teacher: tl.tensor
    student_y: tl.tensor
    student_u: tl.tensor


class Slope(NamedTuple):
    """A row's gradient e (a + b y + c u), with the maxima that y and u are about; [W, 1] each."""

    student_max: tl.tensor
    teacher_max: tl.tensor
    a: tl.tensor
    b: tl.tensor
    c: tl.tensor


# -- arithmetic, and its twins without assembly ----------------------------------------------------


@triton.jit
def _low(pair):
    """The first entry of a pair, in fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _low_again(pair, PLAIN: tl.constexpr):
    """`_low`, where the compiler must not see that it did this before: it would keep the results,
    which are twice as many registers as the pairs."""
    if PLAIN:
        return _low(pair)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 16;", "=f,r", [pair], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def _high_again(pair, PLAIN: tl.constexpr):
    if PLAIN:
        return _high(pair)
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xffff0000;", "=f,r", [pair], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def _larger_pair(a, b, PLAIN: tl.constexpr):
    """The larger of the first entries, and of the second ones."""
    if PLAIN:
        low = tl.maximum(_low(a), _low(b)).to(tl.int32, bitcast=True)
        high = tl.maximum(_high(a), _high(b)).to(tl.int32, bitcast=True)
        return ((low >> 16) & 65535) | (high & -65536)
    else:
        return tl.inline_asm_elementwise(
            "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _pack(low, high, PLAIN: tl.constexpr):
    """Two entries rounded to bf16. (One by one, they are rounded at an eighth of the rate.)"""
    if PLAIN:
        first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        second = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return first | second
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def _fma(a, b, c, PLAIN: tl.constexpr):
    """a b + c, rounded once. (The interpreter of Triton 3.6 rounds `tl.fma` twice.)"""
    if PLAIN:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _larger_2(a, b, a2, b2):
    return tl.maximum(a, a2), tl.maximum(b, b2)


@triton.jit
def _max_2(a, b, PLAIN: tl.constexpr):
    """Over lanes. (The interpreter is slow at a reduction that it does not know.)"""
    if PLAIN:
        return tl.max(a, 1, keep_dims=True), tl.max(b, 1, keep_dims=True)
    else:
        return tl.reduce((a, b), 1, _larger_2, keep_dims=True)


@triton.jit
def _add_4(a, b, c, d, a2, b2, c2, d2):
    return a + a2, b + b2, c + c2, d + d2


@triton.jit
def _sum_4(a, b, c, d, PLAIN: tl.constexpr):
    if PLAIN:
        return (
            tl.sum(a, 1, keep_dims=True),
            tl.sum(b, 1, keep_dims=True),
            tl.sum(c, 1, keep_dims=True),
            tl.sum(d, 1, keep_dims=True),
        )
    else:
        return tl.reduce((a, b, c, d), 1, _add_4, keep_dims=True)


# -- a slice ---------------------------------------------------------------------------------------


@triton.jit
def _places(i, W: tl.constexpr):
    """Where in its slice the pairs of a chunk are: a thread has four neighbours."""
    return i * (W * _TILE) + tl.arange(0, W)[:, None] * _TILE + tl.arange(0, _TILE)[None, :]


@triton.jit
def _limit(part, V: tl.constexpr, SLICE: tl.constexpr):
    """Pairs of a slice. (A row's last one may be shorter.)"""
    return tl.minimum(SLICE // 2, V // 2 - part * (SLICE // 2))


@triton.jit
def _slice_of(ptr, stride, row, part, SLICE: tl.constexpr):
    return ptr + row.to(tl.int64) * (stride * 4) + part * (SLICE // 2)


@triton.jit
def _load(
    ptr, stride, row, part, count, V: tl.constexpr, SLICE: tl.constexpr, CHUNKS: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """A slice of a row in pairs, CHUNKS tiles; padding where there is no such row."""
    ptr = _slice_of(ptr, stride, row, part, SLICE)
    limit = tl.where(row < count, _limit(part, V, SLICE), 0)
    pairs = ()
    for i in tl.static_range(CHUNKS):
        within = _places(i, W)
        chunk = tl.load(ptr + within, mask=within < limit, other=PADDING)
        pairs = pairs + (chunk,)
    return pairs


@triton.jit
def _largest(pairs, CHUNKS: tl.constexpr, PLAIN: tl.constexpr):
    top = pairs[0]
    for i in tl.static_range(1, CHUNKS):
        top = _larger_pair(top, pairs[i], PLAIN)
    return tl.maximum(_low(top), _high(top))


@triton.jit
def _sums(zs, ws, scale, CHUNKS: tl.constexpr, PLAIN: tl.constexpr):
    """Of what each warp holds of a slice."""
    z_max, w_max = _max_2(_largest(zs, CHUNKS, PLAIN), _largest(ws, CHUNKS, PLAIN), PLAIN)
    z_max *= scale
    w_max *= scale
    for i in tl.static_range(CHUNKS):
        y0 = _fma(_low(zs[i]), scale, -z_max, PLAIN)
        y1 = _fma(_high(zs[i]), scale, -z_max, PLAIN)
        u0 = _fma(_low(ws[i]), scale, -w_max, PLAIN)
        u1 = _fma(_high(ws[i]), scale, -w_max, PLAIN)
        e0 = tl.exp2(y0)
        e1 = tl.exp2(y1)
        f = tl.exp2(u0) + tl.exp2(u1)
        if i == 0:
            student = e0 + e1
            teacher = f
            student_y = e0 * y0 + e1 * y1
            student_u = e0 * u0 + e1 * u1
        else:
            student += e0 + e1
            teacher += f
            student_y += e0 * y0
            student_y += e1 * y1
            student_u += e0 * u0
            student_u += e1 * u1
    student, teacher, student_y, student_u = _sum_4(student, teacher, student_y, student_u, PLAIN)
    return Sums(z_max, w_max, student, teacher, student_y, student_u)


# -- the meeting -----------------------------------------------------------------------------------


@triton.jit
def _numbered(sums, field):
    """The number of that field of `Sums`, in every lane."""
    value = tl.where(field == 0, sums.student_max, sums.teacher_max)
    value = tl.where(field == 2, sums.student, value)
    value = tl.where(field == 3, sums.teacher, value)
    value = tl.where(field == 4, sums.student_y, value)
    return tl.where(field == 5, sums.student_u, value)


@triton.jit
def _publish(slot_ptr, counter_ptr, part, sums, LANES: tl.constexpr, W: tl.constexpr):
    """Each warp's sums, in one store, then the arrival."""
    field = tl.arange(0, 32)[None, :]
    value = _numbered(sums, field)
    ptr = slot_ptr + part * W + tl.arange(0, W)[:, None] + field * LANES
    tl.store(ptr, value, mask=field < _PUBLISHED)
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _read(slot_ptr, field, i, empty, SPLITS: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr):
    """One number from each of TILE warps of a group, in every warp. Past the L1 cache, which other
    programs don't update."""
    lane = i * _TILE + tl.arange(0, _TILE)[None, :] + tl.zeros((W, 1), tl.int32)
    return tl.load(
        slot_ptr + field * LANES + lane, mask=lane < SPLITS * W, other=empty, cache_modifier=".cg"
    )


@triton.jit
def _about(part, z_max, w_max):
    """Sums about larger maxima."""
    lower_z = part[0] - z_max
    lower_w = part[1] - w_max
    share = tl.exp2(lower_z)
    return (
        share * part[2],
        tl.exp2(lower_w) * part[3],
        share * (part[4] + part[2] * lower_z),
        share * (part[5] + part[2] * lower_w),
    )


@triton.jit
def _merged(
    slot_ptr, SPLITS: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr, PLAIN: tl.constexpr
):
    """The row's sums, alike in all warps."""
    parts = ()
    for i in tl.static_range(LANES // _TILE):
        part = (
            _read(slot_ptr, 0, i, -1e30, SPLITS, LANES, W),
            _read(slot_ptr, 1, i, -1e30, SPLITS, LANES, W),
            _read(slot_ptr, 2, i, 0.0, SPLITS, LANES, W),
            _read(slot_ptr, 3, i, 0.0, SPLITS, LANES, W),
            _read(slot_ptr, 4, i, 0.0, SPLITS, LANES, W),
            _read(slot_ptr, 5, i, 0.0, SPLITS, LANES, W),
        )
        parts = parts + (part,)
    z_max = parts[0][0]
    w_max = parts[0][1]
    for i in tl.static_range(1, LANES // _TILE):
        z_max = tl.maximum(z_max, parts[i][0])
        w_max = tl.maximum(w_max, parts[i][1])
    z_max, w_max = _max_2(z_max, w_max, PLAIN)
    student, teacher, student_y, student_u = _about(parts[0], z_max, w_max)
    for i in tl.static_range(1, LANES // _TILE):
        more, more_teacher, more_y, more_u = _about(parts[i], z_max, w_max)
        student += more
        teacher += more_teacher
        student_y += more_y
        student_u += more_u
    student, teacher, student_y, student_u = _sum_4(student, teacher, student_y, student_u, PLAIN)
    return Sums(z_max, w_max, student, teacher, student_y, student_u)


# -- a meeting without a fence: each number travels with the meeting that it belongs to ------------


@triton.jit
def _merge_2(
    z_max, w_max, student, teacher, student_y, student_u,
    z_max2, w_max2, student2, teacher2, student_y2, student_u2,
):  # fmt: skip
    z = tl.maximum(z_max, z_max2)
    w = tl.maximum(w_max, w_max2)
    part = _about((z_max, w_max, student, teacher, student_y, student_u), z, w)
    part2 = _about((z_max2, w_max2, student2, teacher2, student_y2, student_u2), z, w)
    return (
        z,
        w,
        part[0] + part2[0],
        part[1] + part2[1],
        part[2] + part2[2],
        part[3] + part2[3],
    )


@triton.jit
def _merged_warps(sums, PLAIN: tl.constexpr):
    """Those of a program, which all of its threads know."""
    if PLAIN:
        z_max = tl.max(sums.student_max, 0, keep_dims=True)
        w_max = tl.max(sums.teacher_max, 0, keep_dims=True)
        part = _about(
            (sums.student_max, sums.teacher_max, sums.student, sums.teacher, sums.student_y,
             sums.student_u), z_max, w_max,
        )  # fmt: skip
        return Sums(
            tl.max(tl.max(z_max, 1), 0),
            tl.max(tl.max(w_max, 1), 0),
            tl.sum(tl.sum(part[0], 0), 0),
            tl.sum(tl.sum(part[1], 0), 0),
            tl.sum(tl.sum(part[2], 0), 0),
            tl.sum(tl.sum(part[3], 0), 0),
        )
    else:
        z, w, e, f, y, u = tl.reduce(
            (
                sums.student_max,
                sums.teacher_max,
                sums.student,
                sums.teacher,
                sums.student_y,
                sums.student_u,
            ),
            0,
            _merge_2,
        )
        return Sums(
            tl.max(z, 0), tl.max(w, 0), tl.max(e, 0), tl.max(f, 0), tl.max(y, 0), tl.max(u, 0)
        )


@triton.jit
def _publish_words(slot_ptr, part, sums, epoch):
    """A program's sums, each in a word of 64 bits with the number of the meeting above it."""
    field = tl.arange(0, 8)
    value = _numbered(sums, field)
    word = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = word | (epoch.to(tl.int64) << 32)
    tl.store(slot_ptr + part * 8 + field, word)


@triton.jit
def _field(word):
    return word.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _waited_for(slot_ptr, epoch, SPLITS: tl.constexpr, LANES: tl.constexpr, PLAIN: tl.constexpr):
    """The six numbers of each program, once they are those of a meeting. Each thread looks for
    itself at one program's."""
    place = tl.arange(0, LANES)
    ptr = slot_ptr + tl.where(place < SPLITS, place, 0) * 8
    if PLAIN:
        polls = 0
        late = 1
        while (late > 0) & (polls < MAX_POLLS):
            a = tl.atomic_add(ptr, 0)
            b = tl.atomic_add(ptr + 1, 0)
            c = tl.atomic_add(ptr + 2, 0)
            d = tl.atomic_add(ptr + 3, 0)
            e = tl.atomic_add(ptr + 4, 0)
            f = tl.atomic_add(ptr + 5, 0)
            other = ((a >> 32) ^ epoch) | ((b >> 32) ^ epoch) | ((c >> 32) ^ epoch)
            other = other | ((d >> 32) ^ epoch) | ((e >> 32) ^ epoch) | ((f >> 32) ^ epoch)
            late = tl.max((other != 0).to(tl.int32), 0)
            polls += 1
        assert late == 0, "programs that share a row did not arrive"
        return _field(a), _field(b), _field(c), _field(d), _field(e), _field(f)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred late, lost;
            .reg .b64 w0, w1, w2, w3, w4, w5;
            .reg .b32 v0, v1, v2, v3, v4, v5, t0, t1, t2, t3, t4, t5, polls;
            mov.u32 polls, 0;
            AGAIN:
            ld.relaxed.gpu.global.v2.b64 {w0, w1}, [$6];
            ld.relaxed.gpu.global.v2.b64 {w2, w3}, [$6 + 16];
            ld.relaxed.gpu.global.v2.b64 {w4, w5}, [$6 + 32];
            mov.b64 {v0, t0}, w0;
            mov.b64 {v1, t1}, w1;
            mov.b64 {v2, t2}, w2;
            mov.b64 {v3, t3}, w3;
            mov.b64 {v4, t4}, w4;
            mov.b64 {v5, t5}, w5;
            xor.b32 t0, t0, $7;
            xor.b32 t1, t1, $7;
            xor.b32 t2, t2, $7;
            xor.b32 t3, t3, $7;
            xor.b32 t4, t4, $7;
            xor.b32 t5, t5, $7;
            or.b32 t0, t0, t1;
            or.b32 t2, t2, t3;
            or.b32 t4, t4, t5;
            or.b32 t0, t0, t2;
            or.b32 t0, t0, t4;
            setp.ne.b32 late, t0, 0;
            add.u32 polls, polls, 1;
            setp.ge.and.u32 lost, polls, $8, late;
            @lost trap;
            @late bra AGAIN;
            mov.b32 $0, v0;
            mov.b32 $1, v1;
            mov.b32 $2, v2;
            mov.b32 $3, v3;
            mov.b32 $4, v4;
            mov.b32 $5, v5;
            }""",
            "=f,=f,=f,=f,=f,=f,l,r,r",
            [ptr, epoch, MAX_POLLS],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def _met(slot_ptr, epoch, SPLITS: tl.constexpr, LANES: tl.constexpr, PLAIN: tl.constexpr):
    """The row's sums, in every thread."""
    there = tl.arange(0, LANES) < SPLITS
    got = _waited_for(slot_ptr, epoch, SPLITS, LANES, PLAIN)
    z = tl.where(there, got[0], -1e30)
    w = tl.where(there, got[1], -1e30)
    student = tl.where(there, got[2], 0.0)
    teacher = tl.where(there, got[3], 0.0)
    student_y = tl.where(there, got[4], 0.0)
    student_u = tl.where(there, got[5], 0.0)
    if PLAIN:
        z_max = tl.max(z, 0)
        w_max = tl.max(w, 0)
    else:
        z_max, w_max = tl.reduce((z, w), 0, _larger_2)
    e, f, y, u = _about((z, w, student, teacher, student_y, student_u), z_max, w_max)
    if PLAIN:
        return Sums(z_max, w_max, tl.sum(e, 0), tl.sum(f, 0), tl.sum(y, 0), tl.sum(u, 0))
    else:
        e, f, y, u = tl.reduce((e, f, y, u), 0, _add_4)
        return Sums(z_max, w_max, e, f, y, u)


# -- the gradient ----------------------------------------------------------------------------------


@triton.jit
def _row(sums, c_div, c_logp, c_ent):
    """Divergence, entropy, log2 E and log2 F, and the gradient's constants."""
    log_e = tl.log2(sums.student)
    log_f = tl.log2(sums.teacher)
    share = 1.0 / sums.student
    kl = LN2 * ((sums.student_y - sums.student_u) / sums.student - log_e + log_f)
    entropy = LN2 * (log_e - sums.student_y / sums.student)
    a = c_div * (LN2 * (log_f - log_e) - kl) - c_logp - c_ent * (entropy - LN2 * log_e)
    slope = Slope(
        sums.student_max,
        sums.teacher_max,
        a * share,
        (c_div - c_ent) * LN2 * share,
        -c_div * LN2 * share,
    )
    return kl, entropy, log_e, log_f, slope


@triton.jit
def _gradient(z, w, slope, scale, PLAIN: tl.constexpr):
    """That of both entries of pairs, but for the sampled token's own term."""
    y0 = _fma(_low_again(z, PLAIN), scale, -slope.student_max, PLAIN)
    y1 = _fma(_high_again(z, PLAIN), scale, -slope.student_max, PLAIN)
    u0 = _fma(_low_again(w, PLAIN), scale, -slope.teacher_max, PLAIN)
    u1 = _fma(_high_again(w, PLAIN), scale, -slope.teacher_max, PLAIN)
    first = tl.exp2(y0) * tl.fma(u0, slope.c, tl.fma(y0, slope.b, slope.a))
    second = tl.exp2(y1) * tl.fma(u1, slope.c, tl.fma(y1, slope.b, slope.a))
    return first, second


@triton.jit
def _store_gradient(
    ptr, part, zs, ws, slope, scale, V: tl.constexpr, SLICE: tl.constexpr, CHUNKS: tl.constexpr,
    W: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    ptr += part * (SLICE // 2)
    limit = _limit(part, V, SLICE)
    for i in tl.static_range(CHUNKS):
        within = _places(i, W)
        first, second = _gradient(zs[i], ws[i], slope, scale, PLAIN)
        pair = _pack(first, second, PLAIN)
        tl.store(ptr + within, pair, mask=within < limit)


@triton.jit
def _store_gradient_and_load(
    ptr, part, zs, ws, slope, scale, next_z_ptr, next_w_ptr, there, V: tl.constexpr,
    SLICE: tl.constexpr, CHUNKS: tl.constexpr, W: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """`_store_gradient`, with the loads of a later row into the registers that become free."""
    ptr += part * (SLICE // 2)
    limit = _limit(part, V, SLICE)
    wanted = tl.where(there, limit, 0)
    next_zs = ()
    next_ws = ()
    for i in tl.static_range(CHUNKS):
        within = _places(i, W)
        first, second = _gradient(zs[i], ws[i], slope, scale, PLAIN)
        pair = _pack(first, second, PLAIN)
        tl.store(ptr + within, pair, mask=within < limit)
        z = tl.load(next_z_ptr + within, mask=within < wanted, other=PADDING)
        w = tl.load(next_w_ptr + within, mask=within < wanted, other=PADDING)
        next_zs = next_zs + (z,)
        next_ws = next_ws + (w,)
    return next_zs, next_ws


@triton.jit
def _store_sampled(ptr, token, z, w, slope, own, scale, W: tl.constexpr, PLAIN: tl.constexpr):
    """Writes the gradient of the sampled token's pair over what its slice has stored: that, and
    `own`. One entry mended afterwards costs less than a comparison in every lane."""
    first, second = _gradient(z, w, slope, scale, PLAIN)
    first += tl.where(token % 2 == 0, own, 0.0)
    second += tl.where(token % 2 == 0, 0.0, own)
    # Another thread may have stored it.
    tl.debug_barrier()
    within = _places(0, W)
    pair = token // 2
    at = pair // 4 * 4 + within
    tl.store(ptr + at, _pack(first, second, PLAIN), mask=at == pair)


@triton.jit
def lean_kernel(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    token_ptr,
    divergence_ptr,
    log_prob_ptr,
    entropy_ptr,
    statistics_ptr,
    published_ptr,
    counter_ptr,
    count,
    groups,
    inv_t,
    V: tl.constexpr,
    SLICE: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    LAG: tl.constexpr,
    TWO: tl.constexpr,
    WORDS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Statistics and gradient of the rows of a group.

    Logits and gradient are int32, two entries each. Strides count 16 bytes, which tells the
    compiler that rows begin at multiples of as many.
    """
    SLOT: tl.constexpr = 8 * LANES if WORDS else _PUBLISHED * LANES
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    published_ptr += group * (SLOTS * SLOT)
    if not WORDS:
        counter_ptr += group * _COUNTERS
    scale = inv_t * LOG2E

    row = group
    meeting = 0
    zs = _load(student_ptr, student_stride, row, part, count, V, SLICE, CHUNKS, W)
    ws = _load(teacher_ptr, teacher_stride, row, part, count, V, SLICE, CHUNKS, W)
    if LAG or TWO:
        ahead = row + groups
        next_zs = _load(student_ptr, student_stride, ahead, part, count, V, SLICE, CHUNKS, W)
        next_ws = _load(teacher_ptr, teacher_stride, ahead, part, count, V, SLICE, CHUNKS, W)
    if LAG:
        sums = _sums(zs, ws, scale, CHUNKS, PLAIN)
        if WORDS:
            _publish_words(published_ptr, part, _merged_warps(sums, PLAIN), meeting + 1)
        else:
            _publish(published_ptr, counter_ptr, part, sums, LANES, W)
    while row < count:
        # All that a row needs from memory, before it is waited for. (The gradient may overwrite the
        # student's logits.)
        c_div = tl.load(divergence_ptr + row) * inv_t
        c_logp = tl.load(log_prob_ptr + row) * inv_t
        c_ent = tl.load(entropy_ptr + row) * inv_t
        token = tl.load(token_ptr + row).to(tl.int32)
        owned = token // SLICE == part
        start = row.to(tl.int64) * (student_stride * 4)
        z_token = tl.load(student_ptr + start + token // 2, mask=owned, other=0)
        start = row.to(tl.int64) * (teacher_stride * 4)
        w_token = tl.load(teacher_ptr + start + token // 2, mask=owned, other=0)
        # What is published now: this row's sums or, under LAG, the next one's.
        if LAG:
            sums = _sums(next_zs, next_ws, scale, CHUNKS, PLAIN)
            slot = (meeting + 1) % SLOTS
            ahead = row + 2 * groups
        else:
            sums = _sums(zs, ws, scale, CHUNKS, PLAIN)
            slot = meeting % SLOTS
            ahead = row + groups
        if WORDS:
            own = _merged_warps(sums, PLAIN)
            _publish_words(published_ptr + slot * SLOT, part, own, meeting + LAG + 1)
        else:
            _publish(published_ptr + slot * SLOT, counter_ptr + slot, part, sums, LANES, W)
        if not TWO:
            far_zs = _load(student_ptr, student_stride, ahead, part, count, V, SLICE, CHUNKS, W)
            far_ws = _load(teacher_ptr, teacher_stride, ahead, part, count, V, SLICE, CHUNKS, W)

        slot = meeting % SLOTS
        if WORDS:
            slot_ptr = published_ptr + slot * SLOT
            merged = _met(slot_ptr, meeting + 1, SPLITS, LANES, PLAIN)
        else:
            wait(counter_ptr + slot, (meeting // SLOTS + 1) * SPLITS)
            merged = _merged(published_ptr + slot * SLOT, SPLITS, LANES, W, PLAIN)
        meeting += 1
        kl, entropy, log_e, log_f, slope = _row(merged, c_div, c_logp, c_ent)
        ptr = gradient_ptr + row.to(tl.int64) * (gradient_stride * 4)
        if TWO:
            ahead = row + 2 * groups
            far_zs, far_ws = _store_gradient_and_load(
                ptr, part, zs, ws, slope, scale,
                _slice_of(student_ptr, student_stride, ahead, part, SLICE),
                _slice_of(teacher_ptr, teacher_stride, ahead, part, SLICE),
                ahead < count, V, SLICE, CHUNKS, W, PLAIN,
            )  # fmt: skip
        else:
            _store_gradient(ptr, part, zs, ws, slope, scale, V, SLICE, CHUNKS, W, PLAIN)
        if owned:
            _store_sampled(ptr, token, z_token, w_token, slope, c_logp, scale, W, PLAIN)
        if part == 0:
            field = _places(0, W)
            value = tl.where(field == 0, kl, entropy)
            value = tl.where(field == 2, log_e, value)
            value = tl.where(field == 3, log_f, value)
            tl.store(statistics_ptr + row * 4 + field, value, mask=field < 4)
        row += groups
        if LAG or TWO:
            zs = next_zs
            ws = next_ws
            next_zs = far_zs
            next_ws = far_ws
        else:
            zs = far_zs
            ws = far_ws


# -- the launcher ----------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Compile-time constants and grid.

    `splits` programs of `num_warps` warps share a row in slices of `slice_v` entries, which a
    program holds as `chunks` tiles; `groups` rows are in flight at once. `lanes` is room for what
    all warps of a group publish; with words, for its programs.
    """

    vocabulary: int
    slice_v: int
    chunks: int
    splits: int
    lanes: int
    num_warps: int
    registers: int
    groups: int
    lag: bool
    two: bool
    words: bool


def shape(
    vocabulary: int,
    rows: int,
    multiprocessors: int,
    slice_max: int = 8000,
    num_warps: int = 4,
    lag: bool = False,
    programs: int = 2,
    two: bool = False,
    words: bool = False,
) -> Shape:
    """Equal slices, of which the last may be shorter.

    Args:
        vocabulary: V.
        rows: N.
        multiprocessors: of the device.
        slice_max: entries of the longest slice.
        num_warps: of a program, a power of two.
        lag: whether a row is published before the one before it is waited for.
        two: whether at most two rows are in registers.
        words: whether each number tells which meeting it belongs to; there are counters otherwise.
        programs: that a multiprocessor holds at once.

    Raises:
        ValueError: V is not a multiple of 16, or a row needs more programs than the device holds.
    """
    if vocabulary <= 0 or vocabulary % 16:
        raise ValueError(f"vocabulary: must be a positive multiple of 16, not {vocabulary}")
    multiple = plan.SLICE_MULTIPLE
    splits = -(-vocabulary // slice_max)
    slice_v = -(-vocabulary // (splits * multiple)) * multiple
    splits = -(-vocabulary // slice_v)
    groups = min(rows, multiprocessors * programs // splits)
    if groups == 0 and rows:
        raise ValueError(
            f"vocabulary: a row of {vocabulary} needs {splits} programs, "
            f"and the device holds {multiprocessors * programs}"
        )
    return Shape(
        vocabulary,
        slice_v,
        -(-slice_v // (num_warps * 2 * TILE)),
        splits,
        triton.next_power_of_2(splits) if words else -(-splits * num_warps // TILE) * TILE,
        num_warps,
        min(255, 65536 // (programs * num_warps * plan.WARP) // 8 * 8),
        groups,
        lag,
        two,
        words,
    )


def lean(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    shape: Shape,
    inv_t: float = 1.0,
) -> Tensor:
    """Writes c_div dD/dz + c_logp dlog p(y)/dz + c_ent dH/dz, with D = KL(p||q), to `gradient`.

    Args:
        student: logits `[N, V]`, bf16, finite; rows begin at multiples of 16 bytes.
        teacher: likewise.
        token_ids: y, `[N]`, int64, each in 0 .. V - 1.
        coefficients: c_div, c_logp and c_ent, fp32, `[N]` each.
        gradient: like the logits; it may be `student`.
        shape: from the function of that name.
        inv_t: 1/T.

    Returns:
        `[4, N]`, fp32: D, H(p), and log2 of the sums of exp((z - max z) / T) and of
        exp((w - max w) / T).

    Raises:
        ValueError: a tensor that is not as described.
    """
    count = student.shape[0]
    for name, tensor in (("student", student), ("teacher", teacher), ("gradient", gradient)):
        if tensor.dtype != torch.bfloat16 or tensor.shape != (count, shape.vocabulary):
            raise ValueError(f"{name}: must be bf16 [{count}, {shape.vocabulary}]")
        if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.storage_offset() % 8:
            raise ValueError(f"{name}: rows must be contiguous and begin at multiples of 16 bytes")
    statistics = torch.empty((count, 4), dtype=torch.float32, device=student.device)
    if not count:
        return statistics.t()
    if shape.words:
        places = shape.groups * SLOTS * 8 * shape.lanes
        published = torch.zeros(places, dtype=torch.int64, device=student.device)
    else:
        published = statistics.new_empty(shape.groups * SLOTS * PUBLISHED * shape.lanes)
    counters = None
    if not shape.words:
        counters = torch.zeros(shape.groups * COUNTERS, dtype=torch.int32, device=student.device)
    lean_kernel[(shape.groups * shape.splits,)](
        *(tensor.view(torch.int32) for tensor in (student, teacher, gradient)),
        *(tensor.stride(0) // 8 for tensor in (student, teacher, gradient)),
        token_ids,
        *coefficients,
        statistics,
        published,
        counters,
        count,
        shape.groups,
        inv_t,
        V=shape.vocabulary,
        SLICE=shape.slice_v,
        CHUNKS=shape.chunks,
        SPLITS=shape.splits,
        LANES=shape.lanes,
        W=shape.num_warps,
        SLOTS=SLOTS,
        LAG=shape.lag,
        TWO=shape.two,
        WORDS=shape.words,
        PLAIN=plan.INTERPRETED,
        num_warps=shape.num_warps,
        maxnreg=shape.registers,
        enable_fp_fusion=True,
        launch_cooperative_grid=True,
    )
    return statistics.t()
