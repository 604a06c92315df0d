"""Every kernel compiles for every GPU family we name; the shipped ones are as they should be."""

import pytest
import torch

from hybrid_kernels.types import available_divergences

pytest.importorskip("triton", reason="needs Triton's compiler")

from bench import aot
from hybrid_kernels.kernels import config

pytestmark = pytest.mark.skipif(
    config.INTERPRETED, reason="compiles ahead of time, which TRITON_INTERPRET=1 turns off"
)

DIVERGENCES = available_divergences()
OPTIONS = {
    "floor": {"teacher_floor": -20.0},
    "distillation-only": {"policy_gradient": False, "mask": False},
    "policy-gradient-only": {"distil": False},
}


# The row-resident form is for NVIDIA GPUs; other tests compile for sm_90.
ELSEWHERE = [
    (gpu, mode)
    for gpu in aot.TARGETS
    for mode in aot.MODES
    if gpu != "sm_90" and (gpu, mode) != ("gfx942", "resident")
]


@pytest.mark.parametrize(("gpu", "mode"), ELSEWHERE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiles_for_every_target(gpu, divergence, mode):
    compiled = aot.compile_rows(gpu, 151936, torch.bfloat16, divergence, mode)
    assert compiled.kernel.asm["hsaco" if gpu == "gfx942" else "cubin"]


@pytest.mark.parametrize("gpu", aot.TARGETS)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_scale_kernel_compiles(gpu, vocabulary):
    compiled = aot.compile_scale(gpu, vocabulary, torch.bfloat16)
    assert compiled.kernel.asm["hsaco" if gpu == "gfx942" else "cubin"]


@pytest.mark.parametrize("vocabulary", [128, *aot.VOCABULARIES])
@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_row_resident_form(vocabulary, dtype, divergence):
    """No spills; each logit read once and each gradient written once, in 128-bit pieces."""
    shipped = aot.compile_rows("sm_90", vocabulary, dtype, divergence, "resident")
    assert aot.resources(shipped).spilled == 0
    if vocabulary == 128:
        return  # a program holds fewer entries than its threads have room for
    main = aot.compile_rows(
        "sm_90", vocabulary, dtype, divergence, "resident", mask=False, small=False
    )
    cost = aot.cost(main, divergence)
    # A slice fills its last chunk in part; what is not there is not read.
    launch = main.launch
    room = launch.chunks * launch.chunk_v / launch.slice_v
    assert cost.loaded == pytest.approx(2 * dtype.itemsize * room)
    assert cost.stored == pytest.approx(dtype.itemsize * room)
    # A row's scalars and, where it has them, its edges. A slice by single entries would be 20 more.
    assert cost.narrow < 40


@pytest.mark.parametrize("vocabulary", [128, 50257, 151936])
@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", ["sweeping", "statistics", "gradient"])
def test_the_sweeping_form_spills_nothing(vocabulary, dtype, divergence, mode):
    compiled = aot.compile_rows("sm_90", vocabulary, dtype, divergence, mode)
    assert aot.resources(compiled).spilled == 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", aot.MODES)
def test_no_spills_with_options(options, mode):
    # Without a teacher there is no divergence to tell apart.
    divergences = ["reverse_kl"] if options == "policy-gradient-only" else ["reverse_kl", "jsd"]
    for divergence in divergences:
        compiled = aot.compile_rows(
            "sm_90", 151936, torch.bfloat16, divergence, mode, **OPTIONS[options]
        )
        assert aot.resources(compiled).spilled == 0, divergence


@pytest.mark.parametrize("mode", aot.MODES)
def test_a_single_row_compiles(mode):
    compiled = aot.compile_rows("sm_90", 1000, torch.bfloat16, "reverse_kl", mode, count=1)
    assert compiled.kernel.asm["cubin"]


@pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["statistics", "gradient"])
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_sweeping_tiles_move_in_128_bits(dtype, mode, vocabulary):
    compiled = aot.compile_rows("sm_90", vocabulary, dtype, "reverse_kl", mode)
    names = {i.name for i in aot.machine_code(compiled)}
    assert "LDG.E.128" in names
    assert ("STG.E.128" in names) == (mode == "gradient")


def test_the_count_sees_what_is_read_twice_and_in_small_pieces():
    """The sweeping form reads everything twice; a stride of odd length has no wide accesses."""
    twice = aot.compile_rows("sm_90", 4096, torch.bfloat16, "reverse_kl", "sweeping", mask=False)
    wide = [i.name for i in aot.machine_code(twice) if i.name == "LDG.E.128"]
    assert len(wide) * 8 >= 2 * 2 * twice.entries
