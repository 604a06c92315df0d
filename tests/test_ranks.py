"""The pool of ranks names a rank that fails, and does not wait for others forever."""

import os
import signal

import pytest
import torch
import torch.distributed

import ranks as harness
from ranks import two_ranks

pytestmark = [pytest.mark.native, two_ranks]


def rank_after_a_collective(ranks):
    """Ranks wait in the collective if one is missing."""
    torch.distributed.all_reduce(torch.ones(1), group=ranks.group)
    return ranks.rank


def fails_on_one(ranks):
    assert ranks.rank != 1, "on purpose"
    return rank_after_a_collective(ranks)


def dies_on_one(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank_after_a_collective(ranks)


@pytest.mark.parametrize(
    ("function", "reason"), [(fails_on_one, "on purpose"), (dies_on_one, "exit code -9")]
)
def test_a_failure_is_named_and_the_next_call_works(function, reason, ranks, monkeypatch):
    monkeypatch.setattr(harness, "GRACE", 0.1)
    with pytest.raises(AssertionError, match=rf"rank 1: (.|\n)*{reason}"):
        ranks.run(function)
    assert ranks.run(rank_after_a_collective) == [0, 1]
