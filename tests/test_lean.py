"""The prototype kernel of `bench/lean.py`: its programs side by side, in many orders; its machine
code."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton's compiler or interpreter")

import faults
from bench import aot, lean, machine_code
from faults import replaced
from hybrid_kernels.triton_backend import plan
from tolerance import assert_close

# -- in the interpreter ----------------------------------------------------------------------------


class Layout(NamedTuple):
    """A problem, and how it is cut."""

    vocabulary: int
    slice_max: int
    num_warps: int
    rows: int
    programs: int

    def shape(self, **options) -> lean.Shape:
        cut = (self.vocabulary, self.rows, self.programs, self.slice_max, self.num_warps)
        return lean.shape(*cut, programs=1, **options)


# Ways to meet, and how many rows are held.
WAYS = {
    f"{'words' if words else 'counters'}{'-lag' if lag else ''}{'-two' if two else ''}": {
        "words": words,
        "lag": lag,
        "two": two,
    }
    for words in (False, True)
    for lag in (False, True)
    for two in (False, True)
}
# One group, which uses every slot again.
MEETINGS = Layout(96, 32, num_warps=1, rows=7, programs=3)
LAYOUTS = {
    "one-group": MEETINGS,
    "two-groups": Layout(208, 80, num_warps=1, rows=9, programs=6),  # slices of 72, 72 and 64
    "rows-for-all": Layout(64, 16, num_warps=1, rows=3, programs=12),
    "alone": Layout(592, 8000, num_warps=1, rows=3, programs=2),  # three tiles
    "many-warps": Layout(144, 16, num_warps=16, rows=2, programs=9),  # whose sums fill two tiles
    "padding": Layout(80, 48, num_warps=4, rows=5, programs=2),  # most warps have nothing else
}


class Problem(NamedTuple):
    """Logits and gradient are parts of larger tensors, of which the rest is NaN."""

    student: Tensor
    teacher: Tensor
    token_ids: Tensor
    coefficients: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor
    inv_t: float

    def run(self, shape: lean.Shape) -> Tensor:
        return lean.lean(
            self.student,
            self.teacher,
            self.token_ids,
            self.coefficients,
            self.gradient,
            shape,
            self.inv_t,
        )

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Statistics and gradient from the definitions."""
        z = self.student.to(dtype, copy=True).requires_grad_()
        w = self.teacher.to(dtype)
        log_p, log_q = (z * self.inv_t).log_softmax(-1), (w * self.inv_t).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        log_prob = log_p.gather(-1, self.token_ids[:, None])[:, 0]
        terms = zip(self.coefficients, (divergence, log_prob, entropy), strict=True)
        total = sum((c * term).sum() for c, term in terms)
        (gradient,) = torch.autograd.grad(total, z)
        sums = (((x - x.amax(-1, True)) * self.inv_t).exp().sum(-1).log2() for x in (z, w))
        return torch.stack((divergence, entropy, *sums)).detach(), gradient


def problem(layout: Layout, seed: int = 0, *, offset=0.0, spread=2.0, inv_t=1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = layout.rows, layout.vocabulary

    def within(values: Tensor) -> Tensor:
        room = torch.full((rows + 1, vocabulary + 8), math.nan, dtype=torch.bfloat16)
        room[:rows, :vocabulary] = values
        return room[:rows, :vocabulary]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z = spread * normal(rows, vocabulary)
    w = z + spread / 4 * normal(rows, vocabulary)
    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    token_ids[0], token_ids[-1] = 0, vocabulary - 1
    return Problem(
        within(z + offset),
        within(w - offset),
        token_ids,
        (normal(rows), normal(rows), normal(rows)),
        within(torch.full((rows, vocabulary), math.nan)),
        inv_t,
    )


def check(given: Problem, statistics: Tensor, expected=None, eager=None) -> None:
    """As close as fp32 arithmetic and one rounding to bf16 are."""
    expected = expected or given.expected(torch.float64)
    eager = eager or given.expected(torch.float32)
    scale = 1 + math.log(given.gradient.shape[-1])
    assert_close(statistics[:2], expected[0][:2], eager[0][:2], "statistics", scale=scale)
    # The maxima that these sums are about are rounded.
    far = 1.5 * given.inv_t * max(w.double().abs().max().item() for w in given[:2])
    assert (statistics[2:] - expected[0][2:]).abs().max() <= 1e-5 + far * 2.0**-24, "sums"
    # The interpreter truncates to bf16.
    assert_close(given.gradient, expected[1], eager[1], "gradient", scale=0.05, roundings=2)
    rows, vocabulary = given.gradient.shape
    room = given.gradient.as_strided((rows + 1, vocabulary + 8), (vocabulary + 8, 1))
    assert room[rows:].isnan().all(), "wrote past the last row"
    assert room[:, vocabulary:].isnan().all(), "wrote past a row"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_in_any_order(layout, way, interleaved):
    for seed in range(2):
        given = problem(LAYOUTS[layout], seed)
        with interleaved(seed, loads=seed > 0):
            statistics = given.run(LAYOUTS[layout].shape(**WAYS[way]))
        check(given, statistics)


@pytest.mark.parametrize(
    ("offset", "spread", "temperature"),
    [
        (100.0, 2.0, 0.7),
        (100.0, 2.0, 1.3),
        (1e3, 4.0, 0.7),
        (1e3, 4.0, 1.3),
        (1e4, 80.0, 0.7),
        (1e4, 80.0, 40.0),
    ],
)
def test_far_from_zero(offset, spread, temperature, interleaved):
    """What is rounded of large products cancels. (bf16 tells numbers of 1e4 apart by 64, so that
    logits of a row must be far apart, too.)"""
    layout = LAYOUTS["padding"]
    given = problem(layout, 1, offset=offset, spread=spread, inv_t=1 / temperature)
    with interleaved(1, loads=False):
        statistics = given.run(layout.shape(lag=offset == 1e3, words=offset == 1e4))
    check(given, statistics)
    divergence = given.expected(torch.float64)[0][0]
    assert ((statistics[0] - divergence).abs() <= 1e-6 * (1 + divergence)).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_over_the_logits(way, interleaved):
    layout = LAYOUTS["two-groups"]
    given = problem(layout, 2)
    expected, eager = given.expected(torch.float64), given.expected(torch.float32)
    given = given._replace(gradient=given.student)
    with interleaved(2, loads=False):
        statistics = given.run(layout.shape(**WAYS[way]))
    check(given, statistics, expected, eager)


@pytest.mark.parametrize("term", range(3), ids=["divergence", "log-prob", "entropy"])
def test_each_term_alone(term, interleaved):
    given = problem(MEETINGS, 3)
    for other in {0, 1, 2} - {term}:
        given.coefficients[other].zero_()
    with interleaved(3, loads=False):
        statistics = given.run(MEETINGS.shape())
    check(given, statistics)


def orders_that_go_wrong(interleaved, slots, way, monkeypatch, seeds=8):
    """Of each order, whether something else came out, or nothing at all."""
    from interpreter import Deadlock

    monkeypatch.setattr(lean, "SLOTS", slots)
    for seed in range(seeds):
        given = problem(MEETINGS, seed)
        try:
            with interleaved(seed, limit=20_000, loads=False):
                statistics = given.run(MEETINGS.shape(**way))
        except Deadlock:
            yield True
        else:
            expected = given.expected(torch.float64)[0][0]
            yield not (statistics[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("words", [False, True], ids=["counters", "words"])
@pytest.mark.parametrize(("slots", "lag"), [(1, False), (3, True)], ids=["", "lag"])
def test_a_slot_less_is_found_out(slots, lag, words, interleaved, monkeypatch):
    """The orders above can tell right from wrong."""
    way = {"lag": lag, "words": words}
    assert any(orders_that_go_wrong(interleaved, slots, way, monkeypatch))


@pytest.mark.full
def test_one_counter_for_all_slots_is_found_out(interleaved, tmp_path, monkeypatch):
    """Under lag a fast program's next arrival passes for a slow one's."""
    source = faults.source_of(lean)
    source = replaced(source, "SLOT, counter_ptr + slot, part", "SLOT, counter_ptr, part")
    source = replaced(
        source, "wait(counter_ptr + slot, (meeting // SLOTS", "wait(counter_ptr, (meeting"
    )
    monkeypatch.setattr(lean, "lean_kernel", faults.module_of(source, tmp_path).lean_kernel)
    assert not any(orders_that_go_wrong(interleaved, 4, {}, monkeypatch, 4))
    assert any(orders_that_go_wrong(interleaved, 4, {"lag": True}, monkeypatch))


@pytest.mark.full
@pytest.mark.parametrize("words", [False, True], ids=["counters", "words"])
def test_two_slots_are_enough_without_lag(words, interleaved, monkeypatch):
    assert not any(orders_that_go_wrong(interleaved, 2, {"words": words}, monkeypatch, 4))


@pytest.fixture
def a_program_too_few(monkeypatch):
    programs = MEETINGS.shape().splits
    kernel = lean.lean_kernel
    monkeypatch.setattr(lean, "lean_kernel", {(programs,): kernel[(programs - 1,)]})


def test_a_deadlock_is_told(interleaved, a_program_too_few):
    from interpreter import Deadlock

    with pytest.raises(Deadlock, match="2 programs"), interleaved(limit=500):
        problem(MEETINGS).run(MEETINGS.shape())


def test_no_program_waits_for_ever(interleaved, a_program_too_few):
    from triton.runtime.errors import InterpreterError

    with pytest.raises(InterpreterError, match="did not arrive"):
        problem(MEETINGS).run(MEETINGS.shape())


# -- without it ------------------------------------------------------------------------------------


def test_shapes():
    main = lean.shape(151936, 8192, 132)
    assert (main.splits, main.slice_v, main.chunks) == (19, 8000, 8)
    assert (main.lanes, main.groups, main.registers) == (128, 13, 255)
    assert lean.shape(32000, 8192, 132, programs=4).registers == 128
    assert lean.shape(32000, 5, 132).groups == 5
    for vocabulary in range(16, 4096, 16):
        cut = lean.shape(vocabulary, 1, 132, slice_max=200)
        assert cut.slice_v % 8 == 0
        assert (cut.splits - 1) * cut.slice_v < vocabulary <= cut.splits * cut.slice_v
        assert cut.slice_v <= cut.chunks * cut.num_warps * 256
    with pytest.raises(ValueError, match=r"vocabulary: .* multiple of 16"):
        lean.shape(50257, 8192, 132)
    with pytest.raises(ValueError, match=r"vocabulary: .* needs 19 programs"):
        lean.shape(151936, 8192, 9)


@pytest.mark.full
@pytest.mark.skipif(plan.INTERPRETED, reason="compiles ahead of time")
@pytest.mark.parametrize(
    ("options", "instructions"),
    [
        ({}, 32),
        ({"lag": True}, 33),
        ({"vocabulary": 32000}, 32),
        ({"slice_max": 4000}, 43),  # half as many entries for what a row costs
        ({"slice_max": 16384, "num_warps": 8, "programs": 1, "lag": True}, 35),
        ({"slice_max": 12700}, 30),
        ({"slice_max": 8192, "lag": True, "words": True}, 34),
        ({"slice_max": 5100, "programs": 3, "lag": True, "words": True, "two": True}, 40),
    ],
    ids=str,
)
def test_machine_code(options, instructions):
    shape = lean.shape(**{"vocabulary": 151936, "rows": 8192, "multiprocessors": 132, **options})
    kernel = aot.compile_lean(shape)
    assert machine_code.resources(kernel).spilled <= 8  # two numbers of a row
    loop = machine_code.row_loop(machine_code.instructions(kernel))
    names = [i.name for i in loop]
    # The next row's slices, and the gradient and a row's statistics, in 128-bit pieces.
    assert names.count("LDG.E.128") == 2 * shape.chunks
    assert names.count("STG.E.128") == shape.chunks + 1
    # One is the sampled token's, which one program of a row meets; words take another.
    assert sum(name.startswith("BAR.SYNC") for name in names) <= 7 + shape.words
    assert not any(name.startswith("F2F.") for name in names)
    assert len(loop) <= instructions * kernel.entries
    order = machine_code.order(kernel, aot.LEAN_EXPONENTIALS, 0 if shape.words else 1)
    # Nothing needs a later row's slices, or memory, between the wait and the gradient. (With TWO,
    # loads begin with the gradient.)
    assert order.ahead == (0 if shape.two else 2 * shape.chunks)
    assert order.early == (None if shape.two else 0)
    assert order.late == 0
    assert order.faults == (None if shape.words else ())
