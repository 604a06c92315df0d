"""The vocabulary over several ranks: each result, and each rank's gradient, is that of the whole.

Real processes and real collectives (gloo). A group of processes is started once for all cases; each
case is a test of its own, which asks what became of it on all ranks.
"""

import json
import os
import traceback
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed
import torch.multiprocessing

import cases
from cases import DIVERGENCES, Case, Outcome, divergence_id
from conftest import TWINS
from hybrid_kernels import (
    Divergence,
    Mixture,
    TopK,
    hybrid_loss,
    ops,
    reference,
    sharded,
    token_terms,
)
from hybrid_kernels.rows import Coefficients, Rows, Support
from hybrid_kernels.validate import TAILS
from ranks import join
from tolerance import relative_error

# How much of a vocabulary each rank has: never the same, and at no 16-byte boundary.
SHARES = {1: (1.0,), 2: (0.31, 0.69), 4: (0.39, 0.08, 0.46, 0.07)}
EMPTY = 1  # the rank that cases with an empty shard mean
TOLERANCE = 1e-6
# Of bf16: each side is rounded, by the interpreter towards zero.
ROUNDINGS = {"torch": 2 * 2.0**-8, "triton": 4 * 2.0**-8}
SECONDS = 20  # that a collective waits for a rank that failed


@dataclass
class Ranks:
    """What a case knows of the group it runs in."""

    backend: str
    group: torch.distributed.ProcessGroup

    @property
    def rank(self) -> int:
        return self.group.rank()

    def bounds(self, vocabulary: int, rank: int | None = None) -> tuple[int, int]:
        """Where a rank's shard begins and ends."""
        rank = self.rank if rank is None else rank
        *shares, _ = SHARES[self.group.size()]
        ends = [0]
        for left, share in zip(range(len(shares), 0, -1), shares, strict=True):
            wanted = max(ends[-1] + 1, round(ends[-1] + share * vocabulary))
            ends.append(min(wanted, vocabulary - left))
        ends.append(vocabulary)
        return ends[rank], ends[rank + 1]

    def shard(self, case: Case) -> Case:
        """This rank's part of a case: a view into the whole, so that rows have gaps."""
        first, last = self.bounds(case.vocabulary)

        def view(stored: torch.Tensor) -> torch.Tensor:
            return case.view(stored)[..., first:last]

        def part(teacher):
            if isinstance(teacher, Mixture):
                return Mixture([(weight, part(one)) for weight, one in teacher.members])
            return teacher[..., first:last] if isinstance(teacher, torch.Tensor) else teacher

        return replace(case, view=view, given=part(case.given))

    def compare(self, case: Case, method: str = "hybrid_loss", **options) -> Outcome:
        """Asserts that this rank's results are those of the whole; returns its outcome."""
        whole = getattr(case, method)(backend=self.backend, **options)
        own = getattr(self.shard(case), method)(
            backend=self.backend, process_group=self.group, **options
        )
        told = torch.stack([t.mean() if t.ndim else t for t in own.result if t is not None])
        everywhere = [torch.empty_like(told) for _ in range(self.group.size())]
        torch.distributed.all_gather(everywhere, told, self.group)

        def check() -> None:
            for name, expected in whole.result._asdict().items():
                got = getattr(own.result, name)
                assert (got is None) == (expected is None), name
                if got is not None:
                    # (The loss has a product of two other numbers in it.)
                    tolerance = 2 * TOLERANCE if name == "loss" else TOLERANCE
                    assert_values(got, expected, name, tolerance)
            for other in everywhere:
                assert_values(other, told, "what another rank tells", 0)
            first, last = self.bounds(case.vocabulary)
            gradient = case.view(own.gradient)
            bounds, expected = (first, last), case.view(whole.gradient)
            assert_gradient(gradient[..., first:last], expected, bounds, self.backend)
            others = torch.ones_like(gradient, dtype=torch.bool)
            others[..., first:last] = False
            assert not gradient[others].any(), "a gradient of what is another rank's"

        self.agree(check)
        return own

    def agree(self, check: Callable[[], None]) -> None:
        """Runs a check, which fails on all ranks if on one: they must not wait for each other."""
        error = None
        try:
            check()
        except AssertionError as raised:
            error = raised
        wrong = torch.tensor([error is not None], dtype=torch.int32)
        torch.distributed.all_reduce(wrong, group=self.group)
        if error is not None:
            raise error
        assert not wrong.any(), "another rank failed"


def assert_values(got, expected, name, tolerance=TOLERANCE):
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def assert_gradient(got, whole, bounds, backend):
    """A part of the whole's: the same where that is not finite; else its error is small beside the
    norm of the whole. Entry by entry in bf16, which may round to either side."""
    assert got.dtype == whole.dtype
    expected = whole[..., slice(*bounds)]
    finite = expected.isfinite()
    torch.testing.assert_close(got[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    error = (got[finite].double() - expected[finite].double()).abs()
    whole = whole[whole.isfinite()].double()
    if expected.dtype == torch.bfloat16:
        bound = ROUNDINGS[backend] * expected[finite].abs() + TOLERANCE * whole.norm()
        assert bool((error <= bound).all()), "gradient: more than a rounding"
    else:
        relative = float(error.norm() / whole.norm().clamp(min=1e-30))
        assert relative <= TOLERANCE, f"gradient: relative error {relative:.3g}"


# -- the cases: each is run by all ranks of a group -----------------------------------------------

CASES: dict[str, Callable[[Ranks], None]] = {}
INTERPRETED: set[str] = set()  # those that the Triton kernels run, too


def case(name: str, *, interpreted: bool = False):
    """Registers a case."""

    def register(function: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
        assert name not in CASES
        CASES[name] = function
        if interpreted:
            INTERPRETED.add(name)
        return function

    return register


def teachers(kind: str, members: int, temperature: float = 1.0, **options) -> Case:
    made = cases.make(127, masked=True, **options)
    return cases.with_teachers(made, members, None if kind == "full" else "union", temperature)


ALL_TERMS = {"entropy_weight": 0.3, "reduction": "none"}
KINDS = ["full", *TAILS]


def _register_products() -> None:
    for divergence in DIVERGENCES:
        name = divergence_id(divergence)
        for members in (1, 2):

            @case(f"{name}, {members} teachers", interpreted=members == 2 and name not in TWINS)
            def _(ranks, divergence=divergence, members=members):
                made = teachers("full", members)
                weight = made.upstream.cos()
                options = {"divergence": divergence, "dense_weight": weight, **ALL_TERMS}
                ranks.compare(made, temperature=0.7, **options)

        @case(f"{name}, floor", interpreted=name == "reverse_kl")
        def _(ranks, divergence=divergence):
            options = {"divergence": divergence, "teacher_floor": -4.0, **ALL_TERMS}
            ranks.compare(teachers("full", 2), **options)

        for tail in TAILS:

            @case(f"{name}, {tail}", interpreted=name == "reverse_kl")
            def _(ranks, divergence=divergence, tail=tail):
                made = teachers(tail, 2, 0.7)
                options = {"divergence": divergence, "tail": tail, "temperature": 0.7}
                options["dense_weight"] = made.upstream.cos()
                ranks.compare(made, **options, **ALL_TERMS)

        @case(f"{name}, shards without mass", interpreted=name in ("forward_kl", "jsd-0.3"))
        def _(ranks, divergence=divergence):
            empty_shards(ranks, divergence=divergence)

        @case(f"{name}, unsound rows", interpreted=name in ("reverse_kl", "jsd-0.3"))
        def _(ranks, divergence=divergence):
            unsound_rows(ranks, divergence=divergence)

        @case(f"{name}, entries forbidden by either")
        def _(ranks, divergence=divergence):
            made = cases.make(127, (6,), style="forbidden_by_student")
            ranks.compare(made, divergence=divergence, **ALL_TERMS)
            made = cases.make(127, (6,))
            made.teacher[1, 3] = made.teacher[2, 100] = made.teacher[4, 60:] = -torch.inf
            ranks.compare(made, divergence=divergence, **ALL_TERMS)
            # A weight of 0 leaves nothing of an infinite divergence.
            weight = torch.arange(6.0).remainder(2)
            own = ranks.compare(made, divergence=divergence, dense_weight=weight, **ALL_TERMS)
            assert own.gradient[[0, 2, 4]].isfinite().all()

    for kind in KINDS:
        tail = "bucket" if kind == "full" else kind
        for name in ("reverse_kl", "forward_kl", "jsd", "renyi"):

            @case(f"token_terms, {kind}, {name}", interpreted=kind == "bucket")
            def _(ranks, kind=kind, tail=tail, name=name):
                made = teachers(kind, 1)
                ranks.compare(made, "token_terms", divergence=Divergence(name), tail=tail)

        @case(f"callable advantages, {kind}", interpreted=kind == "bucket")
        def _(ranks, kind=kind, tail=tail):
            def advantages(terms):
                ratio = (terms.teacher_log_prob - terms.log_prob).exp().clamp(max=2)
                return ratio - 0.1 * terms.divergence

            for reduction in ("mean", "none"):
                made = teachers(kind, 2)
                options = {"tail": tail, "advantages": advantages, "reduction": reduction}
                ranks.compare(made, entropy_weight=0.1, **options)

        @case(f"in place, {kind}", interpreted=kind == "bucket")
        def _(ranks, kind=kind, tail=tail):
            ranks.compare(teachers(kind, 2), tail=tail, inplace=True)
            written = teachers(kind, 2, layout="sliced", dtype=torch.bfloat16)
            ranks.compare(written, tail=tail, inplace=True)

        @case(f"bf16 and fp16, {kind}", interpreted=kind == "bucket")
        def _(ranks, kind=kind, tail=tail):
            ranks.compare(teachers(kind, 2, dtype=torch.bfloat16), tail=tail, **ALL_TERMS)
            made = cases.make(127, dtype=torch.bfloat16, teacher_dtype=torch.float16)
            made = cases.with_teachers(made, 2, None if kind == "full" else "union")
            ranks.compare(made, tail=tail, divergence="jsd", **ALL_TERMS)


def empty_shards(ranks: Ranks, **options) -> None:
    """A rank's entries are all -inf, for the student, for a teacher, for both, or in some rows."""
    first, last = ranks.bounds(127, EMPTY)
    for side in ("student", "teacher", "both", "some rows"):
        made = cases.make(127, (8,), masked=True)
        made.token_ids = made.token_ids.where(made.token_ids < 0, (first + 126) % 127)
        hidden = torch.zeros(8, 127, dtype=torch.bool)
        hidden[:, first:last] = True
        if side == "some rows":
            hidden[::2] = False
            # And a token that the student forbids.
            made.token_ids[3] = first
        elif side == "both":
            made.token_ids = made.token_ids.clamp(max=first - 1)
        hidden &= made.valid[:, None]
        if side != "teacher":
            made.student = made.student.masked_fill(hidden, -torch.inf)
        if side != "student":
            made.teacher = made.teacher.masked_fill(hidden, -torch.inf)
        ranks.compare(made, **ALL_TERMS, **options)
        if ranks.backend == "torch":
            ranks.compare(cases.with_teachers(made, 2, None), **ALL_TERMS, **options)


def unsound_rows(ranks: Ranks, **options) -> None:
    """NaN and infinities make their own row NaN on all ranks; a row of -inf likewise."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        for side in ("student", "teacher"):
            made = cases.make(127, (5,))
            clean = getattr(made, side).clone()
            stored = clean.clone()
            stored[1, 7] = stored[2, 100] = bad
            stored[3] = bad
            # A rank that sees nothing but NaN, or nothing but -inf.
            first, last = ranks.bounds(127, EMPTY)
            stored[4, first:last] = bad
            made = replace(made, **{side: stored})
            own = ranks.compare(made, **ALL_TERMS, **options)
            assert own.result.divergence[0].isfinite()
            assert own.result.divergence[3].isnan()
            if ranks.backend == "torch":
                ranks.compare(made, "token_terms", **options)
            if bad != -torch.inf:
                assert own.result.divergence[1:].isnan().all()


_register_products()


@case("no teacher", interpreted=True)
def _(ranks):
    made = replace(cases.make(127, masked=True), teacher=None)
    ranks.compare(made, dense_weight=0, **ALL_TERMS)
    ranks.compare(made, "token_terms")


@case("no tokens")
def _(ranks):
    for kind in KINDS:
        made = replace(teachers(kind, 2), advantages=None)
        made = replace(made, mask=made.valid, token_ids=None)
        first, last = bounds = ranks.bounds(127)
        parts = []
        for part, group in ((slice(None), None), (slice(first, last), ranks.group)):
            own = made if group is None else ranks.shard(made)
            leaf = made.student[..., part].nan_to_num(0, 0, 0).requires_grad_()
            options = {"tail": "bucket" if kind == "full" else kind, "process_group": group}
            loss = hybrid_loss(
                leaf, own.any_teacher, mask=made.mask, backend=ranks.backend, **options
            ).loss
            loss.backward()
            parts.append((loss.detach(), leaf.grad))

        def check(kind=kind, whole=parts[0], own=parts[1], bounds=bounds):
            assert_values(own[0], whole[0], kind)
            assert_gradient(own[1], whole[1], bounds, ranks.backend)

        ranks.agree(check)


@case("each term alone")
def _(ranks):
    for kind in KINDS:
        for terms in ("dense", "sparse", "entropy", "none"):
            options = {"dense_weight": 1.0 if terms == "dense" else 0.0}
            if terms != "sparse":
                options["advantages"] = None
            if terms == "entropy":
                options["entropy_weight"] = 0.5
            ranks.compare(teachers(kind, 2), tail="bucket" if kind == "full" else kind, **options)


@case("no rows")
def _(ranks):
    for known in (False, True):
        logits = torch.zeros(0, 3, 20, requires_grad=True)
        ids = torch.zeros(0, 3, 4, dtype=torch.long)
        teacher = TopK(ids, torch.zeros(0, 3, 4)) if known else logits.detach()
        options = {"backend": ranks.backend, "process_group": ranks.group}
        result = hybrid_loss(logits, teacher, ids[..., 0], torch.zeros(0, 3), **options)
        result.loss.backward()
        assert result.loss == 0
        assert result.divergence.shape == (0, 3)


@case("layouts", interpreted=True)
def _(ranks):
    for layout in cases.LAYOUTS:
        for kind in ("full", "bucket"):
            made = cases.make(127, masked=layout == "sliced", layout=layout)
            made = cases.with_teachers(made, 2, None if kind == "full" else "union")
            ranks.compare(made, entropy_weight=0.3)


@case("long rows")
def _(ranks):
    for divergence in ("reverse_kl", "jsd"):
        for kind in ("full", "bucket"):
            made = cases.make(50257, (3,))
            made = cases.with_teachers(made, 2, None if kind == "full" else "union")
            ranks.compare(made, divergence=divergence, **ALL_TERMS)


@case("a shard of one entry")
def _(ranks):
    size = ranks.group.size()
    made = cases.make(size, (4,))
    for divergence in ("reverse_kl", "forward_kl", "tv"):
        ranks.compare(made, divergence=divergence, **ALL_TERMS)


@case("offset models", interpreted=True)
def _(ranks):
    for divergence in ("reverse_kl", "forward_kl", "jeffreys"):
        made = cases.make(1000, (4,), style="offset")
        ranks.compare(made, divergence=divergence, **ALL_TERMS)


@case("a maximum that is another rank's, far away")
def _(ranks):
    """Shards of masses such as e^-1000, on either side."""
    made = cases.make(127, (5,))
    first, last = ranks.bounds(127, EMPTY)
    made.student[:3, first:last] -= 1000
    made.teacher[1:4, first:last] -= 1000
    made.teacher[4, last - 1] = -torch.inf
    made.student[4, first:last] -= 1000
    for divergence in ("reverse_kl", "forward_kl", "jeffreys", "jsd", "tv"):
        ranks.compare(made, divergence=divergence, **ALL_TERMS)


@case("close models")
def _(ranks):
    """Divergences of 1e-8 keep digits, and gradients from differences of 1e-4 all that they had."""
    made = cases.make(1000, (6,), style="close")
    first, last = ranks.bounds(1000)
    kinds = ("reverse_kl", "forward_kl", "jeffreys")
    for divergence, floor in (*((name, None) for name in kinds), ("reverse_kl", -30.0)):
        options = {"divergence": divergence, "reduction": "sum", "advantages": None}
        options["teacher_floor"] = floor
        truth = made.hybrid_loss(reference.hybrid_loss, torch.float64, **options)
        whole = made.hybrid_loss(backend=ranks.backend, **options)
        own = ranks.shard(made).hybrid_loss(
            backend=ranks.backend, process_group=ranks.group, **options
        )
        value = own.result.divergence.double()
        errors = [
            relative_error(one.gradient[..., first:last], truth.gradient[..., first:last])
            for one in (own, whole)
        ]

        def check(value=value, errors=errors, truth=truth, name=divergence):
            torch.testing.assert_close(value, truth.result.divergence, rtol=1e-2, atol=0)
            assert errors[0] < 2 * errors[1] + 1e-6, f"{name}: {errors}"

        ranks.agree(check)


@case("the whole vocabulary as a support")
def _(ranks):
    """Nothing is left outside, on any rank. Values and gradients are the full teacher's."""
    made = cases.make(24, (4,))
    order = torch.rand(4, 24, generator=torch.Generator().manual_seed(0)).argsort(-1)
    first, last = ranks.bounds(24)
    for tail in TAILS:
        parts = []
        for size in (24, 5):
            known = TopK.from_logits(made.teacher, ids=order[:, :size])
            whole = made.student.clone().requires_grad_()
            part = made.student[:, first:last].clone().requires_grad_()
            for leaf, group in ((whole, None), (part, ranks.group)):
                options = {"backend": ranks.backend, "process_group": group, "tail": tail}
                result = hybrid_loss(leaf, known, reduction="sum", **options)
                result.loss.backward()
                parts.append(result)

            def check(whole=whole, part=part, tail=tail, values=parts[-2:]):
                assert_gradient(part.grad, whole.grad, (first, last), ranks.backend)
                assert_values(*(one.divergence for one in values), tail)

            ranks.agree(check)


@case("unsound rows under a support", interpreted=True)
def _(ranks):
    for tail in TAILS if ranks.backend == "torch" else TAILS[:1]:
        for bad in (torch.nan, torch.inf, -torch.inf):
            made = cases.with_teachers(cases.make(127, (6,)), 1, "union")
            assert isinstance(made.given, TopK)
            made.student[1, 7] = made.student[2, 101] = bad
            made.student[3, made.given.ids[3, 0]] = bad
            made.student[4] = bad
            first, last = ranks.bounds(127, EMPTY)
            made.student[5, first:last] = bad
            own = ranks.compare(made, tail=tail, **ALL_TERMS)
            assert own.result.divergence[4].isnan()
            assert own.result.divergence[0].isfinite()


@case("shards without mass under a support")
def _(ranks):
    first, last = ranks.bounds(127, EMPTY)
    made = teachers("bucket", 1)
    student = made.student.clone()
    student[made.valid.nonzero(as_tuple=True)] = student[made.valid].index_fill(
        1, torch.arange(first, last), -torch.inf
    )
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        ranks.compare(replace(made, student=student), divergence=divergence, **ALL_TERMS)


@case("supports measured in pieces")
def _(ranks):
    """Statistics alone copy the logits, and not all of them at once."""
    with unittest.mock.patch.object(sharded, "_COPIED", 200):
        for layout in ("contiguous", "sliced"):
            ranks.compare(teachers("bucket", 2, layout=layout), "token_terms", divergence="jsd")


@case("a gradient of another dtype")
def _(ranks):
    """Which can't hold the logits on its way: the launchers are asked for it, no function is."""
    made = cases.make(127, (5,))
    first, last = ranks.bounds(127)
    student = made.student[None, :, first:last].contiguous()
    # All that matters is outside the support.
    known = TopK.from_logits(made.teacher, ids=made.student.topk(2, largest=False).indices)
    support = Support(known.ids, None, "bucket", known.resolution)
    rows = Rows(
        student, (known.log_probs,), (1.0,), support, None, None, "reverse_kl", 0.0, 1.0, None
    )
    coefficients = Coefficients(torch.ones(1), None, made.upstream)
    own = ops.implementation(ranks.backend, ranks.group.group_name, student)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.empty_like(student, dtype=dtype)
        own.hybrid_rows(rows, rows.statistics(), coefficients, gradient)
        found.append(gradient)
    before = made.student[None, :, first:last]
    rounding = relative_error(found[1], found[0].double())
    ranks.agree(lambda: assert_values(torch.tensor(rounding), torch.zeros(()), "bf16", 2.0**-8))
    ranks.agree(lambda: assert_values(student, before, "the student's logits", 0))


@case("masked rows that hold ordinary ids")
def _(ranks):
    for kind in KINDS:
        made = cases.with_teachers(cases.make(127, (6,)), 1, None if kind == "full" else "union")
        made = replace(made, mask=torch.tensor([True, False] * 3))
        own = ranks.compare(made, tail="bucket" if kind == "full" else kind, entropy_weight=0.3)
        assert not own.gradient[1::2].any()


@case("inputs are left alone", interpreted=True)
def _(ranks):
    for kind in KINDS:
        own = ranks.shard(teachers(kind, 1))
        options = {"tail": "bucket" if kind == "full" else kind, "mask": own.mask}
        for function in (hybrid_loss, token_terms):
            # Contiguous, and rows with gaps between them.
            for logits in (own.logits.contiguous(), own.logits):
                before, leaf = logits.clone(), logits.requires_grad_()
                result = function(
                    leaf, own.any_teacher, own.token_ids, backend=ranks.backend,
                    process_group=ranks.group, **options,
                )  # fmt: skip
                result[0].sum().backward()
                same = torch.equal(leaf.detach().nan_to_num(), before.nan_to_num())
                assert same, f"{function.__name__}, {kind}"


@case("groups of some of the ranks")
def _(ranks):
    """As beside data parallelism; and a group of one."""
    size = ranks.group.size()
    groups = [torch.distributed.new_group(range(first, size, 2)) for first in range(2)]
    some = Ranks(ranks.backend, groups[ranks.rank % 2])
    for kind in ("full", "bucket"):
        some.compare(teachers(kind, 2), divergence="jsd", **ALL_TERMS)
        some.compare(teachers(kind, 1), **ALL_TERMS)


@case("twice the same")
def _(ranks):
    for kind in ("full", "bucket"):
        made = ranks.shard(teachers(kind, 2))
        options = {"divergence": "jsd", "process_group": ranks.group, "backend": ranks.backend}
        runs = [made.hybrid_loss(**options, **ALL_TERMS) for _ in range(2)]
        assert torch.equal(runs[0].gradient.view(torch.int32), runs[1].gradient.view(torch.int32))
        assert torch.equal(runs[0].result.loss, runs[1].result.loss)


@case("ids outside the vocabulary")
def _(ranks):
    """On all ranks an error, of the tokens and of a support, that names the whole vocabulary."""
    first, last = ranks.bounds(127)
    options = {"backend": ranks.backend, "process_group": ranks.group}
    for wrong in (127, -1):
        made = cases.make(127, (4,))
        logits, teacher = made.student[:, first:last], made.teacher[:, first:last]
        made.token_ids[2] = wrong
        for function in (hybrid_loss, token_terms):
            with pytest.raises(ValueError, match=r"token_ids: .*outside the vocabulary"):
                function(logits, teacher, made.token_ids, **options)
        mask = torch.tensor([True, True, False, True])
        hybrid_loss(logits, teacher, made.token_ids, mask=mask, **options)
    ids = made.teacher.topk(5).indices
    known = TopK.from_logits(made.teacher, ids=ids)
    ids[1, 2] = 127
    with pytest.raises(ValueError, match=r"TopK.ids has 127.*\[0, 127\)"):
        hybrid_loss(logits, TopK(ids, known.log_probs), **options)


# -- the processes --------------------------------------------------------------------------------


def _work(rank: int, size: int, backend: str, folder: str, names: list[str]) -> None:
    """Runs all cases on one rank; writes what failed."""
    group = join(rank, size, folder, SECONDS)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory with NaN
    failed = {}
    for position, name in enumerate(names):
        try:
            CASES[name](Ranks(backend, group))
        except (Exception, pytest.fail.Exception):
            failed[name] = traceback.format_exc()
        # After an error ranks may wait for each other in different collectives.
        stuck = torch.tensor([failed.get(name) is not None], dtype=torch.int32)
        try:
            torch.distributed.all_reduce(stuck)
        except RuntimeError:
            failed[name] = failed.get(name, "another rank failed, or waits for something else")
            failed |= dict.fromkeys(names[position + 1 :], f"not run, after {name}")
            break
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(failed, file)
    os._exit(0)  # threads of gloo do not always survive an orderly end


def names_for(backend: str) -> list[str]:
    return [name for name in CASES if backend == "torch" or name in INTERPRETED]


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", names_for(metafunc.config.getoption("--backend")))


@pytest.fixture(scope="module")
def failures(world_size, backend, tmp_path_factory):
    """What failed in a group of processes: for each rank, the cases and why."""
    folder, names = tmp_path_factory.mktemp("ranks"), names_for(backend)
    arguments = (world_size, backend, str(folder), names)
    torch.multiprocessing.spawn(_work, arguments, nprocs=world_size)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def test_the_ranks_agree_with_the_whole(name, failures):
    found = {rank: failed[name] for rank, failed in enumerate(failures) if name in failed}
    assert not found, "\n".join(f"rank {rank}: {text}" for rank, text in found.items())
