"""The lean prototype (`bench/lean.py`) on a GPU: right first, then timed against the others."""

from collections.abc import Callable
from typing import Any

import torch

from bench import lean
from bench.measure import relative_error, steady_rows
from bench.providers import Problem, random_options
from bench.report import TOLERANCE
from bench.suites import OURS, Case
from bench.summary import Row, percentiles
from hybrid_kernels import reference, timing
from hybrid_kernels.kernels import config

# Rows that all problems have so many entries of, and the main vocabulary.
ENTRIES, VOCABULARY = 3533 * 151_936, 151_936
BEST: dict[str, Any] = {"depth": 2, "words": True}
SHAPES: dict[str, dict[str, Any]] = {
    "8,000": {},
    "8,000, lag": {"lag": True},
    "8,000, depth 2": {"depth": 2},
    "8,000, words": {"words": True},
    "8,000, words, lag": {"words": True, "lag": True},
    "8,000, words, lag, depth 2": {**BEST, "lag": True},
    "8,000, words, depth 2": BEST,
    "8,700, words, depth 2": {**BEST, "slice_max": 8700},
    "9,500, words, depth 2": {**BEST, "slice_max": 9500},
    "10,240, words, depth 2": {**BEST, "slice_max": 10_240},
    "12,700, words, depth 2": {**BEST, "slice_max": 12_700},
    "12,700": {"slice_max": 12_700},
    "12,700, words": {"slice_max": 12_700, "words": True},
    "7,000, words, lag, depth 3": {**BEST, "slice_max": 7000, "lag": True, "depth": 3},
    "5,100, 3 programs, words": {"slice_max": 5100, "programs": 3, "words": True},
    "5,100, 3 programs, words, lag": {
        "slice_max": 5100,
        "programs": 3,
        "words": True,
        "lag": True,
    },
    "5,100, 3 programs, words, depth 2": {**BEST, "slice_max": 5100, "programs": 3},
    "5,100, 3 programs, words, lag, depth 2": {
        **BEST,
        "slice_max": 5100,
        "programs": 3,
        "lag": True,
    },
    "4,000, 4 programs of 2 warps, depth 2": {
        "slice_max": 4000,
        "programs": 4,
        "num_warps": 2,
        "depth": 2,
    },
    "4,000, 4 programs of 2 warps, words, depth 2": {
        **BEST,
        "slice_max": 4000,
        "programs": 4,
        "num_warps": 2,
    },
    "16,000, 8 warps, words, depth 2": {
        **BEST,
        "slice_max": 16_000,
        "programs": 1,
        "num_warps": 8,
    },
    **{
        f"V={v:,}, 8,192{name}": {"vocabulary": v, "slice_max": 8192, **options}
        for v in (32_000, 128_256, 262_144)
        for name, options in (
            (", lag", {"lag": True}),
            (", words, lag", {"words": True, "lag": True}),
            (", words, depth 2", BEST),
        )
    },
}
ENTROPY_WEIGHT = 0.1


def case(options: dict[str, Any]) -> Case:
    """What the shipped kernel would be given."""
    vocabulary = options.get("vocabulary", VOCABULARY)
    return Case(OURS, ENTRIES // vocabulary, vocabulary)


def prepare(options: dict[str, Any], rows: int, device: str) -> tuple[Callable[[], object], Any]:
    """A launch of some shape, and its relative gradient error (None where there are no values)."""
    options = {"vocabulary": VOCABULARY, **options}
    vocabulary = options["vocabulary"]
    problem = Problem.random(rows, vocabulary, torch.bfloat16, "reverse_kl", device)
    student, teacher = problem.student.detach(), problem.teacher
    numbers = random_options(device, 1)
    ids = torch.randint(vocabulary, (rows,), **numbers)
    advantages = torch.randn(rows, **numbers)
    ones = torch.ones(rows, device=device)
    # Of the sum over rows of D - A log p(y) - 0.1 H.
    coefficients = (ones, -advantages, -ENTROPY_WEIGHT * ones)
    gradient = torch.full_like(student, torch.nan)
    multiprocessors = config.Device.of(student).multiprocessors
    shape = lean.shape(rows=rows, multiprocessors=multiprocessors, **options)

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
    rows, vocabulary = case(options)[1:3]
    run, error = prepare(options, rows, device)
    if error is not None and not error <= TOLERANCE["bfloat16"]:
        return {"failed": f"gradient error {error:.0e}"}
    times = timing.device_times(run)
    return {
        "n": rows,
        "v": vocabulary,
        "floor_bytes": 6 * rows * vocabulary,
        "grad_error": error,
        **percentiles(times.ms),
        "host_ahead": times.ahead,
    }
