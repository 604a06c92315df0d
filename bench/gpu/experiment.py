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
from hybrid_kernels.triton_backend import plan

# Rows that all problems have so many entries of, and the main vocabulary.
ENTRIES, VOCABULARY = 8192 * 151_936, 151_936
WORDS_LAG: dict[str, Any] = {"lag": True, "words": True}
BEST: dict[str, Any] = {**WORDS_LAG, "slice_max": 5100, "programs": 3, "two": True}
SHAPES: dict[str, dict[str, Any]] = {
    "8,000": {},
    "12,700": {"slice_max": 12_700},
    "8,000, lag": {"lag": True},
    "8,000, lag, two": {"lag": True, "two": True},
    "8,000, words, lag": WORDS_LAG,
    "7,600, words, lag": {**WORDS_LAG, "slice_max": 7600},
    "6,912, words, lag": {**WORDS_LAG, "slice_max": 6912},
    "8,000, words, lag, two": {**WORDS_LAG, "two": True},
    "10,240, words, lag, two": {**WORDS_LAG, "slice_max": 10_240, "two": True},
    "5,100, 3 programs, words, lag, two": BEST,
    "4,608, 3 programs, words, lag, two": {**BEST, "slice_max": 4608},
    **{
        f"V={v:,}, {name}": {"vocabulary": v, **options}
        for v in (32_000, 128_256, 262_144)
        for name, options in (
            ("8,192, words, lag", {**WORDS_LAG, "slice_max": 8192}),
            ("5,120, 3 programs, words, lag, two", {**BEST, "slice_max": 5120}),
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
    multiprocessors = plan.Device.of(student).multiprocessors
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
    of = case(options)
    run, error = prepare(options, of.rows, device)
    if error is not None and not error <= TOLERANCE["bfloat16"]:
        return {"failed": f"gradient error {error:.0e}"}
    times = timing.device_times(run)
    return {
        "n": of.rows,
        "v": of.vocabulary,
        "floor_bytes": 6 * of.rows * of.vocabulary,
        "grad_error": error,
        **percentiles(times.ms),
        "host_ahead": times.ahead,
    }
