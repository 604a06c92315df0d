"""`python -m hybrid_kernels tune`: measures the choices of the row-resident form on this GPU.

For logits of 2 and 4 bytes, every candidate is timed on a few vocabularies and divergences. The one
with the least geometric mean of its times is written to the tuning file, which later launches read.
This takes a few minutes, mostly for compilation.
"""

import argparse
import itertools
import math
import sys
import warnings
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from hybrid_kernels import hybrid_loss, timing
from hybrid_kernels.triton_backend import plan

VOCABULARIES = (32_000, 151_936)
DIVERGENCES = ("reverse_kl", "jsd")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
BYTES = 2**30  # of one side's logits
SAMPLES = 10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hybrid_kernels tune", description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="only print what was measured")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: there is no GPU here, and nothing to tune on a CPU")
        return 1
    name = torch.cuda.get_device_name()
    for itemsize in DTYPES:
        times: dict[plan.Tuning, list[float]] = {}
        for candidate in plan.CANDIDATES:
            times[candidate] = [
                milliseconds(candidate, itemsize, vocabulary, divergence)
                for vocabulary, divergence in itertools.product(VOCABULARIES, DIVERGENCES)
            ]
            print(f"  {candidate}: {' '.join(f'{t:.3f}' for t in times[candidate])} ms", flush=True)
        best = fastest(times)
        print(f"{name}, {itemsize}-byte logits: {best}", flush=True)
        if not options.no_write:
            print(f"written to {plan.write_tuning(name, itemsize, best)}")
    return 0


def fastest(times: dict[plan.Tuning, list[float]]) -> plan.Tuning:
    """The candidate with the least geometric mean time, among those that ran on every problem."""
    ran = {c: each for c, each in times.items() if all(map(math.isfinite, each))}
    if not ran:
        raise RuntimeError("tune: none of the candidates could run on this GPU; see above")
    return min(ran, key=lambda c: math.prod(ran[c]))


def milliseconds(tuning: plan.Tuning, itemsize: int, vocabulary: int, divergence: str) -> float:
    """Median time of the loss and its gradient; infinite for a candidate that can't run."""
    rows = BYTES // itemsize // vocabulary
    student = torch.randn(rows, vocabulary, device="cuda").to(DTYPES[itemsize])
    teacher = torch.randn_like(student)
    student.requires_grad_()
    with mock.patch.object(plan, "tuned", return_value=tuning), warnings.catch_warnings():
        # A refused candidate must fail here, or the sweeping form would be timed in its place.
        warnings.filterwarnings("error", message="hybrid_kernels: .* refused")
        try:
            return timing.device_times(
                lambda: hybrid_loss(student, teacher, divergence=divergence), SAMPLES
            ).median
        except (RuntimeError, RuntimeWarning, OutOfResources) as error:
            print(f"  {tuning} can't run: {error}", file=sys.stderr)
            return math.inf
