"""The lean prototype (`bench/lean.py`) on a GPU: right first, then timed against the others."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import lean
from bench.measure import steady_rows
from bench.providers import Problem, random_options
from bench.report import TOLERANCE
from bench.summary import percentiles
from hybrid_kernels import reference, timing
from hybrid_kernels.kernels import config

# As many rows as the tuning of the shipped kernel takes at this size.
ROWS, VOCABULARY = 3533, 151_936
SHAPES: tuple[dict[str, Any], ...] = (
    {"slice_max": 8000},
    {"slice_max": 8000, "lag": True},
    {"slice_max": 6144},
    {"slice_max": 6144, "lag": True},
    {"slice_max": 4096, "lag": True},
    {"slice_max": 16_384, "num_warps": 8, "programs": 1},
    {"slice_max": 16_384, "num_warps": 8, "programs": 1, "lag": True},
)
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
    if device == "meta":
        return run, None
    index = steady_rows(rows, shape.groups).to(device)
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
    error = float((gradient[index].double() - leaf.grad).norm() / leaf.grad.norm())
    return run, error if bool(gradient.isfinite().all()) else torch.inf


def measure(device: str) -> Iterator[dict[str, Any]]:
    """A row for each shape; no time where its gradient is wrong."""
    for options in SHAPES:
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        row: dict[str, Any] = {"tuning": f"lean: {name}", "n": ROWS, "v": VOCABULARY}
        run, error = prepare(options, ROWS, device)
        if error is None or error <= TOLERANCE["bfloat16"]:
            times = timing.device_times(run)
            row |= {**percentiles(times.ms), "host_ahead": times.ahead}
        yield {**row, "grad_error": error}
