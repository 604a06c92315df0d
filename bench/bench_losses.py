"""The benchmark itself: one pytest-benchmark entry for each case of the suite."""

import gc

import pytest
import torch

from bench.measure import DeviceTimer, gradient_error, peak_bytes
from bench.providers import PROVIDERS, Problem
from bench.suites import INPUTS, Case

ROUNDS = {"cpu": 15, "cuda": 100}


def bench_losses(benchmark, case: Case, device: str):
    provider = PROVIDERS[case.provider]
    if reason := provider.missing():
        pytest.skip(f"the peer {case.provider} cannot run here: {reason}")
    problem = Problem.random(
        case.rows, case.vocabulary, case.dtype, case.divergence, device, **INPUTS[case.inputs]
    )
    torch.compiler.reset()
    run = provider.make(problem)
    run()
    info = {
        "op": provider.op,
        "provider": case.provider,
        "divergence": case.divergence,
        "inputs": case.inputs,
        "n": case.rows,
        "v": case.vocabulary,
        "d": None,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_bytes": provider.moved * case.rows * case.vocabulary * case.dtype.itemsize,
        "grad_error": gradient_error(problem, run) if provider.is_gradient else None,
    }
    problem.student.grad = None
    info["peak_mib"] = round(peak_bytes(run, device) / 2**20, 1)
    benchmark.extra_info.update(info)
    timed = DeviceTimer(run) if device == "cuda" else run
    benchmark.pedantic(timed, warmup_rounds=3, rounds=ROUNDS[device])
    if isinstance(timed, DeviceTimer):
        # Not the host's time, which pytest-benchmark keeps.
        benchmark.extra_info["device_ms"] = timed.samples_ms[3:]
    del problem, run, timed
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
