"""What `interpreter.py` takes from the interpreter is time."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton's interpreter")

import cases


@pytest.fixture
def plainly(target):
    """Calls a function in a process of its own, whose interpreter is as Triton ships it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        yield lambda function: processes.submit(function).result()


def numbers():
    """All fields and the gradient of a problem that has a bit of everything."""
    case = cases.make(40, (5,), style="forbidden_by_student", masked=True, dtype=torch.bfloat16)
    case = cases.with_teachers(case, 2, "union")
    options = {"divergence": "jsd", "entropy_weight": 0.1, "temperature": 1.3}
    result, gradient = case.hybrid_loss(backend="triton", **options)
    return [field.numpy() for field in (*result, gradient.float()) if field is not None]


@pytest.mark.full
def test_results_are_those_of_the_interpreter_as_it_ships(plainly):
    for ours, shipped in zip(numbers(), plainly(numbers), strict=True):
        np.testing.assert_array_equal(ours, shipped)
