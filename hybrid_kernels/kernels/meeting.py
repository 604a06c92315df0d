"""How programs that share a row meet: each says that it has arrived, and waits until all have.

What is published before an arrival can be read after the wait. A GPU runs the programs of a
cooperative launch side by side; Triton's interpreter runs one after another, so that a test must
run them side by side itself (`tests/interpreter.py`). Programs that never come would hang whoever
waits for them: a wait has an end, after seconds, which is an error.
"""

import triton
import triton.language as tl

from hybrid_kernels.kernels import config
from hybrid_kernels.kernels.reduce import INTERPRETED

# Seconds of them on a GPU, where each takes a microsecond or so.
MAX_POLLS = tl.constexpr(2**12 if config.INTERPRETED else 2**22)


@triton.jit
def arrive(counter_ptr):
    """Makes what this program has published visible; returns how many arrived before."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals):
    """Until that many have arrived, after which everything that they published can be read.

    Where they don't arrive, a GPU's kernel ends with a trap, which torch reports as a CUDA error.
    """
    polls = 0
    while (tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals) & (
        polls < MAX_POLLS
    ):
        polls += 1
    if INTERPRETED:
        assert polls < MAX_POLLS, "programs that share a row did not arrive"
    else:
        tl.inline_asm_elementwise(
            "{.reg .pred lost; setp.ge.s32 lost, $1, $2; @lost trap; mov.b32 $0, $1;}",
            "=r,r,r",
            [polls, MAX_POLLS],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


@triton.jit
def read(ptr, empty, SPLITS: tl.constexpr, LANES: tl.constexpr):
    """One number from each of SPLITS programs, past the L1 cache, which others don't update."""
    lane = tl.arange(0, LANES)
    return tl.load(ptr + lane, mask=lane < SPLITS, other=empty, cache_modifier=".cg")
