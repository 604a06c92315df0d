"""Every kernel compiles for every supported GPU family, within bounds on spills and costs."""

import itertools

import pytest
import torch

from hybrid_kernels.divergences import FAMILIES

pytest.importorskip("triton", reason="needs Triton's compiler")

from bench import standin
from bench.aot import machine_code, report
from bench.aot.compile import (
    MODES,
    SWEEPS,
    Configuration,
    compile_marks,
    compile_rows,
    compile_scale,
    compile_values,
)
from hybrid_kernels.triton_backend import plan

pytestmark = pytest.mark.skipif(
    plan.INTERPRETED, reason="compiles ahead of time, which TRITON_INTERPRET=1 turns off"
)

OTHERS = [name for name in FAMILIES if name not in report.KINDS]
OPTIONS = {
    "floor": {"teacher_floor": -20.0},
    "distillation-only": {"policy_gradient": False, "mask": False},
    "policy-gradient-only": {"teachers": 0},
}
TEACHERS = {
    "top-32": {"support": 32},
    "top-128": {"support": 128},
    "top-1024": {"support": 1024},
    "top-100-renormalized": {"support": 100, "tail": "renormalize"},
    "top-100-masked": {"support": 100, "tail": "mask"},
    "two-top-100": {"support": 100, "teachers": 2},
    "two": {"teachers": 2},
    "three": {"teachers": 3},
}

full = pytest.mark.full
# The row-resident form is for NVIDIA GPUs alone. The tests without a GPU's name compile for sm_90.
ONE_MODE = [("sm_80", "resident"), ("sm_100", "resident"), ("gfx942", "sweeping")]
ELSEWHERE = [
    pytest.param(gpu, mode, marks=[full] * ((gpu, mode) not in ONE_MODE))
    for gpu in standin.GPUS
    for mode in MODES
    if gpu != "sm_90" and (gpu, mode) != ("gfx942", "resident")
]

every_dtype = pytest.mark.parametrize("dtype", report.DTYPES, ids=str)
every_sweep = pytest.mark.parametrize("mode", SWEEPS)

# Bytes of the stack that the row-resident form may use, for a few numbers of a row. Its logits
# would be hundreds in each thread. Where programs meet once, fewer numbers are spilled.
SCALARS = 96
FEW_SCALARS = 16
# How many instructions the row-resident form may take for a 16-bit entry, and barriers for a row.
INSTRUCTIONS = {"reverse_kl": 32.0, "forward_kl": 34.0, "jeffreys": 37.0, "jsd": 51.0}
JSD_AT_32000 = 55.0  # where a ninth of the lanes are empty
BARRIERS = 10


def allowed(mode):
    return SCALARS if mode == "resident" else 0


def marks_of(size, gpu="sm_90"):
    """For the kernel that sees a support's ids and no more of a call."""
    return Configuration(target=gpu, support=size, policy_gradient=False, mask=False)


def assembled(compiled):
    return compiled.kernel.asm["hsaco" if compiled.configuration.target == "gfx942" else "cubin"]


@pytest.mark.parametrize(("gpu", "mode"), ELSEWHERE)
@pytest.mark.parametrize("divergence", report.KINDS)
def test_compiles_for_every_target(gpu, divergence, mode):
    compiled = compile_rows(Configuration(divergence=divergence, mode=mode, target=gpu))
    assert assembled(compiled)


elsewhere = pytest.mark.parametrize("gpu", [gpu for gpu in standin.GPUS if gpu != "sm_90"])


@full
@elsewhere
@pytest.mark.parametrize("divergence", OTHERS)
def test_other_divergences_compile_for_every_target(gpu, divergence):
    compiled = compile_rows(Configuration(divergence=divergence, mode="sweeping", target=gpu))
    assert assembled(compiled)


@full
@elsewhere
@pytest.mark.parametrize("teachers", ["top-128", "three"])
def test_other_teachers_compile_for_every_target(gpu, teachers):
    configuration = Configuration(mode="sweeping", target=gpu, **TEACHERS[teachers])
    assert assembled(compile_rows(configuration))
    assert assembled(compile_marks(marks_of(128, gpu)))


@full
@pytest.mark.parametrize("teachers", TEACHERS)
@pytest.mark.parametrize("mode", SWEEPS)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_other_teachers_spill_nothing(vocabulary, mode, teachers):
    compiled = compile_rows(Configuration(vocabulary, mode=mode, **TEACHERS[teachers]))
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("size", [32, 128, 1024])
def test_a_support_is_marked_without_spills(size):
    compiled = compile_marks(marks_of(size))
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("gpu", standin.GPUS)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_scale_kernel_compiles(gpu, vocabulary):
    assert assembled(compile_scale(Configuration(vocabulary, target=gpu)))


@every_dtype
@pytest.mark.parametrize("vocabulary", [128, 151936, pytest.param(50257, marks=full)])
@pytest.mark.parametrize("divergence", report.KINDS)
def test_the_row_resident_form(divergence, vocabulary, dtype):
    assert_lean(divergence, vocabulary, dtype)


@full
@pytest.mark.parametrize("vocabulary", [v for v in report.VOCABULARIES if v not in (50257, 151936)])
@pytest.mark.parametrize("divergence", report.KINDS)
def test_the_row_resident_form_of_other_vocabularies(divergence, vocabulary):
    assert_lean(divergence, vocabulary, torch.bfloat16)


def assert_lean(divergence, vocabulary, dtype):
    """Each logit is read once and each gradient written once, in 128-bit accesses; few numbers are
    spilled; nothing touches a later row's loads before the meeting."""
    configuration = Configuration(vocabulary, dtype, divergence)
    spilled = machine_code.resources(compile_rows(configuration)).spilled
    assert spilled <= (FEW_SCALARS if FAMILIES[divergence].one_sweep else SCALARS)
    if vocabulary == 128:
        return  # the threads of a program have room for more entries than there are
    main = compile_rows(configuration._replace(mask=False, small=False))
    cost = machine_code.cost(main)
    # A slice fills its last tile in part, and the rest of the tile is not read.
    room = main.form.room(dtype.itemsize) / main.form.slice_v
    assert cost.loaded == pytest.approx(2 * dtype.itemsize * room)
    # The path may skip the stores of that tile, in which a warp may have no entries.
    assert dtype.itemsize <= cost.stored <= dtype.itemsize * room + 1e-6
    # A row's scalars and, if it has them, its edges. A slice by single entries would take 20 more.
    assert cost.narrow < 40
    assert cost.converted == 0
    if dtype == torch.bfloat16:
        filled = (divergence, vocabulary) != ("jsd", 32000)
        assert cost.instructions <= (INSTRUCTIONS[divergence] if filled else JSD_AT_32000)
        # If more programs meet than a warp has lanes, they do so by way of shared memory.
        assert cost.barriers <= BARRIERS * (2 if main.form.splits > 32 else 1)
    order = machine_code.order(main)
    if FAMILIES[divergence].one_sweep:
        assert order.ahead == 2 * main.form.tiles
        assert order.early == 0
        assert order.late <= 3  # the sampled token and its logits, which no instruction waits for


@every_dtype
@every_sweep
@pytest.mark.parametrize("vocabulary", [128, 50257, 151936])
@pytest.mark.parametrize("divergence", report.KINDS)
def test_the_sweeping_form_spills_nothing(divergence, vocabulary, mode, dtype):
    compiled = compile_rows(Configuration(vocabulary, dtype, divergence, mode))
    assert machine_code.resources(compiled).spilled == 0


@full
@every_sweep
@pytest.mark.parametrize("divergence", OTHERS)
def test_the_sweeping_form_of_others_spills_nothing(divergence, mode):
    compiled = compile_rows(Configuration(divergence=divergence, mode=mode))
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("divergence", FAMILIES)
@pytest.mark.parametrize("gpu", standin.GPUS)
def test_a_part_of_the_vocabulary_compiles(gpu, divergence):
    """And on sm_90 with a floor, with two teachers, and with one row, which is a constant."""
    options = {"teacher_floor": -20.0, "teachers": 2, "num_rows": 1} if gpu == "sm_90" else {}
    for option in ({}, *({name: value} for name, value in options.items())):
        configuration = Configuration(151936 // 8, divergence=divergence, target=gpu, **option)
        compiled = compile_values(configuration)
        assert assembled(compiled)
        if gpu != "gfx942":
            assert machine_code.resources(compiled).spilled == 0, option


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        *itertools.product(["reverse_kl", "jsd"], ["floor", "distillation-only"]),
        ("reverse_kl", "policy-gradient-only"),  # which computes no divergence
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_options_spill_scalars_at_most(mode, divergence, options):
    configuration = Configuration(divergence=divergence, mode=mode, **OPTIONS[options])
    compiled = compile_rows(configuration)
    assert machine_code.resources(compiled).spilled <= allowed(mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_row_compiles(mode):
    assert assembled(compile_rows(Configuration(1000, mode=mode, num_rows=1)))


@every_dtype
@pytest.mark.parametrize("mode", ["statistics", "gradient"])
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_sweeping_tiles_move_in_128_bits(dtype, mode, vocabulary):
    compiled = compile_rows(Configuration(vocabulary, dtype, mode=mode))
    names = {i.name for i in machine_code.instructions(compiled)}
    assert "LDG.E.128" in names
    assert ("STG.E.128" in names) == (mode == "gradient")


@full
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_a_gradient_in_fewer_bits_than_the_logits(vocabulary):
    """As in the linear op's chunks: 4 + 4 bytes of an entry are read and 2 are written."""
    vocabulary = -(-vocabulary // 16) * 16  # rows begin at 16-byte boundaries
    configuration = Configuration(vocabulary, torch.float32, gradient_dtype=torch.bfloat16)
    assert machine_code.resources(compile_rows(configuration)).spilled <= SCALARS
    main = compile_rows(configuration._replace(mask=False, small=False))
    room = main.form.room(4) / main.form.slice_v
    cost = machine_code.cost(main)
    assert cost.loaded == pytest.approx(8 * room)
    assert cost.stored == pytest.approx(2 * room)


def test_what_does_not_compile_is_reported(monkeypatch, capsys, tmp_path):
    impossible = ("impossible", Configuration(divergence="no divergence"))
    monkeypatch.setattr(report, "configurations", lambda: [impossible])
    path = tmp_path / "table.md"
    assert report.main([f"--save={path}"]) == 1
    assert "FAILED: ValueError" in capsys.readouterr().out
    assert "FAILED: ValueError" in path.read_text()


def test_the_count_sees_what_is_read_twice():
    """The sweeping form reads both sides of a row twice."""
    twice = compile_rows(Configuration(4096, mode="sweeping", mask=False))
    wide = [i.name for i in machine_code.instructions(twice) if i.name == "LDG.E.128"]
    assert len(wide) * 8 >= 2 * 2 * twice.entries
