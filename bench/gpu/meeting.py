"""The meeting alone: programs that publish a number, wait for each other and read what all say.

`arrive` is that of the row-resident kernel; the wait has a bound, so that a mistake ends as a
wrong result and not as a hang. The time of a meeting is what a row costs on top of its bytes.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.summary import Row
from hybrid_kernels import timing
from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.meeting import arrive

ROUNDS = 20_000
# About a second of polls.
BOUND = 2**20
# What is published lies in turn in so many places.
SLOTS = 2
# Of a row of V=151,936 with slices of 8,192 and of 4,096, and the most that are launched.
SPLITS = (19, 38, 128)
WARPS, PROGRAMS = 4, 2


@triton.jit
def meeting_kernel(
    published_ptr,
    counter_ptr,
    wrong_ptr,
    rounds,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
    BOUND: tl.constexpr,
):
    """`rounds` meetings of groups of SPLITS programs; what a program read and should not have."""
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    counter_ptr += group
    published_ptr += group * SLOTS * LANES
    lane = tl.arange(0, LANES)
    wrong = tl.full((), 0, tl.int32)
    meeting = tl.full((), 0, tl.int32)
    while meeting < rounds:
        slot = published_ptr + meeting % SLOTS * LANES
        tl.store(slot + part, meeting)
        arrive(counter_ptr)
        meeting += 1
        polls = tl.full((), 0, tl.int32)
        while polls < BOUND:
            arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            polls = tl.where(arrived < meeting * SPLITS, polls + 1, 2 * BOUND)
        tl.debug_barrier()
        seen = tl.load(slot + lane, mask=lane < SPLITS, other=0, cache_modifier=".cg")
        off = (seen != meeting - 1) & (lane < SPLITS)
        wrong += tl.sum(off.to(tl.int32), 0)
        if polls == BOUND:
            # Nobody came: the others are not running.
            wrong += 1
            meeting = rounds
    tl.store(wrong_ptr + tl.program_id(0), wrong)


def meet(splits: int, groups: int, rounds: int, device: str) -> Tensor:
    """Launches it; how much each program found wrong."""
    lanes = triton.next_power_of_2(splits)
    published = torch.full((groups * SLOTS * lanes,), -1, dtype=torch.int32, device=device)
    counters = torch.zeros(groups, dtype=torch.int32, device=device)
    wrong = torch.full((groups * splits,), -1, dtype=torch.int32, device=device)
    meeting_kernel[(groups * splits,)](
        published,
        counters,
        wrong,
        rounds,
        SPLITS=splits,
        LANES=lanes,
        SLOTS=SLOTS,
        BOUND=BOUND,
        num_warps=WARPS,
        enable_fp_fusion=True,
        launch_cooperative_grid=True,
    )
    return wrong


def measurements(device: str) -> dict[str, Callable[[], Row]]:
    """By its name each measurement: microseconds a meeting, alone; and whether all is right in a
    graph and on two streams."""
    places = plan.Device.of(torch.empty(0, device=device)).multiprocessors * PROGRAMS
    found: dict[str, Callable[[], Row]] = {
        f"{splits} programs, {places // splits} groups": lambda splits=splits: _alone(
            splits, places // splits, device
        )
        for splits in SPLITS
    }
    if device != "meta":
        sizes = (SPLITS[0], places // SPLITS[0], ROUNDS, device)
        found["in a graph"] = lambda: _in_a_graph(*sizes)
        found["on two streams"] = lambda: _on_two_streams(*sizes)
    return found


def _wrong(found: Tensor) -> int | None:
    return None if found.is_meta else int(found.abs().sum())


def _alone(splits: int, groups: int, device: str) -> Row:
    wrong = meet(splits, groups, ROUNDS, device)
    times = timing.device_times(lambda: meet(splits, groups, ROUNDS, device), 3, 1)
    us = min(times.ms) * 1e3 / ROUNDS if times.ms else None
    return {"us": us, "wrong": _wrong(wrong)}


def _in_a_graph(*sizes) -> Row:
    meet(*sizes)  # what is compiled and loaded is not captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrong = meet(*sizes)
    for _ in range(3):
        graph.replay()
    return {"us": None, "wrong": _wrong(wrong)}


def _on_two_streams(*sizes) -> Row:
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(meet(*sizes))
    torch.cuda.synchronize()
    return {"us": None, "wrong": _wrong(torch.stack(found))}
