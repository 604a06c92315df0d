"""From hidden states with the vocabulary over several ranks: each result is that of the whole; a
rank's gradient of the weight is its rows of the whole's, that of the hidden states all of it."""

import json
import os
import traceback
from dataclasses import replace

import torch

from cases import LinearCase as Case
from cases import make_linear as make
from hybrid_kernels import Divergence, LinearTeacher, Mixture, TopK
from ranks import join
from test_sharded import Ranks, assert_values

TEACHERS = ("linear", "mixed", "top-k")
# (What fp32 sums of a GEMM differ by when its entries are added up in another order.)
TOLERANCE = 1e-6


def shard(case: Case, first: int, last: int) -> Case:
    """A rank's part; its own teacher is cut by `part_of`."""
    head = case.head
    bias = None if head.bias is None else head.bias[first:last]
    return replace(case, head=replace(head, weight=head.weight[first:last], bias=bias))


def part_of(teacher, first: int, last: int):
    if isinstance(teacher, Mixture):
        return Mixture([(weight, part_of(one, first, last)) for weight, one in teacher.members])
    if isinstance(teacher, LinearTeacher):
        bias = None if teacher.bias is None else teacher.bias[first:last]
        return replace(teacher, weight=teacher.weight[first:last], bias=bias)
    return teacher if isinstance(teacher, TopK) else teacher[..., first:last]


def compare(ranks: Ranks, case: Case, method: str = "hybrid_loss", **options) -> None:
    first, last = ranks.bounds(len(case.head.weight))
    teacher = case.given(None)
    options["backend"] = ranks.backend
    whole, (hidden, *head) = replace(case, fixed=teacher).ours(method, **dict(options))
    part = replace(shard(case, first, last), fixed=part_of(teacher, first, last))
    own, (own_hidden, *own_head) = part.ours(method, process_group=ranks.group, **dict(options))

    def check() -> None:
        for name, expected in whole._asdict().items():
            got = getattr(own, name)
            assert (got is None) == (expected is None), name
            if got is not None:
                assert_values(got, expected, name, 3 * TOLERANCE)
        pairs = [(own_hidden, hidden)]
        pairs += [(o, w[first:last]) for o, w in zip(own_head, head, strict=True)]
        for got, expected in pairs:
            assert got.dtype == expected.dtype
            allowed = TOLERANCE * max(float(w.norm()) for w in (hidden, *head))
            rounded = 2.0**-7 * expected.norm() if got.dtype == torch.bfloat16 else 0.0
            assert (got - expected).norm() <= allowed + rounded

    ranks.agree(check)


def cases(ranks: Ranks) -> None:
    for teacher in TEACHERS:
        for divergence in (Divergence("reverse_kl"), Divergence("jsd", beta=0.3)):
            for chunk_rows in (None, 3):
                made = make(teacher=teacher, masked=True, bias=True, softcap=3.0)
                options = {"divergence": divergence, "chunk_rows": chunk_rows}
                compare(ranks, made, entropy_weight=0.1, **options)
    for reduction in ("sum", "none"):
        compare(ranks, make(masked=True), reduction=reduction, chunk_rows=4)
    for advantages in (lambda t: t.log_prob * t.entropy,):
        compare(ranks, make(masked=True), advantages=advantages)
        compare(ranks, make(masked=True), advantages=advantages, chunk_rows=3)
    compare(ranks, make(masked=True, teacher="mixed"), "token_terms", chunk_rows=3)
    compare(ranks, make(masked=True), drop_masked=False)
    compare(ranks, make(rows=(0,)))
    compare(ranks, make(dtype=torch.bfloat16))
    # The filter looks at columns, which the ranks have between them, and its norm at all of them.
    compare(ranks, make(400, 24, (12,), logit_scale=3.0), grad_filter=1e-3)


def _work(rank: int, size: int, backend: str, folder: str) -> None:
    group = join(rank, size, folder)
    text = ""
    try:
        cases(Ranks(backend, group))
    except Exception:
        text = traceback.format_exc()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(text, file)
    os._exit(0)  # threads of gloo do not always survive an orderly end


def test_the_ranks_agree_with_the_whole(world_size, backend, tmp_path):
    torch.multiprocessing.spawn(_work, (world_size, backend, str(tmp_path)), nprocs=world_size)
    texts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert not any(texts), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
