"""The benchmark on a CPU: one pytest-benchmark entry for each case of the suite."""

import gc

from bench.measure import prepare
from bench.suites import Case

# From hidden states a round takes seconds.
ROUNDS, LINEAR_ROUNDS, LARGE_ROUNDS = 15, 5, 3


def bench_losses(benchmark, case: Case):
    run, info = prepare(case, "cpu")
    benchmark.extra_info.update(info)
    rounds = ROUNDS if not case.size else LINEAR_ROUNDS if case.rows < 1000 else LARGE_ROUNDS
    benchmark.pedantic(run, warmup_rounds=1 if case.size else 3, rounds=rounds)
    del run
    gc.collect()
