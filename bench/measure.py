"""How it is measured: time, peak memory and error of one run.

On a GPU a sample is the time between two events, with the L2 cache flushed and the device kept busy
before the first, so that the host has queued everything when the first event passes and no launch
latency is counted. On a CPU it is wall time.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.linear import TERMS, LinearProblem, linear_oracle
from bench.providers import Problem, Run, oracle

ORACLE_ROWS = 2
# Larger than any L2 cache.
FLUSHED_BYTES = 512 * 2**20
# About a millisecond, more than the host needs to queue a forward and a backward.
BUSY_CYCLES = 2_000_000


class DeviceTimer:
    """Runs a function with everything around it that a fair sample needs; collects the times."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.samples_ms: list[float] = []
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        self.samples_ms.append(start.elapsed_time(end))


def gradient_error(problem: Problem, run: Run) -> float:
    """Relative L2 error of the first valid rows' gradient, against float64 on the same inputs."""
    valid = torch.ones(len(problem.student)) if problem.mask is None else problem.mask.cpu()
    rows = valid.nonzero()[:ORACLE_ROWS, 0].to(problem.student.device)
    truth = oracle(problem, rows)
    gradient = run()[rows].cpu().double()
    return float((gradient - truth).norm() / truth.norm())


def linear_gradient_error(problem: LinearProblem, run: Run, op: str) -> float:
    """As `gradient_error`, of the hidden states."""
    rows = torch.arange(min(ORACLE_ROWS, len(problem.hidden)), device=problem.hidden.device)
    truth = linear_oracle(problem, rows, sparse=op == TERMS)
    gradient = run()[rows].cpu().double()
    return float((gradient - truth).norm() / truth.norm())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that tensors held at once during a run, beyond what was held before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
