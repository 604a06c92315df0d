"""Loss and gradient from logits: time, peak memory and gradient error of every provider.

    python -m pytest bench --benchmark-only --benchmark-json results.json
    python -m bench results.json          # the table, and summary.json beside it

Peak memory is what a run adds to the process beyond its inputs, the gradient included.
"""

import gc
from pathlib import Path

import pytest
import torch

from bench.providers import PROVIDERS, Problem, oracle

SIZES = [(256, 151936)]
ORACLE_ROWS = 2


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def bench_loss(benchmark, rows, vocabulary, dtype, divergence, provider):
    problem = Problem.random(rows, vocabulary, dtype, divergence)
    torch.compiler.reset()
    run = PROVIDERS[provider](problem)
    gradient = run()
    info = {
        "op": "hybrid_loss",
        "provider": provider,
        "divergence": divergence,
        "n": rows,
        "v": vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if "sparse" not in provider:
        truth = oracle(problem, ORACLE_ROWS)
        difference = gradient[:ORACLE_ROWS].double() - truth
        info["grad_error"] = float(difference.norm() / truth.norm())
    del gradient
    problem.student.grad = None
    info["peak_mib"] = peak_extra_mib(run)
    benchmark.extra_info.update(info)
    benchmark.pedantic(run, warmup_rounds=2, rounds=15)


def peak_extra_mib(run) -> float:
    """Highest resident memory during the run, above what it was before."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_kib(status, "VmRSS")
    run()
    return (_status_kib(status, "VmHWM") - before) / 1024


def _status_kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
