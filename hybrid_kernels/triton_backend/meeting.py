"""How programs that share a row meet: each publishes its numbers, and waits for those of all.

Every number is published in a word of 64 bits together with the number of its meeting. So a single
read tells whether it is there and what it is, without fences or counters: an aligned access of 64
bits is not torn, and a store reaches the L2 cache, which is what is read.

A GPU runs the programs of a cooperative launch side by side; Triton's interpreter runs one after
another, so that a test must run them side by side itself (`tests/interpreter.py`). Programs that
never come would hang whoever waits for them: a wait has an end, after seconds, which is an error.

What a group publishes lies in four slots in turn. A program that publishes for meeting k has passed
the wait for k - 2 at least (k - 1 where nothing lags, `resident.py`). For that every sibling has
published for k - 2, and so has read what there was of k - 4, which lies in the same slot: all its
threads have, because what it publishes has come together from all of them.

A small divergence is summed a second time, and nobody waits for it: the last to arrive adds up.
That a row is small each program finds for itself, from the same numbers. It counts if all do: each
row has its own counter, so that no later row depends on it, and the first sum stands until the last
program has arrived. There are two slots for it, because a fast program may be one row ahead.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.memory import write_divergence
from hybrid_kernels.triton_backend.reduce import INTERPRETED

# Seconds of them on a GPU, where each takes a microsecond or so.
MAX_POLLS = tl.constexpr(2**12 if plan.INTERPRETED else 2**22)
# Numbers that a program publishes at once.
NUMBERS = 8
_NUMBERS = tl.constexpr(NUMBERS)
SLOTS = 4
_SLOTS = tl.constexpr(SLOTS)
SMALL_SLOTS = 2
_SMALL_SLOTS = tl.constexpr(SMALL_SLOTS)


class Group(NamedTuple):
    """The programs that share a row, as one of them sees it.

    part: its number; words: the group's slots; pieces: the group's slots for small divergences;
    arrived: the first row's counter of arrivals for them.
    """

    part: tl.tensor
    words: tl.tensor
    pieces: tl.tensor
    arrived: tl.tensor


@triton.jit
def group_of(args, P: tl.constexpr):
    """The group of this program, and its number among the groups."""
    number = tl.program_id(0) // P.splits
    part = tl.program_id(0) % P.splits
    if P.splits == 1:
        return Group(part, part, part, part), number
    else:
        words = args.published + number * (_SLOTS * _NUMBERS * P.lanes)
        pieces = args.pieces + number * (_SMALL_SLOTS * P.lanes)
        return Group(part, words, pieces, args.counters), number


@triton.jit
def _slot(group, meeting, P: tl.constexpr):
    return group.words + meeting % _SLOTS * (_NUMBERS * P.lanes)


@triton.jit
def _numbered(numbers, place):
    """The number at a place, in every lane; the last one where there are fewer."""
    value = numbers[0]
    for i in tl.static_range(1, len(numbers)):
        value = tl.where(place >= i, numbers[i], value)
    return value


@triton.jit
def publish(group, meeting, numbers, P: tl.constexpr):
    """Publishes up to eight numbers of this program for a meeting."""
    place = tl.arange(0, _NUMBERS)
    bits = _numbered(numbers, place).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = bits | ((meeting + 1).to(tl.int64) << 32)
    tl.store(_slot(group, meeting, P) + group.part * _NUMBERS + place, word)


@triton.jit
def meet(group, meeting, P: tl.constexpr):
    """What all have published for a meeting: eight tensors `[lanes]`, one lane for each program.

    Lanes without a program hold the first one's. Each thread looks for itself at one program's.
    Where they don't arrive, a GPU's kernel ends with a trap, which torch reports as a CUDA error.
    """
    place = tl.arange(0, P.lanes)
    ptr = _slot(group, meeting, P) + tl.where(place < P.splits, place, 0) * _NUMBERS
    if INTERPRETED:
        polls = 0
        late = 1
        while (late > 0) & (polls < MAX_POLLS):
            late = 0
            found = ()
            for i in tl.static_range(_NUMBERS):
                word = tl.atomic_add(ptr + i, 0)
                late += tl.max(((word >> 32) != meeting + 1).to(tl.int32), 0)
                found = found + (word.to(tl.int32).to(tl.float32, bitcast=True),)
            polls += 1
        assert late == 0, "programs that share a row did not arrive"
        return found
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred late, lost;
            .reg .b64 w0, w1, w2, w3, w4, w5, w6, w7;
            .reg .b32 t0, t1, t2, t3, t4, t5, t6, t7, polls;
            mov.u32 polls, 0;
            AGAIN:
            ld.relaxed.gpu.global.v2.b64 {w0, w1}, [$8];
            ld.relaxed.gpu.global.v2.b64 {w2, w3}, [$8 + 16];
            ld.relaxed.gpu.global.v2.b64 {w4, w5}, [$8 + 32];
            ld.relaxed.gpu.global.v2.b64 {w6, w7}, [$8 + 48];
            mov.b64 {$0, t0}, w0;
            mov.b64 {$1, t1}, w1;
            mov.b64 {$2, t2}, w2;
            mov.b64 {$3, t3}, w3;
            mov.b64 {$4, t4}, w4;
            mov.b64 {$5, t5}, w5;
            mov.b64 {$6, t6}, w6;
            mov.b64 {$7, t7}, w7;
            xor.b32 t0, t0, $9;
            xor.b32 t1, t1, $9;
            xor.b32 t2, t2, $9;
            xor.b32 t3, t3, $9;
            xor.b32 t4, t4, $9;
            xor.b32 t5, t5, $9;
            xor.b32 t6, t6, $9;
            xor.b32 t7, t7, $9;
            or.b32 t0, t0, t1;
            or.b32 t2, t2, t3;
            or.b32 t4, t4, t5;
            or.b32 t6, t6, t7;
            or.b32 t0, t0, t2;
            or.b32 t4, t4, t6;
            or.b32 t0, t0, t4;
            setp.ne.b32 late, t0, 0;
            add.u32 polls, polls, 1;
            setp.ge.and.u32 lost, polls, $10, late;
            @lost trap;
            @late bra AGAIN;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l,r,r",
            [ptr, meeting + 1, MAX_POLLS],
            dtype=(tl.float32,) * 8,
            is_pure=False,
            pack=1,
        )


@triton.jit
def arrive(counter_ptr):
    """Makes what this program has stored visible; returns how many arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def write_small(args, group, row, meeting, value, P: tl.constexpr):
    """Writes a small divergence, the sum over the slices of a row, if this program is the last."""
    ptr = group.pieces + meeting % _SMALL_SLOTS * P.lanes
    tl.store(ptr + group.part, value)
    before = arrive(group.arrived + row)
    if before == P.splits - 1:
        tl.debug_barrier()
        # Past the L1 cache, which other programs don't update.
        lane = tl.arange(0, P.lanes)
        pieces = tl.load(ptr + lane, mask=lane < P.splits, other=0.0, cache_modifier=".cg")
        write_divergence(args, row, tl.sum(pieces, 0))
