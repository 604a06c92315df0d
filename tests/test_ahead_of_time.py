"""Every kernel compiles for every GPU family we name, and the shipped ones spill nothing."""

import pytest
import torch

from hybrid_kernels.types import available_divergences

pytest.importorskip("triton", reason="needs Triton's compiler")

from bench import ahead_of_time as aot
from hybrid_kernels.kernels import config

pytestmark = pytest.mark.skipif(config.INTERPRETED, reason="the interpreter compiles nothing")

DIVERGENCES = available_divergences()


@pytest.mark.parametrize("gpu", [t for t in aot.TARGETS if t != "sm_90"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", aot.MODES)
def test_compiles_for_every_target(gpu, divergence, mode):
    kernel = aot.compile_rows(gpu, 151936, torch.bfloat16, divergence, mode)
    assert kernel.asm["hsaco" if gpu == "gfx942" else "cubin"]


@pytest.mark.parametrize("gpu", aot.TARGETS)
def test_scale_kernel_compiles(gpu):
    kernel = aot.compile_scale(gpu, 151936, torch.bfloat16)
    assert kernel.asm["hsaco" if gpu == "gfx942" else "cubin"]


@pytest.mark.parametrize("vocabulary", [128, 50257, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", aot.MODES)
def test_no_spills_on_sm_90(vocabulary, dtype, divergence, mode):
    used = aot.resources(aot.compile_rows("sm_90", vocabulary, dtype, divergence, mode))
    assert used.stack == 0, used
    assert used.local == 0, used


@pytest.mark.parametrize(
    "options",
    [{"teacher_floor": -20.0}, {"policy_gradient": False}, {"distil": False}],
    ids=["floor", "distillation-only", "policy-gradient-only"],
)
@pytest.mark.parametrize("mode", aot.MODES)
def test_no_spills_with_options(options, mode):
    if mode == "gradient" and "distil" in options:
        options = {**options, "policy_gradient": True}
    kernel = aot.compile_rows("sm_90", 151936, torch.bfloat16, "reverse_kl", mode, **options)
    used = aot.resources(kernel)
    assert used.stack == used.local == 0, used


@pytest.mark.parametrize("mode", aot.MODES)
def test_a_single_row_compiles(mode):
    assert aot.compile_rows("sm_90", 1000, torch.bfloat16, "reverse_kl", mode, count=1).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tiles_move_in_128_bits(dtype, divergence):
    kernel = aot.compile_rows("sm_90", 151936, dtype, divergence, "hybrid")
    loads, stores = aot.access_widths(kernel, "ld"), aot.access_widths(kernel, "st")
    # Narrower accesses are a row's scalars, and the tail of a vocabulary that no tile divides.
    block_bits = config.rows(151936, divergence != "jsd").block_v * dtype.itemsize * 8
    threads = config.rows(151936, divergence != "jsd").num_warps * 32
    per_tile = block_bits // (threads * 128)
    assert loads[128] >= 4 * per_tile, loads
    assert stores[128] >= per_tile, stores
