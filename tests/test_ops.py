"""The operators as PyTorch sees them: opcheck, torch.compile, derivatives, determinism."""

import shutil

import pytest
import torch

import cases
from cases import every_divergence
from hybrid_kernels import Divergence, Mixture, TopK, hybrid_loss, ops, token_terms
from hybrid_kernels.linear.rows import CHUNKING, HEADS, Chunking, Heads
from hybrid_kernels.objective import RowLoss, Weights
from hybrid_kernels.rows import COEFFICIENTS, FIELDS, ROWS, Coefficients, Rows
from hybrid_kernels.validate import TAILS

needs_cc = pytest.mark.skipif(
    shutil.which("cc") is None, reason="inductor needs a C compiler: no cc"
)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def problem(case, divergence, backend, support=False):
    """The arguments that the operators share, for logits `[O, I, V]`."""
    name, parameter = divergence.canonical()
    rows = Rows(
        case.logits,
        [case.teacher_logits],
        [1.0],
        token_ids=case.token_ids.reshape(-1),
        valid=case.valid.reshape(-1),
        divergence=name,
        parameter=parameter,
        temperature=0.7,
        resolution=2.0**-24,
        backend=backend,
    )
    if not support:
        return rows
    teacher = TopK.from_logits(case.teacher_logits, 5, token_ids=case.token_ids.clamp(0, 6))
    log_probs = teacher.log_probs.flatten(0, -2)
    return rows._replace(
        teachers=[log_probs, log_probs - 1],
        shares=[1.0, 0.5],
        support=teacher.ids.flatten(0, -2),
        token_log_prob=teacher.token_log_prob.flatten(),
    )


@pytest.mark.parametrize(
    ("bag", "schema", "suffix"),
    [
        (Rows, ROWS, ""),
        (Coefficients, COEFFICIENTS, "_coefficient"),
        (Heads, HEADS, ""),
        (Chunking, CHUNKING, ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_schemas_declare_the_fields(bag, schema, suffix):
    declared = tuple(argument.split()[-1] for argument in schema.split(", "))
    assert declared == tuple(field + suffix for field in bag._fields)


@pytest.mark.parametrize("support", [False, True], ids=["full", "top-k"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck(layout, divergence, support, backend, device):
    case = cases.make(7, (2, 3), layout=layout, masked=True, device=device)
    arguments = problem(case, Divergence(divergence), backend, support)
    gradient = torch.zeros_like(case.logits)
    coefficients = (torch.ones(6, device=device), torch.ones(1, device=device), None)
    torch.library.opcheck(ops.row_statistics, arguments)
    torch.library.opcheck(ops.hybrid_rows, (gradient, *coefficients, *arguments))
    statistics = ops.row_statistics(*arguments)
    torch.library.opcheck(ops.row_gradient, (gradient, statistics, *coefficients, *arguments))
    torch.library.opcheck(ops.scale_rows, (gradient, torch.full((1,), 3.0, device=device), backend))
    torch.library.opcheck(ops.scale_rows, (gradient, torch.rand(6, device=device), backend))


# -- values for several rows ----------------------------------------------------------------------

# How many values there are for 12 rows `[4, 3]`: one, one per leading index, one for every two rows
# (some of which have different leading indices), one per row.
every_sharing = pytest.mark.parametrize("elements", [1, 4, 6, 12])


def shared_case(kind, device):
    """Twelve rows with two strides, some of them masked."""
    case = cases.make(127, (4, 3), layout="sliced", masked=True, device=device)
    return cases.with_teachers(case, 2, None if kind == "full" else "union")


def all_operators(rows, coefficients):
    """The statistics and the gradient, each from two operators."""
    fused, later = (torch.full_like(rows.student, torch.nan) for _ in range(2))
    statistics = ops.hybrid_rows(fused, *coefficients, *rows)
    ops.row_gradient(later, statistics, *coefficients, *rows)
    gradients = [gradient.flatten(0, 1).T for gradient in (fused, later)]
    return [statistics, ops.row_statistics(*rows), *gradients]


def random_coefficients(*sizes, device):
    generator = torch.Generator().manual_seed(0)
    return Coefficients(*(torch.randn(size, generator=generator).to(device) for size in sizes))


@every_divergence
@pytest.mark.parametrize("kind", ["full", "bucket"])
def test_a_temperature_for_each_row(kind, divergence, backend, device):
    assert_rows_have_their_temperatures(kind, 12, divergence, backend, device)


@every_sharing
@pytest.mark.parametrize("kind", ["full", *TAILS])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_temperature_for_several_rows(divergence, kind, elements, backend, device):
    assert_rows_have_their_temperatures(kind, elements, Divergence(divergence), backend, device)


def assert_rows_have_their_temperatures(kind, elements, divergence, backend, device):
    """Asserts that each row is the same as where all rows have its temperature."""
    case = shared_case(kind, device)
    rows = cases.rows_of(
        case,
        backend,
        divergence=divergence,
        tail="bucket" if kind == "full" else kind,
        temperature=100.0,  # not used
    )
    coefficients = random_coefficients(12, 1, 4, device=device)
    values = (0.5 + 0.25 * torch.arange(5, device=device)).repeat(3)[:elements]
    given = values.clone()
    if elements == 12:
        given[~rows.valid] = torch.nan
        given[1] = 0.0  # this row is masked, too
    got = all_operators(rows._replace(row_temperature=given), coefficients)
    for value in values.unique():
        alike = cases.in_runs(values, 12) == value
        alone = rows._replace(temperature=float(value))
        for output, expected in zip(got, all_operators(alone, coefficients), strict=True):
            torch.testing.assert_close(
                output[:, alike], expected[:, alike], rtol=1e-5, atol=1e-6, equal_nan=True
            )


@every_sharing
@pytest.mark.parametrize("kind", ["full", "bucket"])
def test_a_coefficient_for_several_rows(kind, elements, backend, device):
    rows = cases.rows_of(shared_case(kind, device), backend)
    coefficients = random_coefficients(elements, elements, elements, device=device)
    expanded = [cases.in_runs(c, 12) for c in coefficients]
    got, expected = all_operators(rows, coefficients), all_operators(rows, expanded)
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@every_sharing
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_weight_for_several_rows(late, summed, elements, backend, device, monkeypatch):
    """Values and gradients of a loss, computed with the upstream gradient or before it."""
    monkeypatch.setattr(ops, "scales_late", lambda *tensors: late)
    rows = cases.rows_of(shared_case("bucket", device), backend)
    weights = random_coefficients(elements, elements, elements, device=device)
    scale, outcomes = torch.tensor(0.1, device=device), []
    for given in (weights, [cases.in_runs(w, 12) for w in weights]):
        leaf = rows.student.detach().requires_grad_()
        loss = RowLoss(Weights(*given), scale, summed)
        problem = rows._replace(student=leaf)
        value, _ = ops.HybridLossFunction.apply(leaf, problem, loss, None, False)
        value.sum().backward()
        outcomes.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


def test_opcheck_of_values_for_several_rows(backend, device):
    rows = cases.rows_of(cases.with_teachers(cases.make(7, (4, 3)), 1, None), backend)
    rows = rows._replace(row_temperature=torch.full((4,), 0.7))
    coefficients = random_coefficients(12, 4, 1, device=device)
    gradient = torch.zeros_like(rows.student)
    torch.library.opcheck(ops.row_statistics, tuple(rows))
    torch.library.opcheck(ops.hybrid_rows, (gradient, *coefficients, *rows))


# -- the sampled token's log q(y) -----------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 2])
def test_an_unknown_token_log_prob(members, backend, device):
    """Rows where it is NaN are the same as without it, and the others the same as with it."""
    case = cases.with_teachers(cases.make(127, (12,), device=device), members, "teacher")
    rows = cases.rows_of(case, backend)
    coefficients = random_coefficients(12, 12, 1, device=device)
    unknown = torch.arange(12, device=device) % 2 == 0
    inside = (rows.support == rows.token_ids[:, None]).any(-1)
    assert (unknown & ~inside).any()
    mixed = rows._replace(token_log_prob=rows.token_log_prob.masked_fill(unknown, torch.nan))
    got = all_operators(mixed, coefficients)
    complete = all_operators(rows, coefficients)
    missing = all_operators(rows._replace(token_log_prob=None), coefficients)
    for output, with_it, without in zip(got, complete, missing, strict=True):
        expected = torch.where(unknown, without, with_it)
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    statistics = got[0]
    assert torch.equal(statistics[FIELDS.teacher_log_prob].isnan(), unknown & ~inside)
    assert (statistics[FIELDS.tail_correction][unknown] == 0).all()
    assert all(gradient.isfinite().all() for gradient in got[2:])
    loss = RowLoss(Weights(1.0, None, None), torch.ones(()), summed=False)
    assert loss.value(statistics, None).isfinite().all()


def loss_of(case, backend, **options):
    def compute(logits, teacher, token_ids, advantages):
        loss = hybrid_loss(logits, teacher, token_ids, advantages, backend=backend, **options).loss
        return (loss * 1.5).sum()

    return compute, (case.teacher, case.token_ids, case.advantages)


def terms_of(case, backend):
    def compute(logits, teacher, token_ids, advantages):
        terms = token_terms(logits, teacher, token_ids, backend=backend)
        return (advantages * (terms.log_prob + terms.divergence.square()) + terms.entropy).sum()

    return compute, (case.teacher, case.token_ids, case.advantages)


def assert_compiles(case, compute, others, compiler="aot_eager", dynamic=None):
    """Asserts that `compute` compiles without a break, with the value and gradient of eager."""
    compiled = torch.compile(compute, fullgraph=True, backend=compiler, dynamic=dynamic)
    outcomes = []
    for function in (compute, compiled):
        leaf = case.student.clone().requires_grad_()
        loss = function(leaf * 1.0, *others)
        loss.backward()
        outcomes.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-7)
    return compiled


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"advantages": "function"},
        {"inplace": True},
        {"inplace": True, "reduction": "none", "entropy_weight": 0.1},
        {"divergence": "jsd", "num_tokens": 23, "temperature": 0.7, "teacher_floor": -5.0},
    ],
    ids=["mean", "none", "function", "inplace", "inplace-none", "all-options"],
)
@pytest.mark.native
def test_compiled_loss(options, backend, device, fresh_compiler):
    case = cases.make(128, (2, 5), device=device)
    options = dict(options)
    if options.pop("advantages", None):

        def compute(logits, teacher, token_ids, advantages):
            def weighted(terms):
                return advantages * (terms.log_prob - terms.teacher_log_prob)

            return hybrid_loss(logits, teacher, token_ids, weighted, backend=backend).loss

        others = (case.teacher, case.token_ids, case.advantages)
    else:
        compute, others = loss_of(case, backend, **options)
    assert_compiles(case, compute, others)


@pytest.mark.native
def test_compiled_loss_with_a_mask_and_a_device_count(backend, device, fresh_compiler):
    case = cases.make(128, (2, 5), masked=True, device=device)
    count = torch.tensor(23.0, device=device)
    compute, others = loss_of(case, backend, mask=case.mask, num_tokens=count)
    assert_compiles(case, compute, others)


@pytest.mark.native
def test_compiled_terms(backend, device, fresh_compiler):
    case = cases.make(128, (2, 5), device=device)
    assert_compiles(case, *terms_of(case, backend))


@pytest.mark.native
def test_compiled_with_dynamic_shapes(backend, device, fresh_compiler):
    """One graph for every batch and vocabulary."""
    case = cases.make(128, (2, 5), device=device)
    compiled = assert_compiles(case, *loss_of(case, backend), dynamic=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for vocabulary, rows in ((300, (3, 4)), (77, (5, 2))):
            other = cases.make(vocabulary, rows, device=device)
            compute, others = loss_of(other, backend)
            leaf = other.student.clone().requires_grad_()
            loss = compiled(leaf * 1.0, *others)
            torch.testing.assert_close(loss, compute(other.student, *others))


@needs_cc
@pytest.mark.native
def test_compiled_by_inductor(backend, device, fresh_compiler):
    case = cases.make(128, (2, 5), device=device)
    assert_compiles(case, *loss_of(case, backend, inplace=True), compiler="inductor")
    assert_compiles(case, *terms_of(case, backend), compiler="inductor")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_cc)])
@pytest.mark.native
def test_compiled_backward_twice(compiler, backend, device, fresh_compiler):
    """Compiled code must not scale the buffer that the second backward reads."""
    case = cases.make(128, (2, 5), device=device)
    compute, others = loss_of(case, backend)
    compiled = torch.compile(compute, fullgraph=True, backend=compiler)
    leaf = case.student.clone().requires_grad_()
    loss = compiled(leaf, *others)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert first.any()
    assert torch.equal(first, second)


@pytest.mark.native
@every_divergence
def test_results_are_the_same_run_to_run(divergence, backend, device, several_threads):
    case = cases.make(50257, (5,), masked=True, device=device)
    first, second = (
        case.hybrid_loss(backend=backend, divergence=divergence, entropy_weight=0.1)
        for _ in range(2)
    )
    assert torch.equal(first.result.loss, second.result.loss)
    assert torch.equal(first.gradient.nan_to_num(7), second.gradient.nan_to_num(7))


def test_gradients_equal_finite_differences(backend, device):
    """Finite differences of the loss share no formula with the gradient."""
    case = cases.make(7, (3,), device=device)
    compute, others = loss_of(case, backend, entropy_weight=0.3)
    leaf = case.student.requires_grad_()
    compute(leaf, *others).backward()
    step = 1e-2
    for row, entry in ((0, 0), (1, 3), (2, 6)):
        shift = torch.zeros_like(case.student)
        shift[row, entry] = step
        with torch.no_grad():
            slope = (compute(leaf + shift, *others) - compute(leaf - shift, *others)) / (2 * step)
        torch.testing.assert_close(slope, leaf.grad[row, entry], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["top-k", "mixture", "mixture of top-k", "given"])
@pytest.mark.native
def test_compiled_with_other_teachers(kind, backend, device, fresh_compiler):
    """Teachers that are made inside the compiled function, and one that is passed in."""
    case = cases.make(128, (2, 5), device=device)
    ids = case.teacher.topk(9).indices
    log_probs = case.teacher.log_softmax(-1).gather(-1, ids)
    top_k = TopK(ids, log_probs, torch.full_like(case.advantages, -9.0))

    def teacher_of(logits):
        return {
            "top-k": lambda: TopK(ids, log_probs, top_k.token_log_prob),
            "mixture": lambda: Mixture([(1.0, logits), (0.5, logits.flip(-1))]),
            "mixture of top-k": lambda: Mixture(
                [(1.0, TopK(ids, log_probs)), (0.5, TopK(ids, log_probs - 1))]
            ),
            "given": lambda: top_k,
        }[kind]()

    def compute(logits, teacher, token_ids, advantages):
        given = teacher_of(teacher)
        terms = token_terms(logits, given, token_ids, backend=backend)
        result = hybrid_loss(logits, given, token_ids, advantages, backend=backend)
        return result.loss + (terms.divergence * advantages).sum()

    assert_compiles(case, compute, (case.teacher, case.token_ids, case.advantages))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [128, 203])
def test_a_gradient_in_fewer_bits_than_the_logits(vocabulary, dtype, backend, device):
    """Backward GEMMs of 16-bit weights need it, even if the logits are fp32."""
    case = cases.make(vocabulary, (2, 3), masked=True, device=device)
    arguments = problem(case, Divergence("reverse_kl"), backend)
    coefficients = (torch.ones(6, device=device), torch.ones(1, device=device), None)
    whole = torch.full_like(case.logits, torch.nan)
    ops.hybrid_rows(whole, *coefficients, *arguments)
    gradient = torch.full_like(case.logits, torch.nan, dtype=dtype)
    ops.hybrid_rows(gradient, *coefficients, *arguments)
    torch.testing.assert_close(gradient.float(), whole, rtol=1e-2, atol=1e-6)


def test_the_number_of_values_must_divide_the_rows(backend, device):
    logits = torch.zeros(2, 3, 16, device=device)
    temperatures = torch.ones(4, device=device)
    rows = Rows(logits, (logits,), (1.0,), row_temperature=temperatures, backend=backend)
    with pytest.raises(ValueError, match="4 values for 6 rows"):
        ops.row_statistics(*rows)
