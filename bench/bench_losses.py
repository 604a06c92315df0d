"""The benchmark itself: one pytest-benchmark entry for each case of the suite."""

import gc

import pytest
import torch

from bench.linear import LINEAR_PROVIDERS, LinearProblem
from bench.measure import DeviceTimer, gradient_error, linear_gradient_error, peak_bytes
from bench.providers import PROVIDERS, Problem
from bench.suites import INPUTS, Case

ROUNDS = {"cpu": 15, "cuda": 100}
# From hidden states a round takes seconds on a CPU.
LINEAR_ROUNDS = {"cpu": 5, "cuda": 50}


def bench_losses(benchmark, case: Case, device: str):
    """Logits are given."""
    if case.size:
        _bench_linear(benchmark, case, device)
        return
    provider = PROVIDERS[case.provider]
    if reason := provider.missing():
        pytest.skip(f"the peer {case.provider} cannot run here: {reason}")
    problem = Problem.random(
        case.rows, case.vocabulary, case.dtype, case.divergence, device, **INPUTS[case.inputs]
    )
    torch.compiler.reset()
    run = provider.make(problem)
    run()
    error = gradient_error(problem, run) if provider.is_gradient else None
    problem.student.grad = None
    peak = peak_bytes(run, device)
    floor = provider.moved * case.rows * case.vocabulary * case.dtype.itemsize
    benchmark.extra_info.update(_info(case, provider, floor, error, peak))
    _measure(benchmark, run, device, ROUNDS[device], warmups=3)


def _bench_linear(benchmark, case: Case, device: str) -> None:
    """Hidden states are given. Memory is what is needed beyond the gradients."""
    provider = LINEAR_PROVIDERS[case.provider]
    if reason := provider.missing():
        pytest.skip(f"the peer {case.provider} cannot run here: {reason}")
    problem = LinearProblem.random(
        case.rows, case.vocabulary, case.size, case.dtype, case.divergence, device
    )
    run = provider.make(problem)
    run()
    error = None
    if provider.is_gradient:
        error = linear_gradient_error(problem, run, provider.op)
    problem.hidden.grad = problem.weight.grad = None
    peak = peak_bytes(run, device)
    left = [problem.hidden.grad, problem.weight.grad]
    peak -= sum(gradient.nbytes for gradient in left if gradient is not None)
    benchmark.extra_info.update(_info(case, provider, 0, error, peak))
    rounds = LINEAR_ROUNDS[device] if case.rows < 1000 or device == "cuda" else 3
    _measure(benchmark, run, device, rounds, warmups=1)


def _info(case: Case, provider, floor_bytes: int, error: float | None, peak: int) -> dict:
    return {
        "op": provider.op,
        "provider": case.provider,
        "divergence": case.divergence,
        "inputs": case.inputs,
        "n": case.rows,
        "v": case.vocabulary,
        "d": case.size or None,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_bytes": floor_bytes,
        "grad_error": error,
        "peak_mib": round(peak / 2**20, 1),
    }


def _measure(benchmark, run, device: str, rounds: int, warmups: int) -> None:
    timed = DeviceTimer(run) if device == "cuda" else run
    benchmark.pedantic(timed, warmup_rounds=warmups, rounds=rounds)
    if isinstance(timed, DeviceTimer):
        # Not the host's time, which pytest-benchmark keeps.
        benchmark.extra_info["device_ms"] = timed.samples_ms[warmups:]
    del run, timed
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
