"""Measures the meeting: programs publish a number each, wait for each other and read all numbers.

`publish`, `meet` and the order of the slices are those of the row-resident kernel. Without lag, a
row takes the time of a meeting in addition to the time of its bytes.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.summary import Row
from hybrid_kernels import timing
from hybrid_kernels.triton_backend import plan
from hybrid_kernels.triton_backend.meeting import NUMBERS, meet, publish
from hybrid_kernels.triton_backend.memory import Arguments
from hybrid_kernels.triton_backend.plan import Plan
from hybrid_kernels.triton_backend.slices import first_turn, following

# Meetings of each program.
ROUNDS = 20_000
# Programs that meet: for V=151,936 with slices of 8,192 and of 4,096, and the most that may meet.
SPLITS = (19, 38, 128)
WARPS, PROGRAMS = 4, 2


@triton.jit
def meeting_kernel(args, wrong_ptr, P: tl.constexpr):
    """A meeting for each row; counts how often each program read a wrong number."""
    lane = tl.arange(0, P.lanes)
    wrong = tl.full((), 0, tl.int32)
    turn = first_turn(P)
    while turn.row < args.count:
        publish(args, turn, 0, ((turn.row + turn.part).to(tl.float32),), P)
        expected = (turn.row + tl.where(lane < P.splits, lane, 0)).to(tl.float32)
        seen = meet(args, turn.row, 0, P)
        for i in tl.static_range(len(seen)):
            wrong += tl.sum((seen[i] != expected).to(tl.int32), 0)
        turn, _ = following(args, turn, P)
    tl.store(wrong_ptr + tl.program_id(0), wrong)


def run(splits: int, programs: int, rounds: int, device: str) -> Tensor:
    """Launches programs with `rounds` meetings each; returns how many wrong numbers each read."""
    static = Plan(0, splits=splits, lanes=triton.next_power_of_2(splits))
    rows = rounds * programs // splits
    words = torch.zeros(rows * splits * NUMBERS, dtype=torch.int64, device=device)
    wrong = torch.full((programs,), -1, dtype=torch.int32, device=device)
    meeting_kernel[(programs,)](
        Arguments(published=words, count=rows),
        wrong,
        static,
        num_warps=WARPS,
        enable_fp_fusion=True,
        launch_cooperative_grid=True,
    )
    return wrong


def measurements(device: str) -> dict[str, Callable[[], Row]]:
    """Measurements by name: microseconds of a meeting, and whether it works in a CUDA graph and on
    two streams."""
    places = plan.Device.of(torch.empty(0, device=device)).multiprocessors * PROGRAMS
    by_name: dict[str, Callable[[], Row]] = {
        f"{splits} of {places} programs": lambda splits=splits: _alone(splits, places, device)
        for splits in SPLITS
    }
    if device != "meta":
        sizes = (SPLITS[0], places, ROUNDS, device)
        by_name["in a graph"] = lambda: _in_a_graph(*sizes)
        by_name["on two streams"] = lambda: _on_two_streams(*sizes)
    return by_name


def _total(wrong: Tensor) -> int | None:
    return None if wrong.is_meta else int(wrong.abs().sum())


def _alone(splits: int, programs: int, device: str) -> Row:
    wrong = run(splits, programs, ROUNDS, device)
    times = timing.device_times(lambda: run(splits, programs, ROUNDS, device), 3, 1)
    us = min(times.ms) * 1e3 / ROUNDS if times.ms else None
    return {"us": us, "wrong": _total(wrong)}


def _in_a_graph(*sizes) -> Row:
    run(*sizes)  # compiles and loads the kernel, which a graph can't capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrong = run(*sizes)
    for _ in range(3):
        graph.replay()
    return {"us": None, "wrong": _total(wrong)}


def _on_two_streams(*sizes) -> Row:
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    wrong = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                wrong.append(run(*sizes))
    torch.cuda.synchronize()
    return {"us": None, "wrong": _total(torch.stack(wrong))}
