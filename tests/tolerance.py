"""Assertions of numerical closeness, and the comparison with the eager specification."""

import math
from typing import Any

import torch
from torch import Tensor

from cases import Case, LinearCase, Outcome
from hybrid_kernels import reference

# The largest relative error of rounding to a dtype, and the largest absolute one near zero.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}

# The error of fp32 that is allowed even where eager happens to have none, relative to the largest
# entry of a row: entries are differences of larger terms. `test_precision.py` is stricter.
ARITHMETIC = 64 * ROUNDING[torch.float32]


def assert_close(
    got: Tensor,
    truth: Tensor,
    eager: Tensor,
    name: str = "value",
    *,
    scale: float = 0.0,
    roundings: int = 1,
) -> None:
    """Asserts that `got` is as close to `truth` as its dtype allows.

    The bound of an entry is twice the largest error of `eager`, plus the rounding band: `roundings`
    roundings of the entry to the dtype of `got`, and `ARITHMETIC` of the largest entry in its row
    (or of `scale`, the size of the terms that the entry is a sum of).

    Args:
        got: the result under test.
        truth: float64, from the same rounded inputs.
        eager: the same computation as `truth`, in fp32.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    if not got.numel() or got.is_meta:  # there are no values to compare
        return
    value, truth, eager = (torch.atleast_1d(t.detach().double()) for t in (got, truth, eager))
    finite = truth.isfinite()
    magnitude = torch.where(finite, truth, 0.0).abs()
    eager_error = torch.where(finite, (eager - truth).abs(), 0.0).max()
    largest = magnitude.amax(-1, keepdim=True).clamp(min=scale)
    bound = (
        2 * eager_error
        + ARITHMETIC * largest
        + roundings * (ROUNDING[got.dtype] * magnitude + SUBNORMAL[got.dtype])
    )
    same = (value == truth) | (value.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (value - truth).abs())
    excess = torch.where(error <= bound, 0.0, (error - bound).nan_to_num(torch.inf))
    if bool((excess > 0).any()):
        index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} entries are off, worst at "
            f"{index}: got {value[index]:.9g}, expected {truth[index]:.9g}, error "
            f"{error[index]:.3g}, allowed {bound[index]:.3g}"
        )


def written_and_scaled(backend: str, gradient: Tensor) -> int:
    """Roundings of a gradient: one where it is written, one where the upstream scales it.

    Each counts double in the interpreter, which truncates to bf16 (a GPU rounds to nearest).
    """
    return 4 if backend == "triton" and gradient.device.type == "cpu" else 2


def assert_matches_reference(
    case: Case, backend: str, method: str = "hybrid_loss", **options
) -> Outcome:
    """Asserts that every field and the gradient of `method` are right; returns them."""
    run, function = getattr(case, method), getattr(reference, method)
    specified = {key: value for key, value in options.items() if key != "inplace"}
    truth = run(function, torch.float64, **specified)
    eager = run(function, torch.float32, **specified)
    outcome = run(backend=backend, **options)
    for field, got in outcome.result._asdict().items():
        expected = getattr(truth.result, field)
        assert (got is None) == (expected is None), field
        if got is not None:
            assert got.dtype == torch.float32, field
            # Values are sums of terms of the size of a log-probability.
            scale = 1 + math.log(case.vocabulary)
            assert_close(got, expected, getattr(eager.result, field), field, scale=scale)
    assert outcome.gradient.dtype == case.student.dtype
    # The scale matters where probabilities of order 1 cancel completely, as with a single entry.
    assert_close(
        outcome.gradient,
        truth.gradient,
        eager.gradient,
        "gradient",
        scale=0.05,
        roundings=written_and_scaled(backend, outcome.gradient),
    )
    return outcome


def assert_linear_matches(
    case: LinearCase, backend: str, method: str = "hybrid_loss", **options
) -> tuple[Any, list[Tensor]]:
    """Compares fields and gradients with float64, and allows the errors that eager fp32 has."""
    linear = {"backend", "chunk_rows", "drop_masked", "logits_dtype", "grad_filter"}
    specified = {key: value for key, value in options.items() if key not in linear}
    true_result, true_gradients = case.reference(torch.float64, method, **specified)
    eager_result, eager_gradients = case.reference(torch.float32, method, **specified)
    result, gradients = case.ours(method, backend=backend, **options)
    fields = result._asdict()
    assert (fields.pop("dropped_norm", None) is not None) == ("grad_filter" in options)
    for field, got in fields.items():
        truth = getattr(true_result, field)
        assert (got is None) == (truth is None), field
        if got is not None:
            assert got.dtype == torch.float32, field
            assert_close(got, truth, getattr(eager_result, field), field, scale=6.0)
    # On a GPU dz enters the GEMMs in the weight's dtype.
    rough = case.hidden.dtype != torch.float32 and case.hidden.is_cuda
    for name, got, truth, eager in zip(
        ("hidden", "weight", "bias"), gradients, true_gradients, eager_gradients, strict=False
    ):
        assert got.dtype == case.hidden.dtype, name
        if rough:
            assert (got - truth).norm() <= 1e-2 * truth.norm(), name
            continue
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        roundings = written_and_scaled(backend, got)
        assert_close(got, truth, eager, f"gradient of {name}", scale=scale, roundings=roundings)
    return result, gradients


def assert_near(got: Tensor, truth: Tensor, allowed: float) -> None:
    """Asserts that the relative L2 error is at most `allowed`."""
    error = _relative(got, truth)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=allowed)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error."""
    return float(_relative(got, truth))


def _relative(got: Tensor, truth: Tensor) -> Tensor:
    return (got.double() - truth).norm() / truth.double().norm()


# -- a part, compared with the whole --------------------------------------------------------------

# How much fp32 sums differ when they are added up in another order.
ANOTHER_ORDER = 1e-6


def assert_values(got, expected, name, tolerance=ANOTHER_ORDER):
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_gradient(got, whole, bounds, backend):
    """Compares a part of a gradient with the whole: equal where that is not finite, elsewhere with
    a small error relative to the norm of the whole. In bf16, entries may round to either side."""
    assert got.dtype == whole.dtype
    expected = whole[..., slice(*bounds)]
    finite = expected.isfinite()
    torch.testing.assert_close(got[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    error = (got[finite].double() - expected[finite].double()).abs()
    whole = whole[whole.isfinite()].double()
    if expected.dtype == torch.bfloat16:
        rounding = written_and_scaled(backend, got) * ROUNDING[got.dtype]
        bound = rounding * expected[finite].abs() + ANOTHER_ORDER * whole.norm()
        assert bool((error <= bound).all()), "gradient: off by more than a rounding"
    else:
        relative = float(error.norm() / whole.norm().clamp(min=1e-30))
        assert relative <= ANOTHER_ORDER, f"gradient: relative error {relative:.3g}"
