"""How programs that share a row meet: each publishes its numbers and waits for everyone's.

A number is published in a word of 64 bits, whose upper half becomes 1. So a single read shows both
whether the number has arrived and what it is, without fences or counters: an aligned access of 64
bits is not torn, and both stores and reads go to the L2 cache. No word is used twice: a row has 64
bytes for each of its slices and meetings, which start at 0.

A GPU runs the programs of a cooperative launch side by side. Triton's interpreter runs one after
another, so a test must run them side by side itself (`tests/interpreter.py`). No program waits for
ever. There are at least as many programs as slices of a row, so each slice of a row has a different
program. Programs process slices in row order and publish for a row before they wait for it, so all
slices of the first unfinished row get published. If programs never come, the wait ends with an
error after seconds.

A small divergence is summed a second time without waiting: the last program to arrive adds up. Each
program decides from the same numbers whether a row is small. The first sum stands until all
programs have arrived.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.memory import write_divergence
from hybrid_kernels.triton_backend.reduce import INTERPRETED

# A few seconds on a GPU, where a poll takes about a microsecond.
MAX_POLLS = tl.constexpr(2**12 if plan.INTERPRETED else 2**22)
# Numbers that a program publishes at once.
NUMBERS = 8
_NUMBERS = tl.constexpr(NUMBERS)


@triton.jit
def _words(args, row, MEETING: tl.constexpr, P: tl.constexpr):
    """The words of a row's first slice. Their offsets fit into 32 bits, because the eight or
    sixteen words of a slice stand for hundreds of logits at least."""
    return args.published + (row * P.meetings + MEETING) * (P.splits * _NUMBERS)


@triton.jit
def _numbered(numbers, place):
    """The number at each lane's place; the last number beyond the end."""
    value = numbers[0]
    for i in tl.static_range(1, len(numbers)):
        value = tl.where(place >= i, numbers[i], value)
    return value


@triton.jit
def publish(args, turn, MEETING: tl.constexpr, numbers, P: tl.constexpr):
    """Publishes up to eight numbers of a slice for a meeting of its row, if that row exists."""
    place = tl.arange(0, _NUMBERS)
    bits = _numbered(numbers, place).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    ptr = _words(args, turn.row, MEETING, P) + turn.part * _NUMBERS + place
    tl.store(ptr, bits | (1 << 32), mask=place < tl.where(turn.row < args.count, _NUMBERS, 0))


@triton.jit
def meet(args, row, MEETING: tl.constexpr, P: tl.constexpr):
    """Waits for all numbers of a meeting: eight tensors `[lanes]`, one lane for each slice.

    Lanes without a slice hold the first slice's numbers. Each thread polls one slice by itself. If
    a slice never arrives, the kernel ends with a trap, which torch reports as a CUDA error.
    """
    place = tl.arange(0, P.lanes)
    ptr = _words(args, row, MEETING, P) + tl.where(place < P.splits, place, 0) * _NUMBERS
    if INTERPRETED:
        polls = 0
        late = 1
        while (late > 0) & (polls < MAX_POLLS):
            late = 0
            found = ()
            for i in tl.static_range(_NUMBERS):
                word = tl.atomic_add(ptr + i, 0)
                late += tl.max((word >> 32 == 0).to(tl.int32), 0)
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
            and.b32 t0, t0, t1;
            and.b32 t2, t2, t3;
            and.b32 t4, t4, t5;
            and.b32 t6, t6, t7;
            and.b32 t0, t0, t2;
            and.b32 t4, t4, t6;
            and.b32 t0, t0, t4;
            setp.eq.b32 late, t0, 0;
            add.u32 polls, polls, 1;
            setp.ge.and.u32 lost, polls, $9, late;
            @lost trap;
            @late bra AGAIN;
            }""",
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l,r",
            [ptr, MAX_POLLS],
            dtype=(tl.float32,) * 8,
            is_pure=False,
            pack=1,
        )


@triton.jit
def arrive(counter_ptr):
    """Makes this program's stores visible; returns how many programs arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def write_small(args, where, value, P: tl.constexpr):
    """Writes a small divergence, the sum over the slices of a row, if this program is the last."""
    ptr = args.pieces + where.row * P.splits
    tl.store(ptr + where.part, value)
    before = arrive(args.counters + where.row)
    if before == P.splits - 1:
        tl.debug_barrier()
        # Bypass the L1 cache, which other programs don't update.
        lane = tl.arange(0, P.lanes)
        pieces = tl.load(ptr + lane, mask=lane < P.splits, other=0.0, cache_modifier=".cg")
        write_divergence(args, where.row, tl.sum(pieces, 0))
