"""Programs that share a row, side by side in many orders: the kernel that ships, with every slot,
counter and register used again; and the kernel that measures the meeting.

`--orders=N` runs N orders of each problem in place of one, or with `--all` two.
"""

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

from bench.gpu import meeting
from hybrid_kernels import Divergence, cpu, triton_backend
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import FIELDS, SMALL_DIVERGENCE, STUDENT_FIELDS, Coefficients, Rows
from hybrid_kernels.triton_backend import launch as launchers
from hybrid_kernels.triton_backend import meeting as meetings
from hybrid_kernels.triton_backend import plan, resident, slices

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = 12
# V, and settings of `triton_backend/plan.py`: three programs a row. Rows of 101 have edges.
LAYOUTS = {
    "no lag": (96, {"GROUPS": 1, "LAG": False}),
    "lag": (96, {"GROUPS": 1, "LAG": True}),
    "edges, no lag": (101, {"GROUPS": 2, "LAG": False}),
    "edges, lag": (101, {"GROUPS": 2, "LAG": True}),
    # (What is left over by full slices is among the edges.)
    "two warps": (131, {"GROUPS": 2, "LAG": True, "WARPS": 2, "SLICE": 32}),
}
REVERSE_KL, JSD = Divergence("reverse_kl"), Divergence("jsd")  # which meet once and twice
RESIDENT = [d for d in DIVERGENCES if FAMILIES[d.name].resident]
OTHERS = [d for d in RESIDENT if d.name not in ("reverse_kl", "jsd")]

# What the rows of a group are, one group after another: "m" masked, "s" of a small divergence,
# "z" and "w" with -inf among the student's or the teacher's logits, "n" with a NaN, "." none of it.
KINDS = "mssmms" + "sz.wnm"


@pytest.fixture(params=["edges, lag"])
def layout(request, monkeypatch):
    """Cuts rows so; V."""
    vocabulary, settings = LAYOUTS[request.param]
    for name, value in {"SLICE": 40, "BLOCK_V": 64, **settings}.items():
        monkeypatch.setattr(plan, f"INTERPRETED_{name}", value)
    return vocabulary


def of_kinds(kinds: str, vocabulary: int, seed: int, dtype=torch.float32) -> Case:
    """Rows that take different ways through the kernel."""
    case = cases.make(vocabulary, (ROWS,), seed=seed, dtype=dtype)
    student, teacher = case.student, case.teacher
    case.mask = mask = torch.ones(ROWS, dtype=torch.bool)
    by_group = torch.arange(ROWS).view(-1, plan.INTERPRETED_GROUPS).T.flatten().tolist()
    for kind, row in zip(kinds, by_group, strict=True):
        if kind == "m":
            mask[row] = False
            student[row, ::3] = torch.nan
        elif kind == "s":
            # Alike but for a part: less than 1e-3 nats, where sums of large terms leave few digits.
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
    """As above of `KINDS`, in that order or, by other seeds than 0, in any."""
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
    """Whatever the kernel leaves is what the torch backend does, to the last row and field.

    A temperature of None: each row has its own.
    """
    rows = cases.rows_of(case, "torch", divergence=divergence, temperature=temperature or 1.0)
    rows = rows._replace(teacher_floor=floor)
    if temperature is None:
        rows = rows._replace(row_temperature=0.5 + 0.25 * (torch.arange(ROWS) % 5))
    got, gradient = outcome(launchers, rows, inplace)
    wanted, truth = outcome(cpu, rows, inplace)
    known = None if rows.teachers else STUDENT_FIELDS
    torch.testing.assert_close(got[:known], wanted[:known], rtol=1e-4, atol=1e-5, equal_nan=True)
    if rows.teachers and rows.one_sweep:
        # Summed anew they have 2e-7 of relative error, else 1e-5 to 5e-4.
        mine, theirs = (statistics[FIELDS.divergence] for statistics in (got, wanted))
        small = theirs < SMALL_DIVERGENCE / 10
        torch.testing.assert_close(mine[small], theirs[small], rtol=1e-5, atol=0)
    assert torch.equal(gradient.isfinite(), truth.isfinite())
    sound = truth.isfinite().all(-1)
    truth = truth[sound].double()
    assert_close(gradient[sound], truth, truth, "gradient", scale=0.05, roundings=4)


def outcome(backend: ModuleType, rows: Rows, inplace: bool) -> tuple[Tensor, Tensor]:
    """Statistics and gradient."""
    weights = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(ROWS))
    weights[:, ~rows.valid] = torch.nan
    coefficients = Coefficients(weights[0] if rows.teachers else None, *weights[1:])
    rows = rows._replace(student=rows.student.clone())
    gradient = rows.student if inplace else torch.full_like(rows.student, torch.nan)
    if backend is launchers:
        form = launchers.form(rows, gradient)
        assert isinstance(form, plan.Resident)
        assert (form.splits, form.groups) == (3, plan.INTERPRETED_GROUPS)
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
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, JSD)


@pytest.mark.parametrize("divergence", OTHERS, ids=divergence_id)
def test_every_divergence_in_any_order(divergence, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "floor": -6.0}, {"temperature": None, "inplace": True}],
    ids=str,
)
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
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


@pytest.mark.parametrize("kinds", ["mmmmmm" + "mmmmmm", "mmmmmm" + "s.s..n", "mmmmms" + "mzmmm."])
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
def test_few_rows_in_any_order(divergence, kinds, layout, orders, interleaved):
    """All masked, or all of a group, or all but the last and one more."""
    for seed in range(orders):
        case = of_kinds(kinds, layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence, inplace=True)


def test_a_program_alone_does_not_wait_for_ever(layout, interleaved, monkeypatch):
    """Not side by side (for which `interleaved` has to be entered): siblings never come."""
    monkeypatch.setattr(meetings, "MAX_POLLS", 50)
    with pytest.raises(InterpreterError, match="did not arrive"):
        check(of_all_kinds(layout, 0))


# -- whether these orders can tell right from wrong ------------------------------------------------


class Fault(NamedTuple):
    """What is done to the source of a module, one change after another, and where that shows."""

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


def slots(number: int) -> tuple:
    return replaced, "\nSLOTS = 4", f"\nSLOTS = {number}"


# The number of a meeting as it is published and as it is waited for, and the wait.
WORD, NUMBER, LATE = "(meeting + 1).to(tl.int64)", "!= meeting + 1)", "late += tl.max("
WRITE_STATISTICS = """            if is_lead:
                _write_statistics(args, number, value, slopes, sums, row, constants, P)
"""
WRITE_SMALL = """            if P.small and P.one_sweep:
                if agreed(_is_small(sums, constants, P)):
                    _write_small(
                        args, group, where, meeting, held, sums, row, constants, is_lead, P, D
                    )
"""
AFTER_GRADIENT = "            if is_owner:\n"
SUMS_OF_SLICE = "sums_of_slice(held, constants.scale, is_lead, STUDENT, TEACHER, P)"

FAULTS = {
    "a slot less": in_meeting(slots(3)),
    "a slot, no lag": in_meeting(slots(1), layout="no lag"),
    "a slot, two meetings": in_meeting(slots(1), divergence=JSD),
    "slots for all groups": in_meeting(
        (replaced, "args.published + number * ", "args.published + 0 * "), layout="edges, lag"
    ),
    "no wait": in_meeting((replaced, LATE, "late += 0 * tl.max(")),
    "no wait for all numbers": in_meeting((replaced, LATE, "late = tl.max(")),
    "no wait for all programs": in_meeting((replaced, LATE, "late += tl.min(")),
    "a meeting that nobody publishes for": in_meeting((replaced, WORD, "meeting.to(tl.int64)")),
    "meetings from 0": in_meeting(
        (replaced, WORD, "meeting.to(tl.int64)"), (replaced, NUMBER, "!= meeting)")
    ),
    "meetings up to 4": in_meeting(
        (replaced, WORD, "(meeting % 4 + 1).to(tl.int64)"),
        (replaced, NUMBER, "!= meeting % 4 + 1)"),
    ),
    "two meetings in one": in_kernel((replaced, "\n            meeting += 1", ""), divergence=JSD),
    "the next row's meeting in this one's": in_kernel(
        (replaced, "publish(group, meeting + 1, ", "publish(group, meeting, ")
    ),
    "this row's sums for the next one's": in_kernel(
        (replaced, "sums_of_slice(next_held,", "sums_of_slice(held,")
    ),
    "this row's temperature for the next one's": in_kernel(
        (replaced, "_scale_of(args, ahead, P)", "_scale_of(args, number, P)"), temperature=None
    ),
    "a slot less for small rows": in_meeting((replaced, "\nSMALL_SLOTS = 2", "\nSMALL_SLOTS = 1")),
    "slots for small rows by row": in_meeting(
        (replaced, "meeting % _SMALL_SLOTS", "row % _SMALL_SLOTS"), layout="edges, lag"
    ),
    "slots for small rows of all groups": in_meeting(
        (replaced, "args.pieces + number * ", "args.pieces + 0 * "), layout="edges, lag"
    ),
    "a small row's arrival before its store": in_meeting(
        (moved, "before = arrive(group.arrived + row)", "tl.store(ptr + group.part, value)")
    ),
    "a counter for all small rows": in_meeting((replaced, "group.arrived + row", "group.arrived")),
    "a small row summed by the last but one": in_meeting(
        (replaced, "before == P.splits - 1", "before == P.splits - 2")
    ),
    "a row that is small to some": in_kernel(
        (replaced, "if agreed(_is_small(", "if group.part != 1 and agreed(_is_small(")
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
        (replaced, "met = meet(group", "own = numbers\n                met = meet(group"),
        (replaced, "value - value == 0.0", "own[0] - own[0] == 0.0"),
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
        (replaced, "while counts == 0:", "while (counts == 0) & (group.part != 1):")
    ),
    "no lead": in_slices(
        (replaced, "group.part == P.splits - 1", "group.part == P.splits"), inplace=True
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
        # (Where nothing is wrong, an order has up to 1,500 turns.)
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
    """Puts the kernels of a module in the place of another's, wherever the package calls them."""
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
    found = [goes_wrong(fault, seed, layout, interleaved) for seed in range(orders)]
    assert found == [False] * orders


# -- the meeting alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_all_meet(seed, interleaved):
    with interleaved(seed):
        wrong = meeting.meet(splits=3, groups=2, rounds=6, device="cpu")
    assert wrong.tolist() == [0] * 6


def test_a_program_that_does_not_come_is_no_hang(interleaved, monkeypatch):
    """One in three stays away; the others wait for a while, once."""
    monkeypatch.setattr(meeting, "BOUND", 20)
    arrive = meeting.meeting_kernel
    monkeypatch.setattr(meeting, "meeting_kernel", {(3,): lambda *a, **o: arrive[(2,)](*a, **o)})
    with interleaved(0):
        wrong = meeting.meet(splits=3, groups=1, rounds=6, device="cpu")
    assert (wrong[:2] > 0).all()


def test_a_slot_used_too_early_is_seen(interleaved, monkeypatch):
    """With one slot in place of two, a fast program overwrites what a slow one has yet to read."""
    monkeypatch.setattr(meeting, "SLOTS", 1)
    found = 0
    for seed in range(8):
        with interleaved(seed):
            found += int(meeting.meet(splits=3, groups=1, rounds=6, device="cpu").sum())
    assert found
