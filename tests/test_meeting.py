"""Programs that share a row run side by side in many orders, both in the kernel that ships, where
each has several slices, and in the kernel that measures the meeting.

`--orders=N` tries N orders for each input; the default is one order, or two with `--all`.
"""

import itertools
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import cases
import faults
from cases import DIVERGENCES, Case, divergence_id
from faults import moved, replaced
from tolerance import assert_close

pytest.importorskip("triton", reason="needs Triton's interpreter")

from triton.runtime.errors import InterpreterError

from bench.gpu import meeting as measured
from hybrid_kernels import Divergence, triton_backend
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import FIELDS, SMALL_DIVERGENCE, STUDENT_FIELDS, Coefficients, Rows
from hybrid_kernels.torch_backend import launch as torch_launch
from hybrid_kernels.triton_backend import launch as launchers
from hybrid_kernels.triton_backend import meeting as meetings
from hybrid_kernels.triton_backend import plan, resident, slices

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = 12
# V, and settings of `triton_backend/plan.py`, for three slices a row. Rows of 101 have edges. With
# four, five or seven programs, each program gets every part of a row at some time, and some rows
# have their slices in two turns of the programs.
LAYOUTS = {
    "no lag": (96, {"PROGRAMS": 3, "LAG": False}),
    "lag": (96, {"PROGRAMS": 4, "LAG": True}),
    "edges, no lag": (101, {"PROGRAMS": 5, "LAG": False}),
    "edges, lag": (101, {"PROGRAMS": 7, "LAG": True}),
    # Entries after the full slices are in the edges.
    "two warps": (131, {"PROGRAMS": 6, "LAG": True, "WARPS": 2, "SLICE": 32}),
}
REVERSE_KL, JSD = Divergence("reverse_kl"), Divergence("jsd")  # with one meeting and with two
RESIDENT = [d for d in DIVERGENCES if FAMILIES[d.name].resident]
OTHERS = [d for d in RESIDENT if d.name not in ("reverse_kl", "jsd")]

# Kinds of rows: "m" is masked, "s" has a small divergence, "z" and "w" have -inf in the student or
# in the teacher, "n" has a NaN, and "." none of these.
KINDS = "msszs.mwmnsm"


@pytest.fixture(params=["edges, lag"])
def layout(request, monkeypatch):
    """Makes `plan` cut rows in this layout; returns V."""
    vocabulary, settings = LAYOUTS[request.param]
    for name, value in {"SLICE": 40, "BLOCK_V": 64, **settings}.items():
        monkeypatch.setattr(plan, f"INTERPRETED_{name}", value)
    return vocabulary


def of_kinds(kinds: str, vocabulary: int, seed: int, dtype=torch.float32) -> Case:
    """Rows that take different paths through the kernel."""
    case = cases.make(vocabulary, (ROWS,), seed=seed, dtype=dtype)
    student, teacher = case.student, case.teacher
    case.mask = mask = torch.ones(ROWS, dtype=torch.bool)
    for row, kind in enumerate(kinds):
        if kind == "m":
            mask[row] = False
            student[row, ::3] = torch.nan
        elif kind == "s":
            # They differ in half of the row, by under 1e-3 nats: large terms leave few digits.
            teacher[row] = student[row]
            teacher[row, : vocabulary // 2] *= 1 + 2.0**-7
        elif kind == "z":
            student[row, vocabulary // 2] = -torch.inf
        elif kind == "w":
            teacher[row, vocabulary // 3] = -torch.inf
        elif kind == "n":
            student[row, vocabulary - 1] = torch.nan
    return case


def of_all_kinds(vocabulary: int, seed: int, dtype=torch.float32) -> Case:
    """Rows of all `KINDS`, in that order for seed 0, and else in a random order."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = "".join(KINDS[i] for i in order) if seed else KINDS
    return of_kinds(kinds, vocabulary, seed, dtype)


def check(
    case: Case,
    divergence: Divergence = REVERSE_KL,
    inplace: bool = False,
    temperature: float | None = 1.0,
    floor: float | None = None,
) -> None:
    """Compares every row and field that the kernel writes with the torch backend.

    With a temperature of None, each row has its own.
    """
    rows = cases.rows_of(case, "torch", divergence=divergence, temperature=temperature or 1.0)
    rows = rows._replace(teacher_floor=floor)
    if temperature is None:
        rows = rows._replace(row_temperature=0.5 + 0.25 * (torch.arange(ROWS) % 5))
    got, gradient = outcome(launchers, rows, inplace)
    expected, truth = outcome(torch_launch, rows, inplace)
    end = None if rows.teachers else STUDENT_FIELDS
    torch.testing.assert_close(got[:end], expected[:end], rtol=1e-4, atol=1e-5, equal_nan=True)
    if rows.teachers and rows.one_sweep:
        # Their second sum has a relative error of 2e-7, the first one of 1e-5 to 5e-4.
        value, reference = (statistics[FIELDS.divergence] for statistics in (got, expected))
        small = reference < SMALL_DIVERGENCE / 10
        torch.testing.assert_close(value[small], reference[small], rtol=1e-5, atol=0)
    assert torch.equal(gradient.isfinite(), truth.isfinite())
    finite = truth.isfinite().all(-1)
    truth = truth[finite].double()
    # The terms of an entry are up to 1, and either backend is off by 4e-7 from float64.
    assert_close(gradient[finite], truth, truth, "gradient", scale=0.2, roundings=4)


def outcome(backend: ModuleType, rows: Rows, inplace: bool) -> tuple[Tensor, Tensor]:
    """The statistics and the gradient of one backend."""
    weights = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(ROWS))
    weights[:, ~rows.valid] = torch.nan
    coefficients = Coefficients(weights[0] if rows.teachers else None, *weights[1:])
    rows = rows._replace(student=rows.student.clone())
    gradient = rows.student if inplace else torch.full_like(rows.student, torch.nan)
    if backend is launchers:
        form = launchers.form(rows, gradient)
        assert isinstance(form, plan.Resident)
        assert (form.splits, form.programs) == (3, plan.INTERPRETED_PROGRAMS)
        assert form.lag == (plan.INTERPRETED_LAG and rows.one_sweep)
    statistics = torch.full_like(rows.statistics(), torch.nan)
    backend.hybrid_rows(rows, statistics, coefficients, gradient)
    return statistics, gradient.flatten(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
def test_right_in_any_order(layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case)


@pytest.mark.parametrize("layout", ["no lag", "edges, no lag", "two warps"], indirect=True)
def test_two_meetings_in_any_order(layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed, torch.bfloat16)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, JSD)


@pytest.mark.parametrize("divergence", OTHERS, ids=divergence_id)
def test_every_divergence_in_any_order(divergence, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence)


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        *itertools.product(
            [REVERSE_KL, JSD],
            [{"temperature": 0.7, "floor": -6.0}, {"temperature": None, "inplace": True}],
        )
    ],
    ids=str,
)
def test_options_in_any_order(divergence, options, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed, torch.bfloat16)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence, **options)


def test_no_teacher_in_any_order(layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        case.teacher = None
        with interleaved(seed, loads=seed % 2 == 0):
            check(case)


@pytest.mark.parametrize("kinds", ["mmmmmmmmmmmm", "msmmms.mmm.n", "mmmzmmmmmms."])
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
def test_few_rows_in_any_order(divergence, kinds, layout, orders, interleaved):
    """All rows are masked, or all but a few."""
    for seed in range(orders):
        case = of_kinds(kinds, layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence, inplace=True)


def test_a_program_alone_does_not_wait_for_ever(layout, interleaved, monkeypatch):
    """As `interleaved` is not entered, programs run one by one, and the others never arrive."""
    monkeypatch.setattr(meetings, "MAX_POLLS", 50)
    with pytest.raises(InterpreterError, match="did not arrive"):
        check(of_all_kinds(layout, 0))


# -- whether these orders find faults --------------------------------------------------------------


class Fault(NamedTuple):
    """Changes to the source of a module, in order, and the inputs for which they show."""

    module: ModuleType
    changes: tuple[tuple, ...]
    layout: str = "lag"
    divergence: Divergence = REVERSE_KL
    inplace: bool = False
    temperature: float | None = 1.0
    dtype: torch.dtype = torch.float32


def in_meeting(*changes: tuple, **where) -> Fault:
    return Fault(meetings, changes, **where)


def in_kernel(*changes: tuple, **where) -> Fault:
    return Fault(resident, changes, **where)


def in_slices(*changes: tuple, **where) -> Fault:
    return Fault(slices, changes, **where)


LATE = "late += tl.max("
FIRST_SUMS = """\
        _publish_sums(args, turn, held, _scale_of(args, turn.row, P), STUDENT, TEACHER, P)
"""
WRITE_STATISTICS = """            if is_lead:
                _write_statistics(args, number, value, slopes, sums, row, constants, P)
"""
WRITE_SMALL = """            if P.small:
                if agreed(_is_small(sums, constants, P)):
                    _write_small(args, where, held, sums, row, constants, P, D)
"""
AFTER_GRADIENT = "            if is_owner:\n"
SUMS_OF_SLICE = "sums_of_slice(held, constants.scale, is_lead, STUDENT, TEACHER, P)"

FAULTS = {
    "words of a row for the next one": in_meeting(
        (replaced, "(row * P.meetings + MEETING)", "(row // 2 * P.meetings + MEETING)")
    ),
    "words of one meeting for the other": in_meeting(
        (replaced, "(row * P.meetings + MEETING)", "(row * P.meetings)"), divergence=JSD
    ),
    "no wait": in_meeting((replaced, LATE, "late += 0 * tl.max(")),
    "no wait for all numbers": in_meeting((replaced, LATE, "late = tl.max(")),
    "no wait for all programs": in_meeting((replaced, LATE, "late += tl.min(")),
    "nothing says that a number is there": in_meeting((replaced, "bits | (1 << 32)", "bits")),
    "no wait for the second meeting": in_kernel(
        (replaced, "met = meet(args, number, 1, P)", "met = meet(args, number, 0, P)"),
        divergence=JSD,
    ),
    "sums of every slice for the first": in_kernel(
        (
            replaced,
            "publish(args, turn, 0, numbers, P)",
            "publish(args, first_turn(P), 0, numbers, P)",
        )
    ),
    "this slice's sums for the next one": in_kernel(
        (replaced, "ahead, next_held, scale", "ahead, held, scale")
    ),
    "this row's temperature for the next one's": in_kernel(
        (replaced, "_scale_of(args, ahead.row, P)", "_scale_of(args, number, P)"), temperature=None
    ),
    "a first slice that is not published": in_kernel((replaced, FIRST_SUMS, "")),
    "a slice left out": in_slices(
        (
            replaced,
            "row = turn.row + tl.num_programs(0) // P.splits",
            "row = turn.row + 1 + tl.num_programs(0) // P.splits",
        )
    ),
    "a slice that two take": in_slices(
        (replaced, "part = turn.part + tl.num_programs(0) % P.splits", "part = turn.part")
    ),
    "pieces of a small row for the next one": in_meeting(
        (replaced, "args.pieces + where.row * P.splits", "args.pieces + where.row // 2 * P.splits")
    ),
    "a small row's arrival before its store": in_meeting(
        (moved, "before = arrive(args.counters + where.row)", "tl.store(ptr + where.part, value)")
    ),
    "a counter for all small rows": in_meeting(
        (replaced, "args.counters + where.row", "args.counters")
    ),
    "a small row summed by the last but one": in_meeting(
        (replaced, "before == P.splits - 1", "before == P.splits - 2")
    ),
    "a row that is small to some": in_kernel(
        (replaced, "if agreed(_is_small(", "if turn.part != 1 and agreed(_is_small(")
    ),
    "a small row's first sum after its second": in_kernel(
        (replaced, WRITE_STATISTICS, ""),
        (replaced, AFTER_GRADIENT, WRITE_STATISTICS + AFTER_GRADIENT),
    ),
    "a small row read after its gradient": in_kernel(
        (replaced, WRITE_SMALL, ""),
        (replaced, AFTER_GRADIENT, WRITE_SMALL + AFTER_GRADIENT),
        inplace=True,
    ),
    "a row that some decline": in_kernel(
        (replaced, "is_ordinary(sums,", f"is_ordinary(named({SUMS_OF_SLICE}, P),")
    ),
    "a row that some decline later": in_kernel(
        (replaced, "met = meet(args", "first = numbers\n                met = meet(args"),
        (replaced, "value - value == 0.0", "first[0] - first[0] == 0.0"),
        divergence=JSD,
        dtype=torch.bfloat16,
    ),
    "a row declined by nobody": in_kernel(
        (
            replaced,
            "if is_lead:\n            tl.store(args.declined",
            "if is_lead and not is_written:\n            tl.store(args.declined",
        ),
        inplace=True,
    ),
    "a row that is masked to some": in_slices(
        (replaced, "while counts == 0:", "while (counts == 0) & (turn.part != 1):")
    ),
    "no lead": in_slices(
        (replaced, "turn.part == P.splits - 1", "turn.part == P.splits"), inplace=True
    ),
    "a token of another's slice": in_kernel(
        (replaced, "_is_owner(where, token, is_lead, P)", "is_lead"), inplace=True
    ),
    "a token read after the gradient": in_kernel(
        (
            replaced,
            "_write_log_probs(args, number, z_token,",
            "_write_log_probs(args, number, _logit(where.student, token, token >= 0),",
        ),
        inplace=True,
    ),
}


def goes_wrong(fault: Fault, seed: int, vocabulary: int, interleaved) -> bool:
    from interpreter import Deadlock

    case = of_all_kinds(vocabulary, seed, fault.dtype)
    try:
        # Without a fault, an order has up to 1,500 turns.
        with interleaved(seed, limit=3_000, loads=False):
            check(case, fault.divergence, fault.inplace, fault.temperature)
    except (AssertionError, Deadlock):
        return True
    except InterpreterError as error:
        if "did not arrive" not in str(error):
            raise
        return True
    return False


def install(faulty: ModuleType, original: ModuleType, monkeypatch) -> None:
    """Replaces the kernels of one module by those of another, wherever the package calls them."""
    modules = [m for name, m in sys.modules.items() if name.startswith(triton_backend.__name__)]
    for name, kernel in vars(original).items():
        if isinstance(kernel, type(resident.resident_kernel)):
            for module in modules:
                if vars(module).get(name) is kernel:
                    monkeypatch.setattr(module, name, getattr(faulty, name))


def with_layouts(faults: dict[str, Fault]) -> pytest.MarkDecorator:
    pairs = [(fault, fault.layout) for fault in faults.values()]
    return pytest.mark.parametrize(("fault", "layout"), pairs, indirect=["layout"], ids=faults)


@with_layouts(FAULTS)
def test_a_fault_is_found(fault, layout, interleaved, tmp_path, monkeypatch):
    source = faults.source_of(fault.module)
    for change, *what in fault.changes:
        source = change(source, *what)
    install(faults.module_of(source, tmp_path), fault.module, monkeypatch)
    assert any(goes_wrong(fault, seed, layout, interleaved) for seed in range(8))


@with_layouts({str(fault[2:]): fault for fault in FAULTS.values()})
def test_no_fault_is_found_where_none_is(fault, layout, orders, interleaved):
    wrong = [goes_wrong(fault, seed, layout, interleaved) for seed in range(orders)]
    assert wrong == [False] * orders


# -- the meeting alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_all_meet(seed, programs, interleaved):
    with interleaved(seed):
        wrong = measured.run(splits=3, programs=programs, rounds=6, device="cpu")
    assert wrong.tolist() == [0] * programs


def test_reads_that_come_too_early_are_counted(interleaved, tmp_path, monkeypatch):
    source = replaced(faults.source_of(meetings), LATE, "late += 0 * tl.max(")
    monkeypatch.setattr(measured, "meet", faults.module_of(source, tmp_path).meet)
    early = 0
    for seed in range(8):
        with interleaved(seed):
            early += int(measured.run(splits=3, programs=4, rounds=6, device="cpu").sum())
    assert early
