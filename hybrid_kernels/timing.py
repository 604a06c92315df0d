"""Times of work on a GPU, by the GPU's clock.

A sample is the time between two events. Before the first, the L2 cache is emptied by reading other
memory, and the device spins until the host has queued everything, so that no launch latency is
counted. `Times.ahead` shows whether the host was late all the same; then a time is the host's.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

SAMPLES, WARMUPS = 30, 5
# Larger than any L2 cache.
FLUSHED_BYTES = 512 * 2**20
# About 6 ms; a forward and a backward take the host 1 to 2 ms.
BUSY_CYCLES = 10_000_000


class Times(NamedTuple):
    """Samples of one function.

    Attributes:
        ms: milliseconds, in the order in which they were taken.
        ahead: the share of samples that the host had queued before the device began them.
    """

    ms: list[float]
    ahead: float

    @property
    def median(self) -> float:
        return statistics.median(self.ms) if self.ms else math.nan


def device_times(
    run: Callable[[], object],
    samples: int = SAMPLES,
    warmups: int = WARMUPS,
    cycles: int = BUSY_CYCLES,
) -> Times:
    """Times of `run` on the current CUDA device, without warm-ups.

    The host has about `cycles` device cycles to queue everything.
    """
    flushed = torch.zeros(FLUSHED_BYTES // 4, device="cuda")
    ms, ahead = [], 0
    for index in range(warmups + samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.sum()
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        late = start.query()
        torch.cuda.synchronize()
        if index >= warmups:
            ms.append(start.elapsed_time(end))
            ahead += not late
    return Times(ms, ahead / samples)
