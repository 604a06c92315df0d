"""With the vocabulary over several ranks, results and gradients equal those of the whole."""

import unittest.mock
from dataclasses import replace

import pytest
import torch
import torch.distributed

import cases
from cases import DIVERGENCES, Case, divergence_id, every_divergence
from hybrid_kernels import (
    Divergence,
    TopK,
    backends,
    hybrid_loss,
    ops,
    reference,
    sharded,
    token_terms,
)
from hybrid_kernels.rows import FIELDS, Coefficients, Rows
from hybrid_kernels.validate import TAILS
from ranks import Ranks, every_size, on_ranks
from tolerance import ANOTHER_ORDER, assert_gradient, assert_values, relative_error

pytestmark = every_size

EMPTY = 1  # the rank whose shard has no mass in some tests
ALL_TERMS = {"entropy_weight": 0.3, "reduction": "none"}
KINDS = ["full", *TAILS]
SIDES = ["student", "teacher"]
NOT_FINITE = [torch.nan, torch.inf, -torch.inf]

native = pytest.mark.native


def each(name: str, values: list, interpreted: tuple = (), **options):
    """Parametrizes with all values, of which the interpreter runs only some."""
    marked = [pytest.param(v, marks=() if v in interpreted else native) for v in values]
    return pytest.mark.parametrize(name, marked, **options)


def each_divergence(*interpreted: str):
    chosen = tuple(d for d in DIVERGENCES if divergence_id(d) in interpreted)
    return each("divergence", DIVERGENCES, chosen, ids=divergence_id)


each_kind = each("kind", KINDS, ("bucket",))


def teachers(kind: str, members: int, temperature: float = 1.0, **options) -> Case:
    made = cases.make(127, masked=True, **options)
    return cases.with_teachers(made, members, None if kind == "full" else "union", temperature)


def tail_of(kind: str) -> str:
    return "bucket" if kind == "full" else kind


@every_divergence
@each("members", [1, 2], (2,))
@on_ranks
def test_every_divergence(ranks, divergence, members):
    made = teachers("full", members)
    options = {"divergence": divergence, "dense_weight": made.upstream.cos(), **ALL_TERMS}
    temperature = 0.7 if members == 1 else torch.linspace(0.7, 1.3, len(made.token_ids))[:, None]
    ranks.assert_equals_whole(made, temperature=temperature, **options)


@each_divergence("reverse_kl")
@on_ranks
def test_a_floor_under_the_teacher(ranks, divergence):
    ranks.assert_equals_whole(
        teachers("full", 2), divergence=divergence, teacher_floor=-4.0, **ALL_TERMS
    )


@each_divergence("reverse_kl")
@pytest.mark.parametrize("tail", TAILS)
@on_ranks
def test_every_tail(ranks, tail, divergence):
    made = teachers(tail, 2, 0.7)
    options = {"divergence": divergence, "tail": tail, "dense_weight": made.upstream.cos()}
    ranks.assert_equals_whole(made, temperature=0.7, **options, **ALL_TERMS)


@each_divergence("forward_kl", "jsd-0.3")
@pytest.mark.parametrize("side", [*SIDES, "both", "some rows"])
@on_ranks
def test_shards_without_mass(ranks, side, divergence):
    """A rank's entries are all -inf, for the student, for a teacher, for both, or in some rows."""
    first, last = ranks.bounds(127, EMPTY)
    made = cases.make(127, (8,), masked=True)
    made.token_ids = made.token_ids.where(made.token_ids < 0, (first + 126) % 127)
    hidden = torch.zeros(8, 127, dtype=torch.bool)
    hidden[:, first:last] = True
    if side == "some rows":
        hidden[::2] = False
        # The student forbids this sampled token.
        made.token_ids[3] = first
    elif side == "both":
        made.token_ids = made.token_ids.clamp(max=first - 1)
    hidden &= made.valid[:, None]
    if side != "teacher":
        made.student = made.student.masked_fill(hidden, -torch.inf)
    if side != "student":
        made.teacher = made.teacher.masked_fill(hidden, -torch.inf)
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)
    if ranks.backend == "torch":
        ranks.assert_equals_whole(
            cases.with_teachers(made, 2, None), divergence=divergence, **ALL_TERMS
        )


@each_divergence("reverse_kl", "jsd-0.3")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", NOT_FINITE)
@on_ranks
def test_rows_that_are_not_finite(ranks, bad, side, divergence):
    """NaN and +inf make their row NaN on all ranks, and so does a whole row of -inf."""
    made = cases.make(127, (5,))
    stored = getattr(made, side)
    stored[1, 7] = stored[2, 100] = bad
    stored[3] = bad
    # One rank has no other value than this one.
    first, last = ranks.bounds(127, EMPTY)
    stored[4, first:last] = bad
    got = ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)
    assert got.result.divergence[0].isfinite()
    assert got.result.divergence[3].isnan()
    if ranks.backend == "torch":
        ranks.assert_equals_whole(made, "token_terms", divergence=divergence)
    if bad != -torch.inf:
        assert got.result.divergence[1:].isnan().all()


@each_divergence()
@on_ranks
def test_entries_forbidden_by_either(ranks, divergence):
    made = cases.make(127, (6,), style="forbidden_by_student")
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)
    made = cases.make(127, (6,))
    made.teacher[1, 3] = made.teacher[2, 100] = made.teacher[4, 60:] = -torch.inf
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)
    # A weight of 0 cancels an infinite divergence.
    weight = torch.arange(6.0).remainder(2)
    got = ranks.assert_equals_whole(made, divergence=divergence, dense_weight=weight, **ALL_TERMS)
    assert got.gradient[[0, 2, 4]].isfinite().all()


@native
@pytest.mark.parametrize("style", cases.STYLES)
@on_ranks
def test_styles(ranks, style):
    made = cases.make(127, (4,), style=style)
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)


@each_kind
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "renyi"])
@on_ranks
def test_token_terms(ranks, name, kind):
    options = {"divergence": Divergence(name), "tail": tail_of(kind)}
    ranks.assert_equals_whole(teachers(kind, 1), "token_terms", **options)


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
@on_ranks
def test_callable_advantages(ranks, reduction, kind):
    def advantages(terms):
        ratio = (terms.teacher_log_prob - terms.log_prob).exp().clamp(max=2)
        return ratio - 0.1 * terms.divergence

    options = {"tail": tail_of(kind), "advantages": advantages, "reduction": reduction}
    ranks.assert_equals_whole(teachers(kind, 2), entropy_weight=0.1, **options)


@each_kind
@on_ranks
def test_in_place(ranks, kind):
    ranks.assert_equals_whole(teachers(kind, 2), tail=tail_of(kind), inplace=True)
    written = teachers(kind, 2, layout="sliced", dtype=torch.bfloat16)
    ranks.assert_equals_whole(written, tail=tail_of(kind), inplace=True)


@each_kind
@on_ranks
def test_bf16_and_fp16(ranks, kind):
    ranks.assert_equals_whole(
        teachers(kind, 2, dtype=torch.bfloat16), tail=tail_of(kind), **ALL_TERMS
    )
    made = cases.make(127, dtype=torch.bfloat16, teacher_dtype=torch.float16)
    made = cases.with_teachers(made, 2, None if kind == "full" else "union")
    ranks.assert_equals_whole(made, tail=tail_of(kind), divergence="jsd", **ALL_TERMS)


@on_ranks
def test_no_teacher(ranks):
    made = replace(cases.make(127, masked=True), teacher=None)
    ranks.assert_equals_whole(made, dense_weight=0, **ALL_TERMS)
    ranks.assert_equals_whole(made, "token_terms")


@native
@pytest.mark.parametrize("kind", KINDS)
@on_ranks
def test_no_tokens(ranks, kind):
    made = replace(teachers(kind, 2), advantages=None)
    made = replace(made, mask=made.valid, token_ids=None)
    first, last = bounds = ranks.bounds(127)
    parts = []
    for part, group in ((slice(None), None), (slice(first, last), ranks.group)):
        case = made if group is None else ranks.shard(made)
        leaf = made.student[..., part].nan_to_num(0, 0, 0).requires_grad_()
        options = {"tail": tail_of(kind), "process_group": group, "backend": ranks.backend}
        loss = hybrid_loss(leaf, case.any_teacher, mask=made.mask, **options).loss
        loss.backward()
        parts.append((loss.detach(), leaf.grad))
    (expected, whole_gradient), (got, gradient) = parts
    assert_values(got, expected, "loss")
    assert_gradient(gradient, whole_gradient, bounds, ranks.backend)


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", ["dense", "sparse", "entropy", "none"])
@on_ranks
def test_each_term_alone(ranks, terms, kind):
    options = {"dense_weight": 1.0 if terms == "dense" else 0.0}
    if terms != "sparse":
        options["advantages"] = None
    if terms == "entropy":
        options["entropy_weight"] = 0.5
    ranks.assert_equals_whole(teachers(kind, 2), tail=tail_of(kind), **options)


@native
@pytest.mark.parametrize("top_k", [False, True])
@on_ranks
def test_no_rows(ranks, top_k):
    logits = torch.zeros(0, 3, 20, requires_grad=True)
    ids = torch.zeros(0, 3, 4, dtype=torch.long)
    teacher = TopK(ids, torch.zeros(0, 3, 4)) if top_k else logits.detach()
    options = {"backend": ranks.backend, "process_group": ranks.group}
    result = hybrid_loss(logits, teacher, ids[..., 0], torch.zeros(0, 3), **options)
    result.loss.backward()
    assert result.loss == 0
    assert result.divergence.shape == (0, 3)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("support", [None, "union"])
@on_ranks
def test_layouts(ranks, support, layout):
    made = cases.make(127, masked=layout == "sliced", layout=layout)
    ranks.assert_equals_whole(cases.with_teachers(made, 2, support), entropy_weight=0.3)


@native
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("support", [None, "union"])
@on_ranks
def test_long_rows(ranks, support, divergence):
    made = cases.with_teachers(cases.make(50257, (3,)), 2, support)
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)


@native
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "tv"])
@on_ranks
def test_a_shard_of_one_entry(ranks, divergence):
    made = cases.make(ranks.group.size(), (4,))
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jeffreys"])
@on_ranks
def test_offset_models(ranks, divergence):
    made = cases.make(1000, (4,), style="offset")
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)


@native
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jeffreys", "jsd", "tv"])
@on_ranks
def test_a_far_larger_maximum_on_another_rank(ranks, divergence):
    """Shards have masses such as e^-1000, on either side or both."""
    made = cases.make(127, (5,))
    first, last = ranks.bounds(127, EMPTY)
    made.student[:3, first:last] -= 1000
    made.teacher[1:4, first:last] -= 1000
    made.teacher[4, last - 1] = -torch.inf
    made.student[4, first:last] -= 1000
    ranks.assert_equals_whole(made, divergence=divergence, **ALL_TERMS)


@native
@each_divergence("reverse_kl", "forward_kl")
@on_ranks
def test_tokens_that_are_forbidden_by_numbers(ranks, divergence):
    """All or some of a rank's entries are forbidden, on one side or both."""
    masks = (-torch.inf, cases.LOWEST, -1e9, -1e4)
    # Next to -1e9, fp32 loses the exponents of this divergence's terms.
    teacher_masks = masks[:1] if divergence == Divergence("renyi", alpha=1.7) else masks
    made = cases.forbidding([(a, b) for a in masks for b in teacher_masks], torch.float32, 127, 0)
    first, last = ranks.bounds(127, EMPTY)
    made.student[3:12, first:last] = made.student[3:12, :, None].amin(1)
    made.teacher[6:, first:last] = made.teacher[6:, :, None].amin(1)
    made.token_ids[:] = 0
    ranks.assert_equals_whole(made, divergence=divergence, temperature=1.7, **ALL_TERMS)


@native
@pytest.mark.parametrize(
    ("divergence", "floor"),
    [("reverse_kl", None), ("forward_kl", None), ("jeffreys", None), ("reverse_kl", -30.0)],
)
@on_ranks
def test_close_models(ranks, divergence, floor):
    """Divergences of 1e-8 keep digits; those of gradients are as on one rank."""
    made = cases.make(1000, (6,), style="close")
    first, last = ranks.bounds(1000)
    options = {"divergence": divergence, "reduction": "sum", "advantages": None}
    options["teacher_floor"] = floor
    truth = made.hybrid_loss(reference.hybrid_loss, torch.float64, **options)
    options["backend"] = ranks.backend
    whole = made.hybrid_loss(**options)
    got = ranks.shard(made).hybrid_loss(process_group=ranks.group, **options)
    value = got.result.divergence.double()
    torch.testing.assert_close(value, truth.result.divergence, rtol=1e-2, atol=0)
    error, allowed = (
        relative_error(outcome.gradient[..., first:last], truth.gradient[..., first:last])
        for outcome in (got, whole)
    )
    assert error < 2 * allowed + 1e-6, f"error {error:.3g}, without ranks {allowed:.3g}"


@native
@pytest.mark.parametrize("tail", TAILS)
@on_ranks
def test_the_whole_vocabulary_as_a_support(ranks, tail):
    """With K = V, no rank has entries outside of the support."""
    made = cases.make(24, (4,))
    order = torch.rand(4, 24, generator=torch.Generator().manual_seed(0)).argsort(-1)
    first, last = bounds = ranks.bounds(24)
    for size in (24, 5):
        teacher = TopK.from_logits(made.teacher, ids=order[:, :size])
        whole = made.student.clone().requires_grad_()
        part = made.student[:, first:last].clone().requires_grad_()
        results = []
        for leaf, group in ((whole, None), (part, ranks.group)):
            options = {"backend": ranks.backend, "process_group": group, "tail": tail}
            results.append(hybrid_loss(leaf, teacher, reduction="sum", **options))
            results[-1].loss.backward()
        assert_gradient(part.grad, whole.grad, bounds, ranks.backend)
        assert_values(*(result.divergence for result in results), f"divergence, K={size}")


@each("tail", TAILS, ("bucket",))
@pytest.mark.parametrize("bad", NOT_FINITE)
@on_ranks
def test_rows_that_are_not_finite_under_a_support(ranks, bad, tail):
    made = cases.with_teachers(cases.make(127, (6,)), 1, "union")
    made.student[1, 7] = made.student[2, 101] = bad
    made.student[3, made.given.ids[3, 0]] = bad
    made.student[4] = bad
    first, last = ranks.bounds(127, EMPTY)
    made.student[5, first:last] = bad
    got = ranks.assert_equals_whole(made, tail=tail, **ALL_TERMS)
    assert got.result.divergence[4].isnan()
    assert got.result.divergence[0].isfinite()


@native
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@on_ranks
def test_shards_without_mass_under_a_support(ranks, divergence):
    first, last = ranks.bounds(127, EMPTY)
    made = teachers("bucket", 1)
    student = made.student.clone()
    student[made.valid.nonzero(as_tuple=True)] = student[made.valid].index_fill(
        1, torch.arange(first, last), -torch.inf
    )
    ranks.assert_equals_whole(replace(made, student=student), divergence=divergence, **ALL_TERMS)


@native
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@on_ranks
def test_supports_measured_in_pieces(ranks, layout):
    """Without a gradient, statistics copy the logits, but not all of them at once."""
    with unittest.mock.patch.object(sharded, "_COPIED", 200):
        ranks.assert_equals_whole(
            teachers("bucket", 2, layout=layout), "token_terms", divergence="jsd"
        )


def written(rows, coefficients):
    """The public statistics, from each of two operators, and the gradient."""
    gradient = torch.full_like(rows.student, torch.nan)
    statistics = [ops.hybrid_rows(gradient, *coefficients, *rows), ops.row_statistics(*rows)]
    return torch.stack(statistics, 1)[: FIELDS.student_max], gradient


def assert_rows_equal_whole(ranks, made, change, **options):
    """Like `Ranks.assert_equals_whole`, for rows to which `change` is applied."""
    coefficients = Coefficients(torch.tensor([0.7, -1.3]), made.upstream.nan_to_num()[:, 0], None)
    whole = change(cases.rows_of(made, ranks.backend, **options))
    part = ranks.shard(made)
    part = change(cases.rows_of(part, ranks.backend, process_group=ranks.group, **options))
    expected, whole_gradient = ranks.on_one(lambda: written(whole, coefficients))
    got, gradient = written(part, coefficients)
    for field, value, truth in zip(FIELDS._fields, got, expected, strict=False):
        # A correction is a difference of numbers around 16, each with four roundings.
        digits = 4 * 2.0**-20 if field == "tail_correction" else ANOTHER_ORDER
        assert_values(value, truth, field, digits)
    assert_gradient(gradient, whole_gradient, ranks.bounds(127), ranks.backend)


@each_divergence("reverse_kl", "jsd-0.3")
@pytest.mark.parametrize("elements", [2, 5, 10])
@each_kind
@on_ranks
def test_a_temperature_for_each_row(ranks, kind, elements, divergence):
    def change(rows):
        values = 0.5 + 0.25 * torch.arange(elements)
        temperatures = values.where(rows.valid, torch.nan) if elements == 10 else values
        return rows._replace(row_temperature=temperatures)

    made = teachers(kind, 2, layout="sliced")
    assert_rows_equal_whole(ranks, made, change, divergence=divergence, tail=tail_of(kind))


@pytest.mark.parametrize("members", [1, 2])
@on_ranks
def test_token_log_probs_unknown_in_some_rows(ranks, members):
    def change(rows):
        unknown = torch.arange(10) % 3 == 0
        return rows._replace(token_log_prob=rows.token_log_prob.masked_fill(unknown, torch.nan))

    assert_rows_equal_whole(ranks, teachers("bucket", members), change)


@native
@on_ranks
def test_a_gradient_of_another_dtype(ranks):
    """It can't hold the logits meanwhile. Only the launchers offer this, no public function."""
    made = cases.make(127, (5,))
    first, last = ranks.bounds(127)
    student = made.student[None, :, first:last].contiguous()
    # Nearly all of the student's mass is outside of the support.
    teacher = TopK.from_logits(made.teacher, ids=made.student.topk(2, largest=False).indices)
    rows = Rows(
        student,
        (teacher.log_probs,),
        (1.0,),
        teacher.ids,
        resolution=teacher.resolution,
        group=ranks.group.group_name,
        backend=ranks.backend,
    )
    coefficients = Coefficients(torch.ones(1), None, made.upstream)
    launchers = backends.launchers(rows)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.empty_like(student, dtype=dtype)
        launchers.hybrid_rows(rows, rows.statistics(), coefficients, gradient)
        gradients.append(gradient)
    assert relative_error(gradients[1], gradients[0].double()) <= 2.0**-8
    assert torch.equal(student, made.student[None, :, first:last])


@native
@pytest.mark.parametrize("kind", KINDS)
@on_ranks
def test_masked_rows_that_hold_ordinary_ids(ranks, kind):
    made = cases.with_teachers(cases.make(127, (6,)), 1, None if kind == "full" else "union")
    made = replace(made, mask=torch.tensor([True, False] * 3))
    got = ranks.assert_equals_whole(made, tail=tail_of(kind), entropy_weight=0.3)
    assert not got.gradient[1::2].any()


@pytest.mark.parametrize("kind", KINDS)
@on_ranks
def test_inputs_are_left_alone(ranks, kind):
    shard = ranks.shard(teachers(kind, 1))
    options = {"tail": tail_of(kind), "mask": shard.mask, "backend": ranks.backend}
    options["process_group"] = ranks.group
    for function in (hybrid_loss, token_terms):
        # Contiguous, and rows with gaps between them.
        for logits in (shard.logits.contiguous(), shard.logits):
            before, leaf = logits.clone(), logits.requires_grad_()
            result = function(leaf, shard.any_teacher, shard.token_ids, **options)
            result[0].sum().backward()
            same = torch.equal(leaf.detach().nan_to_num(), before.nan_to_num())
            assert same, function.__name__


@native
@pytest.mark.parametrize("kind", ["full", "bucket"])
@on_ranks
def test_groups_of_some_of_the_ranks(ranks, kind):
    """Groups as with data parallelism in addition: of two ranks, or of one."""
    size = ranks.group.size()
    groups = [torch.distributed.new_group(range(first, size, 2)) for first in range(2)]
    some = Ranks(ranks.backend, groups[ranks.rank % 2])
    some.assert_equals_whole(teachers(kind, 2), divergence="jsd", **ALL_TERMS)
    some.assert_equals_whole(teachers(kind, 1), **ALL_TERMS)


@native
@pytest.mark.parametrize("kind", ["full", "bucket"])
@on_ranks
def test_results_are_deterministic(ranks, kind):
    made = ranks.shard(teachers(kind, 2))
    options = {"divergence": "jsd", "process_group": ranks.group, "backend": ranks.backend}
    runs = [made.hybrid_loss(**options, **ALL_TERMS) for _ in range(2)]
    assert torch.equal(runs[0].gradient.view(torch.int32), runs[1].gradient.view(torch.int32))
    assert torch.equal(runs[0].result.loss, runs[1].result.loss)


@native
@on_ranks
def test_ids_outside_the_vocabulary(ranks):
    """All ranks raise an error, for tokens and for a support, that names the whole vocabulary."""
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
    top_k = TopK.from_logits(made.teacher, ids=ids)
    ids[1, 2] = 127
    with pytest.raises(ValueError, match=r"TopK.ids has 127.*\[0, 127\)"):
        hybrid_loss(logits, TopK(ids, top_k.log_probs), **options)
