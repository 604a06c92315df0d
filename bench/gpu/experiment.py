"""The lean prototype (`bench/lean.py`) on a GPU: right first, then timed against the others."""

from collections.abc import Callable
from typing import Any

import torch

from bench import lean
from bench.measure import relative_error, steady_rows
from bench.providers import Problem, random_options
from bench.report import TOLERANCE
from bench.summary import Row, percentiles
from hybrid_kernels import reference, timing
from hybrid_kernels.kernels import config

# As many rows as the tuning of the shipped kernel takes at this size.
ROWS, VOCABULARY = 3533, 151_936
SHAPES: dict[str, dict[str, Any]] = {
    "8,000": {"slice_max": 8000},
    "8,000, lag": {"slice_max": 8000, "lag": True},
    "6,144": {"slice_max": 6144},
    "6,144, lag": {"slice_max": 6144, "lag": True},
    "4,096, lag": {"slice_max": 4096, "lag": True},
    "16,384, 8 warps": {"slice_max": 16_384, "num_warps": 8, "programs": 1},
    "16,384, 8 warps, lag": {"slice_max": 16_384, "num_warps": 8, "programs": 1, "lag": True},
}
ENTROPY_WEIGHT = 0.1


def prepare(options: dict[str, Any], rows: int, device: str) -> tuple[Callable[[], object], Any]:
    """A launch of some shape, and its relative gradient error (None where there are no values)."""
    problem = Problem.random(rows, VOCABULARY, torch.bfloat16, "reverse_kl", device)
    student, teacher = problem.student.detach(), problem.teacher
    numbers = random_options(device, 1)
    ids = torch.randint(VOCABULARY, (rows,), **numbers)
    advantages = torch.randn(rows, **numbers)
    ones = torch.ones(rows, device=device)
    # Of the sum over rows of D - A log p(y) - 0.1 H.
    coefficients = (ones, -advantages, -ENTROPY_WEIGHT * ones)
    gradient = torch.full_like(student, torch.nan)
    shape = lean.shape(VOCABULARY, rows, config.Device.of(student).multiprocessors, **options)

    def run() -> object:
        return lean.lean(student, teacher, ids, coefficients, gradient, shape)

    run()
    index = steady_rows(student, shape.groups)
    leaf = student[index].double().requires_grad_()
    reference.hybrid_loss(
        leaf,
        teacher[index].double(),
        ids[index],
        advantages[index].double(),
        entropy_weight=ENTROPY_WEIGHT,
        reduction="sum",
    ).loss.backward()
    assert leaf.grad is not None
    error = relative_error(gradient[index], leaf.grad)
    if error is not None and not bool(gradient.isfinite().all()):
        error = torch.inf
    return run, error


def measure(options: dict[str, Any], device: str) -> Row:
    """Error and time of a shape; no time where its gradient is wrong."""
    run, error = prepare(options, ROWS, device)
    if error is not None and not error <= TOLERANCE["bfloat16"]:
        return {"failed": f"gradient error {error:.0e}"}
    times = timing.device_times(run)
    return {"grad_error": error, **percentiles(times.ms), "host_ahead": times.ahead}
