"""Launch configurations: the only place where tuning lives."""

from typing import NamedTuple

import torch
import triton
from triton import knobs

# Whether kernels run on the CPU, one program after another. Triton decides when it is imported.
INTERPRETED = bool(knobs.runtime.interpret)

# Elements of the vocabulary that a program holds at once, in registers, and how many of them a
# thread holds. tests/test_ahead_of_time.py forbids spills, which the Jensen-Shannon divergence has
# at 16 elements a thread.
MAX_BLOCK_V = 4096
MAX_BLOCK_V_TWO_SWEEPS = 2048
PER_THREAD = 16
PER_THREAD_TWO_SWEEPS = 8

# Left to itself, ptxas spills a few scalars to fit a third program of 80 registers on an SM.
MAX_REGISTERS = 128

# The interpreter pays per operation, not per element.
INTERPRETED_BLOCK_V = 65536


class Launch(NamedTuple):
    """Compile-time constants of a row kernel."""

    block_v: int
    num_warps: int

    def options(self, hip: bool = torch.version.hip is not None) -> dict[str, int | bool]:
        """Compiler options. Contraction to fused multiply-add is on, whatever Triton's default."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        return options if hip else {**options, "maxnreg": MAX_REGISTERS}


def rows(vocabulary: int, one_sweep: bool = True) -> Launch:
    """One program per row, sweeping tiles of `block_v` entries."""
    largest = MAX_BLOCK_V if one_sweep else MAX_BLOCK_V_TWO_SWEEPS
    per_thread = PER_THREAD if one_sweep else PER_THREAD_TWO_SWEEPS
    if INTERPRETED:
        largest = INTERPRETED_BLOCK_V
    block_v = min(triton.next_power_of_2(vocabulary), largest)
    num_warps = min(8, max(1, block_v // (per_thread * 32)))
    return Launch(block_v=block_v, num_warps=num_warps)
