"""The forms of the row kernels, which all have the right results."""

import pytest
import torch

import cases
from cases import DIVERGENCES, divergence_id
from hybrid_kernels import hybrid_loss
from hybrid_kernels.divergences import FAMILIES
from tolerance import assert_matches_reference

pytest.importorskip("triton", reason="needs Triton")

from hybrid_kernels.rows import Rows
from hybrid_kernels.triton_backend import launch as launchers
from hybrid_kernels.triton_backend import plan

# Settings of `triton_backend/plan.py`, without the prefix "INTERPRETED_".
FORMS = {
    "one program": {},
    "tiles": {"BLOCK_V": 32, "WARPS": 2},
    # The rest of rows of 201 or 203 entries is in their edges.
    "two programs": {"SLICE": 96, "BLOCK_V": 64, "PROGRAMS": 3, "LAG": False},
    "three programs": {"SLICE": 72, "BLOCK_V": 16, "PROGRAMS": 4},
    # A meeting has lanes for more programs than there are.
    "many programs": {"SLICE": 24, "BLOCK_V": 16},
}
swept = pytest.mark.parametrize("form", ["sweeping"], indirect=True)
RESIDENT = [d for d in DIVERGENCES if FAMILIES[d.name].resident]
OTHERS = [d for d in DIVERGENCES if d not in RESIDENT]


@pytest.fixture(params=["one program", "tiles", "two programs", "three programs", "sweeping"])
def form(request, side_by_side, monkeypatch):
    """Forces a form; asserts that it ran and, where it cuts rows, that programs had to meet."""
    launched, resident = [], plan.resident

    def cut(*args, **options):
        shape = resident(*args, **options)
        assert shape.splits > 1, f"a single program with {shape.slice_v} entries"
        return shape

    if request.param == "sweeping":
        monkeypatch.setattr(plan, "resident", lambda *args, **options: None)
        monkeypatch.setattr(plan, "INTERPRETED_BLOCK_V", 64)
        spy(monkeypatch, "sweep_launch", launched)
    else:
        for name, value in FORMS[request.param].items():
            monkeypatch.setattr(plan, f"INTERPRETED_{name}", value)
        if "SLICE" in FORMS[request.param]:
            monkeypatch.setattr(plan, "resident", cut)
        spy(monkeypatch, "resident_launch", launched)
    yield request.param
    assert launched, f"the {request.param} form did not run"


def spy(monkeypatch, name, calls):
    original = getattr(launchers, name)

    def wrapped(*args, **options):
        calls.append(name)
        return original(*args, **options)

    monkeypatch.setattr(launchers, name, wrapped)


@pytest.mark.parametrize("divergence", RESIDENT, ids=divergence_id)
@pytest.mark.parametrize("style", ["close", "forbidden_by_student"])
def test_every_form_is_right(form, style, divergence, backend):
    case = cases.make(201, (1, 4), style=style, masked=True)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@swept
@pytest.mark.parametrize("divergence", OTHERS, ids=divergence_id)
@pytest.mark.parametrize("style", ["close", "forbidden_by_student"])
def test_tiles_are_right(form, style, divergence, backend):
    case = cases.make(201, (1, 4), style=style, masked=True)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@pytest.mark.full
@pytest.mark.parametrize("form", ["many programs"], indirect=True)
@pytest.mark.parametrize("divergence", RESIDENT, ids=divergence_id)
def test_many_programs_share_a_row(form, divergence, backend):
    case = cases.make(201, (1, 4), style="forbidden_by_student", masked=True)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("style", cases.STYLES)
def test_every_form_takes_every_style(form, style, divergence, backend):
    case = cases.make(201, (1, 3), style=style)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


# With different layouts of the two sides, rows of 203 and 7 entries begin at different alignments.
# Those can't be cut alike, and are swept.
UNLIKE = [(v, layout) for v in (7, 203) for layout in ("sliced", "expanded")] + [(144, "sliced")]
EVERY = [(v, layout) for v in (7, 144, 203) for layout in cases.LAYOUTS]


def in_layout(vocabulary, layout):
    # The gradients of an expanded row are added up, which in bf16 has too many roundings.
    dtype = torch.float32 if layout == "expanded" else torch.bfloat16
    return cases.make(vocabulary, (2, 2), layout=layout, dtype=dtype)


@pytest.mark.parametrize(
    ("vocabulary", "layout"), [pair for pair in EVERY if pair not in UNLIKE and pair[0] > 7]
)
def test_every_form_takes_every_layout(form, vocabulary, layout, backend):
    assert_matches_reference(in_layout(vocabulary, layout), backend, entropy_weight=0.3)


@pytest.mark.parametrize("form", ["one program", "tiles"], indirect=True)
@pytest.mark.parametrize(("vocabulary", "layout"), [pair for pair in EVERY if pair not in UNLIKE])
def test_a_single_program_takes_every_layout(form, vocabulary, layout, backend):
    assert_matches_reference(in_layout(vocabulary, layout), backend, entropy_weight=0.3)


@pytest.mark.parametrize(("vocabulary", "layout"), EVERY)
def test_tiles_of_every_layout_are_right(vocabulary, layout, backend, monkeypatch):
    launched = []
    monkeypatch.setattr(plan, "INTERPRETED_BLOCK_V", 64)
    spy(monkeypatch, "resident_launch", launched)
    if (vocabulary, layout) not in UNLIKE:
        monkeypatch.setattr(plan, "resident", lambda *args, **options: None)
    assert_matches_reference(in_layout(vocabulary, layout), backend, entropy_weight=0.3)
    assert not launched


@pytest.mark.parametrize("options", [{"teacher_floor": -4.0}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_every_form_takes_every_option(form, options, divergence, backend):
    case = cases.make(201, (1, 4), style="forbidden_by_student", masked=True)
    assert_matches_reference(case, backend, divergence=divergence, temperature=0.7, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["jeffreys", "jsd"])
def test_every_form_takes_mixed_formats(form, divergence, dtype, backend):
    """Lanes outside of the row have the same value on both sides, despite the formats' ranges."""
    case = cases.make(203, (1, 3), dtype=dtype, teacher_dtype=torch.float16)
    # In fp16 the gradient of a scalar loss is computed in the backward, which has no forms.
    assert_matches_reference(case, backend, divergence=divergence, reduction="none")


@swept
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "mask"])
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("vocabulary", [201, 264])
def test_tiles_of_a_support_are_right(form, vocabulary, members, tail, backend):
    case = cases.make(vocabulary, (1, 4), style="forbidden_by_student", masked=True)
    case = cases.with_teachers(case, members, "union")
    assert_matches_reference(case, backend, entropy_weight=0.3, tail=tail)


@swept
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "renyi"])
@pytest.mark.parametrize("style", ["close", "forbidden_by_student"])
def test_tiles_of_several_teachers_are_right(form, style, divergence, backend):
    case = cases.with_teachers(cases.make(201, (1, 4), style=style, masked=True), 3, None)
    assert_matches_reference(case, backend, divergence=divergence, entropy_weight=0.3)


def test_every_form_without_a_teacher(form, backend):
    case = cases.make(201, (2, 3), masked=True)
    case.teacher = None
    assert_matches_reference(case, backend, dense_weight=0.0, entropy_weight=0.1)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_one_infinity_stays_in_its_row(form, divergence, backend):
    """Only the slice with an infinity takes the guarded path; a weight of 0 cancels it."""
    student, teacher = torch.randn(2, 4, 208, generator=torch.Generator().manual_seed(0))
    student[1, 150], student[2, 20] = -torch.inf, torch.nan
    teacher[1, 17] = -torch.inf
    ids = torch.zeros(4, dtype=torch.long)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    options = {"divergence": divergence, "dense_weight": weights, "reduction": "none"}
    leaf = student.clone().requires_grad_()
    loss = hybrid_loss(leaf, teacher, ids, torch.ones(4), backend=backend, **options).loss
    loss.sum().backward()
    assert loss[[0, 1, 3]].isfinite().all()
    assert leaf.grad[[0, 1, 3]].isfinite().all()
    assert loss[2].isnan()
    assert leaf.grad[2].isnan().all()
    assert leaf.grad[1, 150] == 0


def test_nothing_is_left_unwritten(form, backend, poisoned_memory):
    case = cases.make(203, (3, 3), masked=True)
    outcome = case.hybrid_loss(backend=backend, entropy_weight=0.1)
    assert outcome.gradient.isfinite().all()
    assert all(t.isfinite().all() for t in outcome.result if t is not None)


@pytest.mark.parametrize("rows", [1, 5, 131, 100_000])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vocabulary", [1, 8, 1000, 32000, 50257, 151936, 262144, 10**6])
def test_slices_cover_a_row_and_the_grid_fits(vocabulary, itemsize, rows, monkeypatch):
    monkeypatch.setattr(plan, "INTERPRETED", False)
    for tuning in plan.CANDIDATES:
        launch = plan.resident(vocabulary, itemsize, rows, plan.Device("H200", 132), tuning)
        if launch is None:
            assert vocabulary > 132 * 4096
            continue
        assert launch.slice_v % 8 == 0
        assert (launch.splits - 1) * launch.slice_v < vocabulary <= launch.splits * launch.slice_v
        assert launch.slice_v <= launch.room(itemsize)
        threads = launch.num_warps * 32
        on_each = -(-launch.programs // 132)
        # A multiprocessor has registers, threads and slots for all of its programs at once.
        assert on_each * threads * launch.registers <= 65536
        assert on_each * threads <= 2048
        assert on_each <= 32
        assert launch.splits <= launch.programs <= rows * launch.splits


def test_a_row_too_long_for_the_device_is_swept(monkeypatch):
    monkeypatch.setattr(plan, "INTERPRETED", False)
    monkeypatch.setattr(plan.Device, "of", lambda tensor: plan.Device("small", 4))
    logits = torch.empty(1, 2, 151936, device="meta")
    rows = Rows(logits, (logits,), (1.0,))
    assert isinstance(launchers.form(rows, logits, hip=False), plan.Sweep)
    short = Rows(logits[..., :4096], (), ())
    assert isinstance(launchers.form(short, short.student, hip=False), plan.Resident)
    assert isinstance(launchers.form(short, short.student, hip=True), plan.Sweep)


def test_a_gradient_wider_than_the_logits_is_swept(monkeypatch):
    monkeypatch.setattr(plan, "INTERPRETED", False)
    monkeypatch.setattr(plan.Device, "of", lambda tensor: plan.Device("H200", 132))
    logits = torch.empty(1, 64, 4096, dtype=torch.bfloat16, device="meta")
    rows = Rows(logits, (logits,), (1.0,))
    assert isinstance(launchers.form(rows, logits, hip=False), plan.Resident)
    assert isinstance(launchers.form(rows, logits.float(), hip=False), plan.Sweep)
    assert isinstance(launchers.form(rows._replace(teachers=(logits.float(),)), logits), plan.Sweep)


@pytest.mark.parametrize(
    ("shape", "split"),
    [((8, 128256), False), ((8, 50257), True), ((8, 4, 32001), True), ((8, 1), True)],
)
def test_rows_are_split_only_where_necessary(shape, split):
    logits = torch.empty(shape, dtype=torch.bfloat16).view(1, -1, shape[-1])
    assert launchers.has_edges([logits, logits.clone()]) == split
    padded = torch.empty(8, 50264, dtype=torch.bfloat16)[None, :, :50257]
    # Rows that begin at different places can't be split alike.
    if shape[-1] == 50257:
        assert not launchers.has_edges([logits, padded])
        assert launchers.has_edges([padded, padded])


def test_the_tuning_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_KERNELS_TUNING", str(tmp_path / "tuning.json"))
    plan.tuned.cache_clear()
    assert plan.tuned("H200", 2) is None
    best = plan.CANDIDATES[3]
    path = plan.write_tuning("H200", 2, best)
    plan.write_tuning("B200", 4, plan.CANDIDATES[0])
    assert plan.tuned("H200", 2) == best
    assert plan.tuned("H200", 4) is None
    monkeypatch.setattr(plan, "INTERPRETED", False)
    launch = plan.resident(151936, 2, 8192, plan.Device("H200", 132))
    assert launch == plan.resident(151936, 2, 8192, plan.Device("H200", 132), best)
    for content in ("{", '{"H200": {"2": {"num_warps": 4}}}', "[]"):
        path.write_text(content)
        plan.tuned.cache_clear()
        with pytest.raises(ValueError, match=r"tuning file .*tuning.json.*tune"):
            plan.tuned("H200", 2)
    plan.tuned.cache_clear()
