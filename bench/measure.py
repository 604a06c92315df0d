"""Measures one case: error, peak memory and, on a GPU, time.

On a CPU pytest-benchmark measures wall-clock time.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.linear import LINEAR_PROVIDERS, TERMS, LinearProblem, linear_oracle
from bench.providers import PROVIDERS, Problem, Provider, Run, oracle
from bench.suites import INPUTS, Case
from bench.summary import Row, percentiles
from hybrid_kernels import timing
from hybrid_kernels.triton_backend import plan

# From hidden states a run takes 50 to 150 ms, and the host 10 to 20 ms to queue its launches.
LINEAR_TIMING = {"samples": 10, "warmups": 2, "cycles": 60_000_000}


def provider_of(case: Case) -> Provider:
    return (LINEAR_PROVIDERS if case.size else PROVIDERS)[case.provider]


def prepare(case: Case, device: str) -> tuple[Run, Row]:
    """The function to be timed, which has run once, and its row of results without times.

    For cases from hidden states peak memory excludes the gradients.
    """
    provider = provider_of(case)
    if "compile" in case.provider:
        torch.compiler.reset()
    arguments = (case.dtype, case.divergence, device)
    floor, size = 0, (case.rows, case.vocabulary)
    if case.size:
        problem = LinearProblem.random(*size, case.size, *arguments)
        leaves = [problem.hidden, problem.weight]
    else:
        problem = Problem.random(size, *arguments, **INPUTS[case.inputs])
        leaves = [problem.student]
        floor = provider.moved * case.rows * case.vocabulary * case.dtype.itemsize
    run = provider.make(problem)
    run()
    error = gradient_error(problem, run, provider.op) if provider.is_gradient else None
    for leaf in leaves:
        leaf.grad = None
    peak = peak_bytes(run, device)
    if case.size:
        peak -= sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return run, {
        "op": provider.op,
        "provider": case.provider,
        "divergence": case.divergence,
        "inputs": case.inputs,
        "n": case.rows,
        "v": case.vocabulary,
        "d": case.size or None,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_bytes": floor,
        "grad_error": error,
        "peak_mib": round(peak / 2**20, 1),
    }


def measure(case: Case, device: str = "cuda") -> Row:
    """The row of results of a case, with the times of a GPU."""
    run, row = prepare(case, device)
    times = timing.device_times(run, **(LINEAR_TIMING if case.size else {}))
    return {**row, **percentiles(times.ms), "samples": len(times.ms), "host_ahead": times.ahead}


def gradient_error(problem: Problem | LinearProblem, run: Run, op: str = "") -> float | None:
    """Relative L2 error of a gradient in some valid rows, against float64 on the same inputs.

    The gradient is w.r.t. the logits or, if they are given, the hidden states. The result is None
    on a device without values.
    """
    first = problem.hidden if isinstance(problem, LinearProblem) else problem.student
    gradient = run()
    if isinstance(problem, LinearProblem):
        rows = steady_rows(first, 1)
        truth = linear_oracle(problem, rows, sparse=op == TERMS)
    else:
        rows = steady_rows(first, rows_in_flight(first))
        if problem.mask is not None:
            rows = rows[problem.mask[rows]]
        truth = oracle(problem, rows)
    return relative_error(gradient[rows], truth)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float | None:
    """||value - truth|| / ||truth||; None on a device without values."""
    error = (value.double() - truth).norm() / truth.norm()
    return None if error.is_meta else float(error)


def rows_in_flight(logits: torch.Tensor) -> int:
    """How many rows the row-resident form processes at once, with one full teacher."""
    rows, vocabulary = logits.shape
    device = plan.Device.of(logits)
    launch = plan.resident(vocabulary, logits.element_size(), rows, device)
    return max(1, int(launch.in_flight)) if launch else 1


def steady_rows(rows: torch.Tensor, in_flight: int) -> torch.Tensor:
    """Indices of the rows that a kernel reaches in different ways.

    These are the first, one that a program processes second, one that it processes third, one in
    the middle, and the last.
    """
    count = len(rows)
    chosen = {0, in_flight, 2 * in_flight + 1, count // 2, count - 1}
    return torch.tensor(sorted(row for row in chosen if row < count), device=rows.device)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes that tensors hold at once during a run, beyond those held before it."""
    gc.collect()
    if device == "meta":
        run()
        return 0
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
