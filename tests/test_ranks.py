"""The pool of ranks: whoever fails is named, and nobody waits for ever."""

import os
import signal

import pytest
import torch
import torch.distributed

import ranks as harness
from ranks import two_ranks

pytestmark = [pytest.mark.native, two_ranks]


def own_rank(ranks):
    """After a collective, in which the others wait for whoever is not there."""
    torch.distributed.all_reduce(torch.ones(1), group=ranks.group)
    return ranks.rank


def fails_on_one(ranks):
    assert ranks.rank != 1, "on purpose"
    return own_rank(ranks)


def dies_on_one(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return own_rank(ranks)


@pytest.mark.parametrize(
    ("function", "reason"), [(fails_on_one, "on purpose"), (dies_on_one, "exit code -9")]
)
def test_a_failure_is_named_and_costs_only_itself(function, reason, ranks, monkeypatch):
    monkeypatch.setattr(harness, "GRACE", 0.1)
    with pytest.raises(AssertionError, match=rf"rank 1: (.|\n)*{reason}"):
        ranks.run(function)
    assert ranks.run(own_rank) == [0, 1]
