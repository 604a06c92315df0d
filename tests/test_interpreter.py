"""`interpreter.speed_up` changes no result."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton's interpreter")

import cases


@pytest.fixture
def unpatched(target):
    """Calls a function in another process, where the interpreter is as Triton ships it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        yield lambda function: processes.submit(function).result()


def fields_and_gradient():
    """The results for inputs with many features at once."""
    case = cases.make(40, (5,), style="forbidden_by_student", masked=True, dtype=torch.bfloat16)
    case = cases.with_teachers(case, 2, "union")
    options = {"divergence": "jsd", "entropy_weight": 0.1, "temperature": 1.3}
    result, gradient = case.hybrid_loss(backend="triton", **options)
    return [field.numpy() for field in (*result, gradient.float()) if field is not None]


@pytest.mark.full
def test_results_equal_those_of_the_unpatched_interpreter(unpatched):
    for pair in zip(fields_and_gradient(), unpatched(fields_and_gradient), strict=True):
        np.testing.assert_array_equal(*pair)
