"""Programs that share a row, side by side in many orders: the kernel that ships, with every slot,
counter and register used again; and the kernel that measures the meeting.

`--orders=N` runs N orders of each problem in place of one, or with `--all` two.
"""

import pytest
import torch

import cases
import faults
from cases import DIVERGENCES, Case, divergence_id
from faults import moved, replaced
from tolerance import assert_close, assert_matches_reference

pytest.importorskip("triton", reason="needs Triton's interpreter")

from triton.runtime.errors import InterpreterError

from bench.gpu import meeting
from hybrid_kernels import Divergence
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.triton_backend import launch as launchers
from hybrid_kernels.triton_backend import meeting as meetings
from hybrid_kernels.triton_backend import plan, resident

ROWS = 12
# V, and settings of `triton_backend/plan.py`: three programs a row. Rows of 101 have edges.
LAYOUTS = {
    "one group": (96, {"GROUPS": 1, "PREFETCH": False}),
    "prefetch": (96, {"GROUPS": 1, "PREFETCH": True}),
    "edges": (101, {"GROUPS": 2, "PREFETCH": False}),
    "edges, prefetch": (101, {"GROUPS": 2, "PREFETCH": True}),
}
REVERSE_KL, JSD = Divergence("reverse_kl"), Divergence("jsd")  # which meet once and twice
OTHERS = [d for d in DIVERGENCES if d.name not in ("reverse_kl", "jsd")]


@pytest.fixture(params=["edges, prefetch"])
def layout(request, monkeypatch):
    """Cuts rows so; V."""
    vocabulary, settings = LAYOUTS[request.param]
    for name, value in {"SLICE": 40, "BLOCK_V": 64, **settings}.items():
        monkeypatch.setattr(plan, f"INTERPRETED_{name}", value)
    launch = plan.resident(vocabulary, 4, ROWS, plan.Device("interpreter", 1))
    assert launch.splits == 3
    assert launch.groups == settings["GROUPS"]
    return vocabulary


every_layout = pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
one_group = pytest.mark.parametrize("layout", ["one group"], indirect=True)


def of_all_kinds(vocabulary: int, seed: int, dtype=torch.float32) -> Case:
    """Rows that take different ways through the kernel, in random order: one is masked, one small,
    one has an infinity on one side, one on the other, one a NaN."""
    case = cases.make(vocabulary, (ROWS,), seed=seed, dtype=dtype)
    row = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
    case.mask = torch.ones(ROWS, dtype=torch.bool)
    case.mask[row[:2]] = False
    case.student[row[0]] = torch.nan
    small = row[2:6]
    # Alike but for a part: less than 1e-3 nats, where sums of large terms leave few digits.
    case.teacher[small] = case.student[small]
    case.teacher[small, : vocabulary // 2] *= 1 + 2.0**-7
    case.student[row[6], vocabulary // 2] = -torch.inf
    case.teacher[row[7], vocabulary // 3] = -torch.inf
    case.student[row[8], vocabulary - 1] = torch.nan
    return case


def check(case: Case, **options) -> None:
    """Whatever the kernel leaves is what the torch backend does, to the last row and field."""
    got = case.hybrid_loss(backend="triton", reduction="none", entropy_weight=0.3, **options)
    wanted = case.hybrid_loss(backend="torch", reduction="none", entropy_weight=0.3, **options)
    for name, value in wanted.result._asdict().items():
        if value is not None:
            mine = getattr(got.result, name)
            torch.testing.assert_close(mine, value, rtol=1e-4, atol=1e-5, equal_nan=True)
    if FAMILIES[options.get("divergence", REVERSE_KL).name].one_sweep:
        # Summed anew they have 2e-7 of relative error, else 1e-5 to 5e-4.
        small = wanted.result.divergence < 1e-3
        mine, theirs = (found.result.divergence[small] for found in (got, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert torch.equal(got.gradient.isfinite(), wanted.gradient.isfinite())
    sound = wanted.gradient.isfinite().all(-1)
    truth = wanted.gradient[sound].double()
    assert_close(got.gradient[sound], truth, truth, "gradient", scale=0.05, roundings=4)


@every_layout
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
def test_right_in_any_order(divergence, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence=divergence)


@pytest.mark.parametrize("divergence", OTHERS, ids=divergence_id)
def test_every_divergence_in_any_order(divergence, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence=divergence)


@pytest.mark.parametrize(
    "options",
    [{"teacher_floor": -6.0}, {"inplace": True}, {"inplace": True, "temperature": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
def test_options_in_any_order(divergence, options, layout, orders, interleaved):
    for seed in range(orders):
        case = of_all_kinds(layout, seed, torch.bfloat16)
        with interleaved(seed, loads=seed % 2 == 0):
            check(case, divergence=divergence, **options)


@pytest.mark.parametrize("teachers", ["two", "support", "none"])
def test_other_teachers_in_any_order(teachers, layout, orders, interleaved):
    for seed in range(orders):
        case, options = cases.make(layout, (ROWS,), masked=True, seed=seed), {}
        if teachers == "none":
            case.teacher, options = None, {"dense_weight": 0.0}
        else:
            case = cases.with_teachers(case, 2, "union" if teachers == "support" else None)
        with interleaved(seed, loads=seed % 2 == 0):
            assert_matches_reference(case, "triton", entropy_weight=0.3, **options)


@one_group
def test_a_program_alone_does_not_wait_for_ever(layout, interleaved):
    """Not side by side (for which `interleaved` has to be entered): siblings never come."""
    with pytest.raises(InterpreterError, match="did not arrive"):
        check(of_all_kinds(layout, 0))


# -- whether these orders can tell right from wrong ------------------------------------------------

# A divergence that shows it, and what is done to the source of which module.
WAIT = "wait(group.counter, (meetings + 1) * P.splits)"
ARRIVE_SMALL = "before = arrive(group.small + row)"
FAULTS = {
    "a slot less": (REVERSE_KL, meetings, replaced, "constexpr(2)", "constexpr(1)"),
    "a slot less, two meetings": (JSD, meetings, replaced, "constexpr(2)", "constexpr(1)"),
    "no slot for small rows": (
        REVERSE_KL,
        meetings,
        replaced,
        "_SMALL_SLOT = _IN_TURN",
        "_SMALL_SLOT = tl.constexpr(0)",
    ),
    "a wait skipped": (REVERSE_KL, meetings, replaced, f"{WAIT}\n    merged", "merged"),
    "the second wait skipped": (JSD, meetings, replaced, f"{WAIT}\n    row_values", "row_values"),
    "a wait for one less": (
        REVERSE_KL,
        meetings,
        replaced,
        f"{WAIT}\n    merged",
        f"{WAIT[:-1]} - 1)\n    merged",
    ),
    "an arrival before its stores": (
        REVERSE_KL,
        meetings,
        moved,
        "arrive(group.counter)",
        "tl.store(ptr + group.part, member",
    ),
    "the second arrival before its stores": (
        JSD,
        meetings,
        moved,
        "arrive(group.counter)",
        "tl.store(ptr + 2 * i * P.lanes",
    ),
    "a small row's arrival before its store": (
        REVERSE_KL,
        meetings,
        moved,
        ARRIVE_SMALL,
        "tl.store(ptr + group.part, value)",
    ),
    "one counter for meetings and small rows": (
        REVERSE_KL,
        meetings,
        replaced,
        "arrive(group.small + row)",
        "arrive(group.counter)",
    ),
    "a counter of a group for a small row": (
        REVERSE_KL,
        meetings,
        replaced,
        "args.counters + args.groups",
        "args.counters + args.groups - 1",
    ),
    "a small row that nobody arrives for": (
        REVERSE_KL,
        meetings,
        replaced,
        ARRIVE_SMALL,
        "before = 0",
    ),
    "one counter for all small rows": (
        REVERSE_KL,
        meetings,
        replaced,
        "arrive(group.small + row)",
        "arrive(group.small)",
    ),
    "a row that is small to some": (
        REVERSE_KL,
        resident,
        replaced,
        "if agreed(is_small(",
        "if group.part != 1 and agreed(is_small(",
    ),
}


def goes_wrong(divergence, seed, layout, interleaved):
    from interpreter import Deadlock

    try:
        with interleaved(seed, limit=20_000, loads=False):
            check(of_all_kinds(layout, seed), divergence=divergence)
    except (AssertionError, Deadlock):
        return True
    except InterpreterError as error:
        if "did not arrive" not in str(error):
            raise
        return True
    return False


@one_group
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, layout, interleaved, tmp_path, monkeypatch):
    divergence, module, change, *what = FAULTS[fault]
    faulty = faults.module_of(change(faults.source_of(module), *what), tmp_path)
    if module is meetings:
        kernel = faults.module_of(faults.source_of(resident), tmp_path)
        for name in ("group_of", "publish_sums", "meet_sums", "meet_values", "write_small"):
            setattr(kernel, name, getattr(faulty, name))
        faulty = kernel
    monkeypatch.setattr(launchers, "resident_kernel", faulty.resident_kernel)
    assert any(goes_wrong(divergence, seed, layout, interleaved) for seed in range(8))


@one_group
@pytest.mark.parametrize("divergence", [REVERSE_KL, JSD], ids=divergence_id)
def test_no_fault_is_found_where_none_is(divergence, layout, orders, interleaved):
    found = [goes_wrong(divergence, seed, layout, interleaved) for seed in range(orders)]
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
