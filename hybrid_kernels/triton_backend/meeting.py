"""How programs that share a row meet: each publishes its numbers, says that it has arrived, and
waits until all have.

What is published before an arrival can be read after the wait. A GPU runs the programs of a
cooperative launch side by side; Triton's interpreter runs one after another, so that a test must
run them side by side itself (`tests/interpreter.py`). Programs that never come would hang whoever
waits for them: a wait has an end, after seconds, which is an error.

What is published lies in one of two alternating slots. A program that writes a slot for the second
time has passed the meeting in between, for which every sibling has first read that slot.

A small divergence is summed a second time, in a slot of its own, and nobody waits for it: the last
to arrive adds up. That a row is small each program finds for itself, from the same numbers. It
counts if all do: each row has its own counter, so that no later row depends on it, and the first
sum stands until the last program has arrived.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.divergences import START, all_together, no_slopes
from hybrid_kernels.triton_backend.memory import write_divergence
from hybrid_kernels.triton_backend.reduce import INTERPRETED
from hybrid_kernels.triton_backend.sums import Sums, about

# Seconds of them on a GPU, where each takes a microsecond or so.
MAX_POLLS = tl.constexpr(2**12 if plan.INTERPRETED else 2**22)
# Numbers that a program publishes at once for each member, at most: the fields of `Sums`.
PUBLISHED = 8
_PUBLISHED = tl.constexpr(PUBLISHED)
# Slots of a group: those that meetings take in turn, and one for small divergences.
SLOTS = 3
_SLOTS = tl.constexpr(SLOTS)
_IN_TURN = tl.constexpr(2)
_SMALL_SLOT = _IN_TURN


class Group(NamedTuple):
    """The programs that share a row, as one of them sees it.

    part: its number; published: the group's slots; counter: of the group's arrivals; small: the
    first row's counter of arrivals for small divergences.
    """

    part: tl.tensor
    published: tl.tensor
    counter: tl.tensor
    small: tl.tensor


@triton.jit
def group_of(args, P: tl.constexpr):
    """The group of this program, and its number among the groups."""
    number = tl.program_id(0) // P.splits
    published = args.published + number * (_SLOTS * _PUBLISHED * P.lanes * P.sums)
    part = tl.program_id(0) % P.splits
    return Group(part, published, args.counters + number, args.counters + args.groups), number


@triton.jit
def arrive(counter_ptr):
    """Makes what this program has published visible; returns how many arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals):
    """Until that many have arrived, after which everything that they published can be read.

    Where they don't arrive, a GPU's kernel ends with a trap, which torch reports as a CUDA error.
    """
    polls = 0
    while (tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals) & (
        polls < MAX_POLLS
    ):
        polls += 1
    if INTERPRETED:
        assert polls < MAX_POLLS, "programs that share a row did not arrive"
    else:
        tl.inline_asm_elementwise(
            "{.reg .pred lost; setp.ge.s32 lost, $1, $2; @lost trap; mov.b32 $0, $1;}",
            "=r,r,r",
            [polls, MAX_POLLS],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def _slot(group, slot, P: tl.constexpr):
    return group.published + slot * (_PUBLISHED * P.lanes * P.sums)


@triton.jit
def _read(ptr, empty, P: tl.constexpr):
    """One number from each program of a group, past the L1 cache, which others don't update."""
    lane = tl.arange(0, P.lanes)
    return tl.load(ptr + lane, mask=lane < P.splits, other=empty, cache_modifier=".cg")


@triton.jit
def publish_sums(group, meetings, sums, P: tl.constexpr):
    """Publishes the sums of a slice for the group's next meeting, and arrives there."""
    for i in tl.static_range(len(sums)):
        member = Sums(*sums[i])
        ptr = _slot(group, meetings % _IN_TURN, P) + i * _PUBLISHED * P.lanes
        tl.store(ptr + group.part, member.student_max)
        if P.full > 0:
            tl.store(ptr + P.lanes + group.part, member.teacher_max)
        for j in tl.static_range(len(member.terms)):
            tl.store(ptr + (2 + j) * P.lanes + group.part, member.terms[j])
    arrive(group.counter)


@triton.jit
def meet_sums(group, meetings, sums, scale, P: tl.constexpr):
    """The sums of the row, once all its slices, this one among them, are published."""
    wait(group.counter, (meetings + 1) * P.splits)
    merged = ()
    for i in tl.static_range(len(sums)):
        ptr = _slot(group, meetings % _IN_TURN, P) + i * _PUBLISHED * P.lanes
        terms = ()
        for j in tl.static_range(len(Sums(*sums[i]).terms)):
            terms = terms + (_read(ptr + (2 + j) * P.lanes, 0.0, P),)
        student_maxima = _read(ptr, START, P)
        teacher_maxima = student_maxima
        if P.full > 0:
            teacher_maxima = _read(ptr + P.lanes, START, P)
        student_max = tl.max(student_maxima, 0)
        teacher_max = tl.max(teacher_maxima, 0)
        parts = Sums(student_maxima, teacher_maxima, terms)
        terms = ()
        parts = about(parts, student_max, teacher_max, scale, P)
        for j in tl.static_range(len(parts)):
            terms = terms + (tl.sum(parts[j], 0),)
        merged = merged + (Sums(student_max, teacher_max, terms),)
    return merged


@triton.jit
def meet_values(group, meetings, values, slopes, P: tl.constexpr):
    """Values and sums of slopes of the row, from those of a slice."""
    ptr = _slot(group, meetings % _IN_TURN, P)
    for i in tl.static_range(len(values)):
        tl.store(ptr + 2 * i * P.lanes + group.part, values[i])
        tl.store(ptr + (2 * i + 1) * P.lanes + group.part, slopes[i])
    arrive(group.counter)
    wait(group.counter, (meetings + 1) * P.splits)
    row_values = ()
    row_slopes = ()
    for i in tl.static_range(len(values)):
        row_values = row_values + (tl.sum(_read(ptr + 2 * i * P.lanes, 0.0, P), 0),)
        parts = _read(ptr + (2 * i + 1) * P.lanes, no_slopes(P), P)
        row_slopes = row_slopes + (all_together(parts, P),)
    return row_values, row_slopes


@triton.jit
def write_small(args, group, row, value, P: tl.constexpr):
    """Writes a small divergence, the sum over the slices of a row, if this program is the last."""
    ptr = _slot(group, _SMALL_SLOT, P)
    tl.store(ptr + group.part, value)
    before = arrive(group.small + row)
    if before == P.splits - 1:
        tl.debug_barrier()
        write_divergence(args, row, tl.sum(_read(ptr, 0.0, P), 0))
