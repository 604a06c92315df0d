"""The benchmark on a CPU: one pytest-benchmark entry for each case of the suite."""

import gc

import pytest

from bench.measure import prepare, provider_of
from bench.suites import Case

# From hidden states a round takes seconds.
ROUNDS, LINEAR_ROUNDS, LARGE_ROUNDS = 15, 5, 3


def bench_losses(benchmark, case: Case):
    if reason := provider_of(case).missing():
        pytest.skip(f"the peer {case.provider} cannot run here: {reason}")
    run, info = prepare(case, "cpu")
    benchmark.extra_info.update(info)
    rounds = ROUNDS if not case.size else LINEAR_ROUNDS if case.rows < 1000 else LARGE_ROUNDS
    benchmark.pedantic(run, warmup_rounds=1 if case.size else 3, rounds=rounds)
    del run
    gc.collect()
