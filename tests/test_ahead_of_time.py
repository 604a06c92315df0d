"""Every kernel compiles for every GPU family we name; the shipped ones are as they should be."""

import itertools

import pytest
import torch

from hybrid_kernels.divergences import FAMILIES

pytest.importorskip("triton", reason="needs Triton's compiler")

from bench import standin
from bench.aot import machine_code
from bench.aot import report as aot
from hybrid_kernels.triton_backend import plan

pytestmark = pytest.mark.skipif(
    plan.INTERPRETED, reason="compiles ahead of time, which TRITON_INTERPRET=1 turns off"
)

OTHERS = [name for name in FAMILIES if name not in aot.KINDS]
OPTIONS = {
    "floor": {"teacher_floor": -20.0},
    "distillation-only": {"policy_gradient": False, "mask": False},
    "policy-gradient-only": {"distil": False},
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

# The row-resident form is for NVIDIA GPUs; other tests compile for sm_90.
full = pytest.mark.full
ONE_MODE = [("sm_80", "resident"), ("sm_100", "resident"), ("gfx942", "sweeping")]
ELSEWHERE = [
    pytest.param(gpu, mode, marks=[full] * ((gpu, mode) not in ONE_MODE))
    for gpu in standin.GPUS
    for mode in aot.MODES
    if gpu != "sm_90" and (gpu, mode) != ("gfx942", "resident")
]

every_dtype = pytest.mark.parametrize("dtype", aot.DTYPES, ids=str)
every_sweep = pytest.mark.parametrize("mode", ["sweeping", "statistics", "gradient"])

SWEEPS = [mode for mode in aot.MODES if mode != "resident"]
# Bytes of the stack that the row-resident form may use: a few of a row's numbers, not its logits,
# of which a thread holds hundreds. Where it meets once, they are fewer.
SCALARS = 96
FEW_SCALARS = 16
# What an entry of 16 bits may cost there in instructions, and a row in barriers. (At V = 32,000 JSD
# leaves a ninth of its lanes empty, and takes 55.)
INSTRUCTIONS = {"reverse_kl": 32.0, "forward_kl": 34.0, "jeffreys": 37.0, "jsd": 51.0}
BARRIERS = 10


def allowed(mode):
    return SCALARS if mode == "resident" else 0


def assembled(compiled, gpu):
    return compiled.kernel.asm["hsaco" if gpu == "gfx942" else "cubin"]


@pytest.mark.parametrize(("gpu", "mode"), ELSEWHERE)
@pytest.mark.parametrize("divergence", aot.KINDS)
def test_compiles_for_every_target(gpu, divergence, mode):
    compiled = aot.compile_rows(gpu, 151936, torch.bfloat16, divergence, mode)
    assert assembled(compiled, gpu)


elsewhere = pytest.mark.parametrize("gpu", [gpu for gpu in standin.GPUS if gpu != "sm_90"])


@full
@elsewhere
@pytest.mark.parametrize("divergence", OTHERS)
def test_other_divergences_compile_for_every_target(gpu, divergence):
    compiled = aot.compile_rows(gpu, 151936, torch.bfloat16, divergence, "sweeping")
    assert assembled(compiled, gpu)


@full
@elsewhere
@pytest.mark.parametrize("teachers", ["top-128", "three"])
def test_other_teachers_compile_for_every_target(gpu, teachers):
    case = (gpu, 151936, torch.bfloat16, "reverse_kl", "sweeping")
    assert assembled(aot.compile_rows(*case, **TEACHERS[teachers]), gpu)
    assert assembled(aot.compile_marks(gpu, 151936, torch.bfloat16, 128), gpu)


@full
@pytest.mark.parametrize("teachers", TEACHERS)
@pytest.mark.parametrize("mode", SWEEPS)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_other_teachers_spill_nothing(vocabulary, mode, teachers):
    case = ("sm_90", vocabulary, torch.bfloat16, "reverse_kl", mode)
    compiled = aot.compile_rows(*case, **TEACHERS[teachers])
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("size", [32, 128, 1024])
def test_a_support_is_marked_without_spills(size):
    compiled = aot.compile_marks("sm_90", 151936, torch.bfloat16, size)
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("gpu", standin.GPUS)
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_scale_kernel_compiles(gpu, vocabulary):
    compiled = aot.compile_scale(gpu, vocabulary, torch.bfloat16)
    assert assembled(compiled, gpu)


@every_dtype
@pytest.mark.parametrize("vocabulary", [128, 151936, pytest.param(50257, marks=full)])
@pytest.mark.parametrize("divergence", aot.KINDS)
def test_the_row_resident_form(divergence, vocabulary, dtype):
    assert_lean(divergence, vocabulary, dtype)


@full
@pytest.mark.parametrize("vocabulary", [v for v in aot.VOCABULARIES if v not in (50257, 151936)])
@pytest.mark.parametrize("divergence", aot.KINDS)
def test_the_row_resident_form_of_other_vocabularies(divergence, vocabulary):
    assert_lean(divergence, vocabulary, torch.bfloat16)


def assert_lean(divergence, vocabulary, dtype):
    """Each logit read once and each gradient written once, in 128-bit pieces; few spills; a later
    row's loads that nothing touches before the meeting."""
    shipped = aot.compile_rows("sm_90", vocabulary, dtype, divergence, "resident")
    spilled = machine_code.resources(shipped).spilled
    assert spilled <= (FEW_SCALARS if FAMILIES[divergence].one_sweep else SCALARS)
    if vocabulary == 128:
        return  # a program holds fewer entries than its threads have room for
    main = aot.compile_rows(
        "sm_90", vocabulary, dtype, divergence, "resident", mask=False, small=False
    )
    exponentials = aot.EXPONENTIALS[divergence]
    cost = machine_code.cost(main, exponentials)
    # A slice fills its last tile in part; what is not there is not read.
    room = main.launch.room(dtype.itemsize) / main.launch.slice_v
    assert cost.loaded == pytest.approx(2 * dtype.itemsize * room)
    # (Or not stored: a warp may have nothing of that tile.)
    assert dtype.itemsize <= cost.stored <= dtype.itemsize * room + 1e-6
    # A row's scalars and, where it has them, its edges. A slice by single entries would be 20 more.
    assert cost.narrow < 40
    assert cost.converted == 0
    if dtype == torch.bfloat16:
        filled = (divergence, vocabulary) != ("jsd", 32000)
        assert cost.instructions <= (INSTRUCTIONS[divergence] if filled else 55.0)
        # (More programs than lanes of a warp meet by way of shared memory.)
        assert cost.barriers <= BARRIERS * (2 if main.launch.splits > 32 else 1)
    order = machine_code.order(main, exponentials)
    if FAMILIES[divergence].one_sweep:
        assert order.ahead == 2 * main.launch.tiles
        assert order.early == 0
        assert order.late <= 3  # the sampled token and its logits, which nothing waits for


@every_dtype
@every_sweep
@pytest.mark.parametrize("vocabulary", [128, 50257, 151936])
@pytest.mark.parametrize("divergence", aot.KINDS)
def test_the_sweeping_form_spills_nothing(divergence, vocabulary, mode, dtype):
    compiled = aot.compile_rows("sm_90", vocabulary, dtype, divergence, mode)
    assert machine_code.resources(compiled).spilled == 0


@full
@every_sweep
@pytest.mark.parametrize("divergence", OTHERS)
def test_the_sweeping_form_of_others_spills_nothing(divergence, mode):
    compiled = aot.compile_rows("sm_90", 151936, torch.bfloat16, divergence, mode)
    assert machine_code.resources(compiled).spilled == 0


@pytest.mark.parametrize("divergence", FAMILIES)
@pytest.mark.parametrize("gpu", standin.GPUS)
def test_a_part_of_the_vocabulary_compiles(gpu, divergence):
    """On one of them with a floor, two teachers, and a single row, which is a constant."""
    options = {"teacher_floor": -20.0, "teachers": 2, "count": 1} if gpu == "sm_90" else {}
    for one in ({}, *({name: value} for name, value in options.items())):
        compiled = aot.compile_values(gpu, 151936 // 8, torch.bfloat16, divergence, **one)
        assert assembled(compiled, gpu)
        if gpu != "gfx942":
            assert machine_code.resources(compiled).spilled == 0, one


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        *itertools.product(["reverse_kl", "jsd"], ["floor", "distillation-only"]),
        ("reverse_kl", "policy-gradient-only"),  # in which there is no divergence
    ],
)
@pytest.mark.parametrize("mode", aot.MODES)
def test_options_spill_scalars_at_most(mode, divergence, options):
    case = ("sm_90", 151936, torch.bfloat16, divergence, mode)
    compiled = aot.compile_rows(*case, **OPTIONS[options])
    assert machine_code.resources(compiled).spilled <= allowed(mode)


@pytest.mark.parametrize("mode", aot.MODES)
def test_a_single_row_compiles(mode):
    compiled = aot.compile_rows("sm_90", 1000, torch.bfloat16, "reverse_kl", mode, count=1)
    assert compiled.kernel.asm["cubin"]


@every_dtype
@pytest.mark.parametrize("mode", ["statistics", "gradient"])
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_sweeping_tiles_move_in_128_bits(dtype, mode, vocabulary):
    compiled = aot.compile_rows("sm_90", vocabulary, dtype, "reverse_kl", mode)
    names = {i.name for i in machine_code.instructions(compiled)}
    assert "LDG.E.128" in names
    assert ("STG.E.128" in names) == (mode == "gradient")


@full
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_a_gradient_in_fewer_bits_than_the_logits(vocabulary):
    """As the linear op's chunks have it: 4 + 4 bytes of an entry read, 2 written."""
    vocabulary = -(-vocabulary // 16) * 16  # rows begin at 16-byte boundaries
    case = ("sm_90", vocabulary, torch.float32, "reverse_kl", "resident")
    shipped = aot.compile_rows(*case, gradient_dtype=torch.bfloat16)
    assert machine_code.resources(shipped).spilled <= SCALARS
    main = aot.compile_rows(*case, gradient_dtype=torch.bfloat16, mask=False, small=False)
    room = main.launch.room(4) / main.launch.slice_v
    cost = machine_code.cost(main, aot.EXPONENTIALS["reverse_kl"])
    assert cost.loaded == pytest.approx(8 * room)
    assert cost.stored == pytest.approx(2 * room)


def test_what_does_not_compile_is_reported(monkeypatch, capsys, tmp_path):
    case = ("impossible", 151936, torch.bfloat16, "no divergence", {})
    monkeypatch.setattr(aot, "configurations", lambda: [aot.Configuration(*case)])
    path = tmp_path / "table.md"
    assert aot.main([f"--save={path}"]) == 1
    assert "FAILED: ValueError" in capsys.readouterr().out
    assert "FAILED: ValueError" in path.read_text()


def test_the_count_sees_what_is_read_twice_and_in_small_pieces():
    """The sweeping form reads everything twice; a stride of odd length has no wide accesses."""
    twice = aot.compile_rows("sm_90", 4096, torch.bfloat16, "reverse_kl", "sweeping", mask=False)
    wide = [i.name for i in machine_code.instructions(twice) if i.name == "LDG.E.128"]
    assert len(wide) * 8 >= 2 * 2 * twice.entries
