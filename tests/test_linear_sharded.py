"""The linear functions with the vocabulary over several ranks. Results and the gradient of hidden
states equal those of the whole; each rank has the gradient of its rows of the weight."""

import functools
from dataclasses import replace

import pytest
import torch

from cases import LinearCase, divergence_id, make_linear
from hybrid_kernels import Divergence, LinearTeacher, Mixture, TopK
from ranks import Ranks, every_size, on_ranks
from tolerance import ANOTHER_ORDER

pytestmark = every_size


def part_of(teacher, first: int, last: int):
    if isinstance(teacher, Mixture):
        return Mixture([(weight, part_of(one, first, last)) for weight, one in teacher.members])
    if isinstance(teacher, LinearTeacher):
        bias = None if teacher.bias is None else teacher.bias[first:last]
        return replace(teacher, weight=teacher.weight[first:last], bias=bias)
    return teacher if isinstance(teacher, TopK) else teacher[..., first:last]


def assert_equals_whole(
    ranks: Ranks, case: LinearCase, method: str = "hybrid_loss", **options
) -> None:
    head, teacher = case.head, case.given(None)
    first, last = ranks.bounds(len(head.weight))
    bias = None if head.bias is None else head.bias[first:last]
    part_head = replace(head, weight=head.weight[first:last], bias=bias)
    part = replace(case, head=part_head, fixed=part_of(teacher, first, last))
    options["backend"] = ranks.backend
    full = replace(case, fixed=teacher)
    whole, (hidden, *weights) = ranks.on_one(lambda: full.ours(method, **options))
    result, gradients = part.ours(method, process_group=ranks.group, **options)
    ranks.assert_result(result, whole, 3 * ANOTHER_ORDER)
    allowed = ANOTHER_ORDER * max(float(w.norm()) for w in (hidden, *weights))
    parts = [hidden, *(weight[first:last] for weight in weights)]
    names = ("hidden", "weight", "bias")[: len(parts)]
    for name, got, expected in zip(names, gradients, parts, strict=True):
        assert got.dtype == expected.dtype, name
        rounded = 2.0**-7 * expected.norm() if got.dtype == torch.bfloat16 else 0.0
        error = (got - expected).norm()
        assert error <= allowed + rounded, f"gradient of {name}: off by {error:.3g}"


@pytest.mark.parametrize("teacher", ["linear", "mixed", "top-k"])
@pytest.mark.parametrize(
    "divergence", [Divergence("reverse_kl"), Divergence("jsd", beta=0.3)], ids=divergence_id
)
@pytest.mark.parametrize("chunk_rows", [None, 3])
@on_ranks
def test_teachers_and_chunks(ranks, chunk_rows, divergence, teacher):
    case = make_linear(teacher=teacher, masked=True, bias=True, softcap=3.0)
    assert_equals_whole(
        ranks, case, divergence=divergence, chunk_rows=chunk_rows, entropy_weight=0.1
    )


twin = functools.partial(pytest.param, marks=pytest.mark.twin)


def advantages(terms):
    return terms.log_prob * terms.entropy


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ({"masked": True}, {"reduction": "sum", "chunk_rows": 4}),
        ({"masked": True}, {"advantages": advantages, "chunk_rows": 3}),
        ({"masked": True, "teacher": "mixed"}, {"method": "token_terms", "chunk_rows": 3}),
        twin({"masked": True}, {"reduction": "none", "chunk_rows": 4}),
        twin({"masked": True}, {"advantages": advantages}),
        twin({"masked": True}, {"drop_masked": False}),
        twin({"rows": (0,)}, {}),
        twin({"dtype": torch.bfloat16}, {}),
        # The filter works on columns, of which each rank has some; its norm is over all of them.
        twin({"vocabulary": 400, "rows": (12,), "logit_scale": 3.0}, {"grad_filter": 1e-3}),
    ],
    ids=["sum", "chunks", "terms", "none", "function", "kept", "no rows", "bf16", "filter"],
)
@on_ranks
def test_options(ranks, inputs, options):
    assert_equals_whole(ranks, make_linear(**inputs), **options)
