"""The linear functions against float64: a GEMM and the loss of the logits that it makes."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from cases import DTYPES, LINEAR_TEACHERS, every_divergence, in_runs, make_linear
from hybrid_kernels import (
    LinearTeacher,
    Mixture,
    OutputLayer,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    reference,
    token_terms,
)
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.linear import gemm
from hybrid_kernels.linear import ops as linear_ops
from hybrid_kernels.linear.chunks import Chunks, chunk_size
from hybrid_kernels.linear.gradients import Gradients
from hybrid_kernels.linear.rows import Chunking, Heads, LinearRows
from hybrid_kernels.rows import Rows
from tolerance import assert_close, assert_linear_matches

pytestmark = pytest.mark.gemms


@pytest.mark.parametrize("teacher", LINEAR_TEACHERS)
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 100])
def test_every_teacher_and_chunk(teacher, chunk_rows, backend, device):
    case = make_linear(teacher=teacher, masked=True, device=device)
    assert_linear_matches(case, backend, chunk_rows=chunk_rows, entropy_weight=0.2, temperature=0.7)


@every_divergence
def test_every_divergence(divergence, backend, device):
    case = make_linear(rows=(5,), device=device)
    assert_linear_matches(case, backend, chunk_rows=4, divergence=divergence, entropy_weight=0.2)


@every_divergence
@pytest.mark.parametrize("mask", [-torch.inf, -1e9], ids=str)
def test_a_bias_that_forbids_tokens(mask, divergence, backend, device):
    case = make_linear(bias=True, device=device)
    case.head.bias[100:110] = case.teacher_head.bias[100:120] = mask
    case.token_ids.clamp_(max=99)
    if FAMILIES[divergence.name].student_d or 1.7 in divergence.params.values():
        case.teacher_head.bias[110:120] = 0  # else the divergence is infinite
    assert_linear_matches(case, backend, chunk_rows=3, divergence=divergence, entropy_weight=0.2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_softcap_and_scale(dtype, bias, logit_scale, softcap, backend, device):
    case = make_linear(
        dtype=DTYPES[dtype],
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        masked=True,
        device=device,
    )
    assert_linear_matches(case, backend, chunk_rows=3)


SHARED = torch.tensor([[0.7], [1.3]])  # one value for each sequence


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hybrid_loss", {"reduction": "none"}),
        ("hybrid_loss", {"reduction": "sum", "teacher_floor": -4.0}),
        ("hybrid_loss", {"num_tokens": 23}),
        ("hybrid_loss", {"drop_masked": False}),
        ("hybrid_loss", {"advantages": lambda terms: terms.entropy * terms.log_prob}),
        ("hybrid_loss", {"dense_weight": 0.0}),
        ("hybrid_loss", {"temperature": SHARED, "dense_weight": SHARED, "advantages": SHARED}),
        ("token_terms", {}),
        ("token_terms", {"temperature": SHARED}),
        ("token_terms", {"teacher_floor": -4.0}),
        ("token_terms", {"drop_masked": False}),
    ],
    ids=[
        "none",
        "sum",
        "num_tokens",
        "kept",
        "function",
        "sparse",
        "shared",
        "terms",
        "shared terms",
        "floor",
        "all terms",
    ],
)
@pytest.mark.parametrize("teacher", ["linear", "top-k"])
def test_options(teacher, method, options, backend, device):
    case = make_linear(teacher=teacher, masked=True, bias=True, softcap=3.0, device=device)
    options = {name: x.to(device) if x is SHARED else x for name, x in options.items()}
    assert_linear_matches(case, backend, method, chunk_rows=3, **options)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("vocabulary", [1, 7, 128])
@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (7,), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shapes(rows, vocabulary, size, dtype, backend, device):
    case = make_linear(vocabulary, size, rows, dtype=DTYPES[dtype], bias=True, device=device)
    for method in ("hybrid_loss", "token_terms"):
        assert_linear_matches(case, backend, method, chunk_rows=4)


def test_a_masked_row_under_an_infinite_weight(backend, device):
    """Its gradient of 0 for the logits meets the weight in a GEMM."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(3, 4, generator=generator).to(device).requires_grad_()
    weight, teacher = (torch.randn(shape, generator=generator) for shape in ((8, 4), (3, 8)))
    weight[3] = teacher[:, 3] = -torch.inf
    mask = torch.tensor([True, False, True], device=device)
    options = {"mask": mask, "reduction": "none", "drop_masked": False, "backend": backend}
    loss = linear_hybrid_loss(hidden, weight.to(device), teacher.to(device), **options).loss
    loss.backward(torch.ones_like(loss))
    assert loss.isfinite().all()
    assert not hidden.grad[1].any()


@pytest.mark.parametrize("drop_masked", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_rows_masked(reduction, drop_masked, backend, device):
    case = make_linear(teacher="mixed", bias=True, device=device)
    case = replace(case, mask=torch.zeros_like(case.token_ids))
    case.hidden.fill_(torch.nan)
    got, gradients = case.ours(reduction=reduction, drop_masked=drop_masked, backend=backend)
    assert not got.loss.any()
    assert not got.divergence.any()
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_equals_the_gemm_and_hybrid_loss(backend, device):
    """In fp32 they differ only by the order in which GEMMs sum."""
    case = make_linear(teacher="logits", device=device)
    hidden, weight = case.leaves(None)
    logits = hidden @ weight.T
    whole = hybrid_loss(logits, case.given(None), case.token_ids, case.advantages, backend=backend)
    whole.loss.backward()
    got, gradients = case.ours(chunk_rows=4, backend=backend)
    torch.testing.assert_close(got.loss, whole.loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.divergence, whole.divergence, rtol=1e-5, atol=1e-6)
    for gradient, leaf in zip(gradients, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad * -1.7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("method", ["hybrid_loss", "token_terms"])
def test_output_layers_bring_all_that_belongs_to_them(method, layer, backend, device):
    case = make_linear(bias=True, softcap=3.0, logit_scale=0.4, masked=True, device=device)
    _, expected = case.reference(torch.float64, method)

    def output_layer(head):
        if not layer:
            return OutputLayer(head.weight, head.bias, head.softcap, head.logit_scale)
        linear = nn.Linear(*head.weight.T.shape, device=device)
        result = OutputLayer(linear, softcap=head.softcap, logit_scale=head.logit_scale)
        # Parameters may be replaced later.
        linear.weight, linear.bias = nn.Parameter(head.weight), nn.Parameter(head.bias)
        return result

    hidden, weight, bias = case.leaves(None)
    given = output_layer(replace(case.head, weight=weight, bias=bias))
    teacher = LinearTeacher(case.teacher_hidden, output_layer(case.teacher_head))
    case = replace(case, fixed=Mixture([(1.0, teacher)]))
    run = getattr(case, f"_{method}")
    function = {"hybrid_loss": linear_hybrid_loss, "token_terms": linear_token_terms}[method]
    run(function, hidden, given, case.given(None), backend=backend)
    for got, gradient in zip((hidden, given.weight, given.bias), expected, strict=True):
        torch.testing.assert_close(got.grad, gradient.float(), rtol=1e-4, atol=1e-5)


def test_a_linear_teacher_of_a_student_by_logits(backend, device):
    """`hybrid_loss` and `token_terms` accept a `LinearTeacher`, too."""
    case = make_linear(device=device, bias=True, softcap=3.0)
    given, plain = case.given(None), case.given(torch.float32)
    logits = case.head.logits(case.hidden, torch.float32)
    for function in (hybrid_loss, token_terms):
        got = function(logits, given, case.token_ids, backend=backend)
        expected = function(logits, plain, case.token_ids, backend=backend)
        torch.testing.assert_close(got.divergence, expected.divergence)


@pytest.mark.parametrize("function", [hybrid_loss, linear_hybrid_loss])
@pytest.mark.parametrize("given", ["layer", "tensors", "mixture"])
def test_a_teacher_with_the_students_own_layer(given, function, backend, device):
    """As in self-distillation: the layer gets the student's part of the gradient alone."""
    case = make_linear(bias=True, device=device)
    layer = nn.Linear(case.hidden.shape[-1], len(case.head.weight), device=device)
    layer.load_state_dict({"weight": case.head.weight, "bias": case.head.bias})
    teacher_hidden = case.hidden.flip(0)
    layers = {"layer": (layer,), "tensors": (layer.weight, layer.bias)}
    teacher = LinearTeacher(teacher_hidden, *layers.get(given, (layer,)))
    if given == "mixture":
        teacher = Mixture([(1.0, teacher)])
    hidden, weight, bias = case.leaves(torch.float64)
    teacher_logits = case.head.logits(teacher_hidden, torch.float64)
    reference.hybrid_loss(hidden @ weight.T + bias, teacher_logits).loss.backward()
    if function is hybrid_loss:
        loss = function(layer(case.hidden), teacher, backend=backend).loss
    else:
        loss = function(case.hidden, layer, teacher, backend=backend).loss
    loss.backward()
    for got, expected in ((layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)
    # Nor does it make a loss differentiable whose student is frozen.
    if function is hybrid_loss:
        loss = function(layer(case.hidden).detach(), teacher, backend=backend).loss
    else:
        loss = function(case.hidden, case.head.weight, teacher, backend=backend).loss
    assert not loss.requires_grad


@pytest.mark.parametrize("backward", ["loss", "terms"])
def test_no_gemm_for_a_frozen_weight(backward, backend, device, monkeypatch):
    """It costs fewer multiplications, since it has no gradient."""
    case = make_linear(bias=True, device=device)
    case = replace(case, teacher_hidden=case.hidden.flip(0), teacher_head=case.head)
    products = []
    original = gemm.multiply

    def counted(out, a, b, scale, accumulate):
        products.append(a.shape[0] * a.shape[1] * b.shape[1] / (case.head.weight.numel() * 10))
        original(out, a, b, scale, accumulate)

    monkeypatch.setattr(gemm, "multiply", counted)
    hidden, weight, bias = case.leaves(None)
    counts = {}
    for frozen in (False, True):
        products.clear()
        hidden.grad = None
        head = (weight.detach(), bias.detach()) if frozen else (weight, bias)
        options = {"student_bias": head[1], "backend": backend}
        if backward == "loss":
            linear_hybrid_loss(hidden, head[0], case.given(None), **options).loss.backward()
        else:
            terms = linear_token_terms(hidden, head[0], case.given(None), **options)
            terms.divergence.sum().backward()
        counts[frozen] = round(sum(products), 6)
        assert hidden.grad.any()
    first = {"loss": 4, "terms": 6}[backward]
    assert counts == {False: first, True: first - 1}
    # A frozen weight's loss per row needs no second computation of the logits.
    products.clear()
    loss = linear_hybrid_loss(
        hidden, weight.detach(), case.given(None), reduction="none", backend=backend
    ).loss
    loss.sum().backward()
    assert round(sum(products), 6) == 3
    products.clear()
    with torch.no_grad():
        linear_token_terms(hidden, weight, case.given(None), backend=backend)
    assert round(sum(products), 6) == 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_without_terms_is_differentiable(reduction, backend, device):
    case = make_linear(device=device)
    hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.head.weight))
    options = {"dense_weight": 0, "reduction": reduction, "backend": backend}
    loss = linear_hybrid_loss(hidden, weight, None, **options).loss
    loss.sum().backward()
    for tensor in (loss, hidden.grad, weight.grad):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_callable_advantages_compute_the_logits_of_a_single_chunk_once(
    backend, device, monkeypatch
):
    case = make_linear(masked=True, softcap=3.0, device=device)
    products = []
    original = gemm.multiply

    def counted(out, a, b, scale, accumulate):
        products.append(a.shape[0] * a.shape[1] * b.shape[1])
        original(out, a, b, scale, accumulate)

    monkeypatch.setattr(gemm, "multiply", counted)
    outcomes, costs = [], []
    for chunk_rows in (None, 4):
        products.clear()
        advantages = {"advantages": lambda terms: terms.entropy * terms.log_prob}
        outcomes.append(case.ours(backend=backend, chunk_rows=chunk_rows, **advantages)[1])
        costs.append(sum(products))
    count = int(case.valid.sum()) * case.head.weight.shape[0]
    size, teacher_size = case.hidden.shape[-1], case.teacher_hidden.shape[-1]
    assert costs == [count * (3 * size + teacher_size), count * (4 * size + 2 * teacher_size)]
    for one, several in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [2, None])
def test_frozen_hidden_states(chunk_rows, backend, device):
    case = make_linear(masked=True, device=device)
    _, weight = case.leaves(None)
    linear_hybrid_loss(
        case.hidden, weight, case.given(None), case.token_ids, mask=case.mask, backend=backend,
        chunk_rows=chunk_rows,
    ).loss.backward()  # fmt: skip
    _, (_, expected) = replace(case, advantages=0 * case.upstream.nan_to_num()).ours(
        backend=backend, chunk_rows=chunk_rows
    )
    torch.testing.assert_close(weight.grad * -1.7, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_per_row_with_a_frozen_weight(backend, device):
    case = make_linear(masked=True, teacher="mixed", device=device)
    truth, truths = case.reference(torch.float64, reduction="none")
    eager, eagers = case.reference(torch.float32, reduction="none")
    hidden, weight = case.leaves(None)
    got = linear_hybrid_loss(
        hidden, weight.detach(), case.given(None), case.token_ids, case.advantages, mask=case.mask,
        reduction="none", backend=backend,
    )  # fmt: skip
    got.loss.backward(case.upstream)
    assert_close(got.loss, truth.loss, eager.loss, "loss", scale=6.0)
    assert_close(hidden.grad, truths[0], eagers[0], "gradient", scale=float(truths[0].abs().max()))


def test_tied_embeddings_accumulate_into_one_parameter(backend, device):
    case = make_linear(device=device)
    weight = nn.Parameter(case.head.weight.clone())
    tokens = torch.randint(0, len(weight), case.hidden.shape[:-1], device=device)

    def loss(function):
        hidden = nn.functional.embedding(tokens, weight)
        return function(hidden)

    def composed(hidden):
        return hybrid_loss(hidden @ weight.T, case.given(torch.float32), backend=backend).loss

    def fused(hidden):
        return linear_hybrid_loss(hidden, weight, case.given(None), backend=backend).loss

    gradients = [torch.autograd.grad(loss(function), weight)[0] for function in (composed, fused)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_backward_twice_and_accumulation(backend, device):
    case = make_linear(masked=True, device=device)
    hidden, weight = case.leaves(None)
    loss = linear_hybrid_loss(
        hidden, weight, case.given(None), case.token_ids, mask=case.mask, backend=backend
    ).loss
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2.5 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2.5 * a, b, rtol=1e-6, atol=1e-8)


def test_inputs_are_not_written(backend, device):
    case = make_linear(masked=True, teacher="mixed", bias=True, softcap=2.0, device=device)
    given = case.given(None)
    logits = given.members[0][1]
    tensors = [case.hidden, *case.head.tensors, case.teacher_hidden, *case.teacher_head.tensors]
    tensors += [case.token_ids, case.advantages, case.mask, logits]
    before = [t.clone() for t in tensors]
    hidden, weight, bias = (t.requires_grad_() for t in (case.hidden, *case.head.tensors))
    linear_hybrid_loss(
        hidden, weight, given, case.token_ids, case.advantages, mask=case.mask, student_bias=bias,
        softcap=2.0, backend=backend,
    ).loss.backward()  # fmt: skip
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num())


def test_deterministic(backend, device):
    case = make_linear(300, 16, (9,), device=device)
    runs = [case.ours(chunk_rows=4, backend=backend) for _ in range(2)]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_logits(dtype, backend, device):
    """Logits are rounded to `logits_dtype` before anything is computed from them."""
    case = make_linear(dtype=torch.float32, device=device)
    hidden, weight = case.leaves(None)
    rounded = [
        case.head.logits(case.hidden, torch.float32).to(DTYPES[dtype]),
        case.given(torch.float32).to(DTYPES[dtype]),
    ]
    expected = hybrid_loss(*rounded, backend=backend)
    got = linear_hybrid_loss(
        hidden, weight, case.given(None), logits_dtype=DTYPES[dtype], backend=backend
    )
    torch.testing.assert_close(got.divergence, expected.divergence, rtol=1e-3, atol=1e-3)
    if dtype != "fp32":
        exact = linear_hybrid_loss(hidden, weight, case.given(None), backend=backend).divergence
        assert not torch.allclose(got.divergence, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.native
class TestFilter:
    """Gradient filtering, which chooses the columns of dz that enter the backward GEMMs."""

    def make_case(self, device):
        return make_linear(400, 24, (12,), logit_scale=3.0, bias=True, device=device)

    @pytest.mark.parametrize("eps", [1e-6, 1e-4, 1e-2])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_drops_small_columns(self, eps, reduction, backend, device):
        case = self.make_case(device)
        exact, (_, _, db) = case.ours(chunk_rows=12, reduction=reduction, backend=backend)
        got, (fh, fw, fb) = case.ours(
            chunk_rows=12, reduction=reduction, grad_filter=eps, backend=backend
        )
        assert exact.dropped_norm is None
        torch.testing.assert_close(got.loss, exact.loss)
        torch.testing.assert_close(fb, db)  # which costs no GEMM
        # The logit gradient, from the specification.
        hidden, weight, bias = case.leaves(torch.float64)
        logits = replace(case.head, weight=weight, bias=bias).logits(hidden, torch.float64)
        logits.retain_grad()
        reference.hybrid_loss(
            logits, case.given(torch.float64), case.token_ids, case.advantages, reduction=reduction
        ).loss.backward()
        dz = logits.grad
        per_token = dz * (12 if reduction == "mean" else 1)
        dropped = per_token.abs().mean(0) <= eps
        assert 0 < dropped.sum() < len(dropped) or eps == 1e-6
        share = torch.where(dropped, dz, 0.0).norm() / dz.norm()
        torch.testing.assert_close(got.dropped_norm.double(), share, rtol=1e-3, atol=1e-9)
        keep = torch.where(dropped, 0.0, -1.7 * 3.0 * dz)
        torch.testing.assert_close(
            fh.double(), keep @ weight.detach(), rtol=1e-4, atol=3e-6 * float(keep.norm())
        )
        torch.testing.assert_close(
            fw.double(), keep.T @ hidden.detach(), rtol=1e-4, atol=3e-6 * float(keep.norm())
        )
        assert not fw[dropped].any()

    @pytest.mark.parametrize("chunk_rows", [5, 12])
    def test_drops_everything_or_nothing(self, chunk_rows, backend, device):
        case = self.make_case(device)
        _, exact = case.ours(chunk_rows=chunk_rows, backend=backend)
        got, gradients = case.ours(chunk_rows=chunk_rows, grad_filter=1e9, backend=backend)
        assert float(got.dropped_norm) == 1.0
        assert not gradients[0].any()
        assert not gradients[1].any()
        got, gradients = case.ours(chunk_rows=chunk_rows, grad_filter=1e-30, backend=backend)
        assert float(got.dropped_norm) < 1e-20
        for gradient, expected in zip(gradients, exact, strict=True):
            torch.testing.assert_close(gradient, expected)

    def test_token_terms(self, backend, device):
        case = self.make_case(device)
        _, exact = case.ours("token_terms", chunk_rows=5, backend=backend)
        errors = []
        for eps in (1e-4, 1e-3, 1e-2):
            _, got = case.ours("token_terms", chunk_rows=5, grad_filter=eps, backend=backend)
            errors.append(float((got[1] - exact[1]).norm() / exact[1].norm()))
        assert 0 < errors[0] < errors[1] < errors[2] < 0.3
        assert errors[1] < 0.02


@pytest.mark.native
class TestChunks:
    """The size of a chunk, and the memory that its buffers are in."""

    def test_size(self):
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        # 64 MiB hold two fp32 logits per entry for 55 rows of 151,936; 256 rows are cut evenly.
        assert chunk_size(256, 8 * 151_936, 151_936, cpu) == 52
        assert chunk_size(10, 8 * 151_936, 151_936, cpu) == 10
        assert chunk_size(0, 8, 1, cpu) == 1
        assert chunk_size(3, 2**40, 2**37, cpu) == 1
        # For 2,048 rows, a sixteenth of all logits is more than that: 128 rows.
        assert chunk_size(2048, 8 * 151_936, 151_936, cpu) == 128
        assert chunk_size(8192, 10 * 151_936, 151_936, gpu) <= 1408
        for rows in (1, 5, 1000, 8192, 70_000):
            size = chunk_size(rows, 10 * 151_936, 151_936, gpu)
            assert size * 10 * 151_936 <= max(2 << 30, rows * 151_936 // 2)

    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [24, 64, 400])
    def test_buffers_inside_the_weights_gradient(self, size, dtype, softcap, backend, device):
        """A single chunk puts them there if they fit, which depends on D."""
        case = make_linear(203, size, (9,), dtype=DTYPES[dtype], softcap=softcap, device=device)
        assert_linear_matches(case, backend, chunk_rows=9)
        assert_linear_matches(case, backend, chunk_rows=9, grad_filter=1e-30)

    def test_memory_of_a_single_chunk(self, device):
        states, weight = torch.randn(16, 64), torch.randn(500, 64)
        heads = Heads([], [weight], None, [weight], [None], [1.0, 1.0], [0.0, 0.0])
        rows = Rows(states[None], [states], [1.0])
        problem = LinearRows(rows, heads, Chunking(None, torch.float32, 0.0, True))
        chunks = Chunks(problem, gradient=True)
        gradients = Gradients(chunks, [True, True, False], torch.ones(()))
        memory = gradients.weights[0].untyped_storage()
        inside = range(memory.data_ptr(), memory.data_ptr() + memory.nbytes())
        assert [buffer.data_ptr() in inside for buffer in chunks.buffers] == [True, True]


def test_a_normaliser_applied_after_the_gemms(backend, device, monkeypatch):
    """This is done in fp16, where 1/N of a probability would be 0."""
    case = make_linear(masked=True, bias=True, device=device)
    options = {"backend": backend, "chunk_rows": 4, "num_tokens": 1000, "grad_filter": 1e-3}
    expected, gradients = case.ours(**options)
    monkeypatch.setattr(linear_ops, "scales_late", lambda *tensors: True)
    got, late = case.ours(**options)
    torch.testing.assert_close(got.dropped_norm, expected.dropped_norm)
    for gradient, plain in zip(late, gradients, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-9)


def test_a_loss_scale_saves_the_mean_of_fp16(backend, device):
    """fp16 can't hold the gradients of 1e-9, but it can hold N times as much."""
    case = make_linear(dtype=torch.float16, device=device)

    def scaled(factor, **options):
        hidden, weight = case.leaves(None)
        sides = (hidden, weight, case.given(None), case.token_ids)
        result = linear_hybrid_loss(*sides, backend=backend, **options)
        (factor * result.loss).backward()
        return hidden.grad, weight.grad

    count = 2.0**22
    total = scaled(1.0, reduction="sum")
    for got, expected in zip(scaled(count, num_tokens=count), total, strict=True):
        assert torch.equal(got, expected)
        assert got.count_nonzero() > 0.9 * got.numel()


@pytest.mark.parametrize("function", [hybrid_loss, linear_hybrid_loss])
def test_callable_advantages_may_write_in_place(function, backend, device):
    case = make_linear(teacher="logits", device=device)

    def outcome(advantages):
        hidden, weight = case.leaves(None)
        sides = (hidden, weight) if function is linear_hybrid_loss else (hidden @ weight.T,)
        result = function(
            *sides, case.given(None), case.token_ids, advantages, entropy_weight=0.5,
            backend=backend,
        )  # fmt: skip
        result.loss.backward()
        return result.loss.detach(), result.log_prob, hidden.grad

    def in_place(terms):
        terms.log_prob.clamp_(min=-0.1)
        return terms.entropy.sub_(1.0)

    for got, expected in zip(outcome(in_place), outcome(lambda t: t.entropy - 1.0), strict=True):
        assert torch.equal(got, expected)


def linear_rows_of(case, backend, chunk_rows, drop_masked=True):
    """The arguments of the operators, with one teacher by hidden states and one by logits."""
    head, teacher_head = case.head, case.teacher_head
    states, teacher_states = case.hidden.flatten(0, -2), case.teacher_hidden.flatten(0, -2)
    logits = teacher_head.logits(teacher_states, torch.float32)[None]
    layers = ([head.weight], head.bias, [teacher_head.weight, None], [teacher_head.bias, None])
    heads = Heads([], *layers, [1.0, 1.3, 1.0], [0.0, 2.0, 0.0])
    rows = Rows(
        states[None],
        [teacher_states, logits],
        [1.0, 0.5],
        token_ids=case.token_ids.flatten(),
        valid=case.valid.flatten(),
        temperature=0.7,
        backend=backend,
    )
    return LinearRows(rows, heads, Chunking(chunk_rows, torch.float32, 0.0, drop_masked))


def gradients_of(problem, *coefficients, **fields):
    """The results of `linear_gradient` for all tensors; `fields` replace some of the rows'."""
    problem = problem._replace(rows=problem.rows._replace(**fields))
    needed = [tensor is not None for tensor in problem.differentiable()]
    unit = torch.ones(())
    return linear_ops.linear_gradient(None, unit, needed, *coefficients, *problem.flat())


# For ten rows `[2, 5]`: one value, one per leading index, one for every two rows, one per row.
every_sharing = pytest.mark.parametrize("elements", [1, 2, 5, 10])
every_cut = pytest.mark.parametrize(
    ("chunk_rows", "drop_masked"), [(None, True), (3, True), (3, False)]
)


@every_sharing
@every_cut
def test_a_temperature_for_each_row(chunk_rows, drop_masked, elements, backend, device):
    case = make_linear(masked=True, device=device)
    problem = linear_rows_of(case, backend, chunk_rows, drop_masked)
    coefficients = (torch.ones(1, device=device), case.upstream.nan_to_num().flatten(), None)
    values = 0.5 + 0.25 * torch.arange(elements, device=device)
    temperatures = values.where(problem.rows.valid, torch.nan) if elements == 10 else values
    got = gradients_of(problem, *coefficients, row_temperature=temperatures)
    for value in values:
        alike = in_runs(values, 10) == value
        temperature = float(value)
        statistics, _, gradient, *_ = gradients_of(problem, *coefficients, temperature=temperature)
        close = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got[0][:, alike], statistics[:, alike], **close)
        torch.testing.assert_close(got[2][0, alike], gradient[0, alike], **close)


@every_sharing
@every_cut
def test_a_coefficient_for_several_rows(chunk_rows, drop_masked, elements, backend, device):
    case = make_linear(bias=True, masked=True, device=device)
    problem = linear_rows_of(case, backend, chunk_rows, drop_masked)
    values = torch.linspace(-1.0, 1.5, elements, device=device)
    got = gradients_of(problem, values, -values, values.square())
    each = in_runs(values, 10)
    expected = gradients_of(problem, each, -each, each.square())
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.native
class TestOperators:
    """Whether PyTorch's checks accept them, and whether they compile."""

    @pytest.mark.parametrize("chunk_rows", [None, 3])
    def test_opcheck(self, chunk_rows, backend, device):
        case = make_linear(bias=True, masked=True, device=device)
        if chunk_rows:  # a weight whose transpose is contiguous
            weight = case.head.weight.T.contiguous().T
            case = replace(case, head=replace(case.head, weight=weight))
        arguments = linear_rows_of(case, backend, chunk_rows).flat()
        torch.library.opcheck(linear_ops.linear_statistics, arguments)
        one, each = torch.ones(1, device=device), torch.ones(10, device=device)
        for statistics in (None, linear_ops.linear_statistics(*arguments)):
            for needed in ([True] * 3, [True, False, False], [False, True, False]):
                leading = (statistics, torch.ones(()), needed, each, one, None)
                torch.library.opcheck(linear_ops.linear_gradient, (*leading, *arguments))

    @pytest.mark.parametrize("kind", ["mean", "none", "function", "terms", "filter"])
    def test_compiles_without_a_break(self, kind, backend, device):
        case = make_linear(masked=True, device=device)

        def compute(hidden, weight, teacher_hidden, teacher_weight):
            teacher = LinearTeacher(teacher_hidden, teacher_weight)
            options = {"mask": case.mask, "backend": backend}
            if kind == "terms":
                terms = linear_token_terms(hidden, weight, teacher, case.token_ids, **options)
                return (terms.divergence + terms.log_prob.square()).sum()
            advantages = factor = case.upstream.nan_to_num()
            if kind == "function":

                def advantages(terms):
                    return terms.entropy * factor

            options |= {"none": {"reduction": "none"}, "filter": {"grad_filter": 1e-6}}.get(
                kind, {}
            )
            loss = linear_hybrid_loss(
                hidden, weight, teacher, case.token_ids, advantages, **options
            ).loss
            return (1.5 * loss).sum()

        torch._dynamo.reset()
        outcomes = []
        for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
            leaves = [t.clone().requires_grad_() for t in (case.hidden, case.head.weight)]
            loss = function(*leaves, case.teacher_hidden, case.teacher_head.weight)
            loss.backward()
            outcomes.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        torch._dynamo.reset()
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-7)

    @pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
    def test_inductor_takes_other_shapes_and_layouts(self, backend, device):
        def compute(hidden, weight, teacher):
            return linear_hybrid_loss(hidden, weight.T, teacher, backend=backend).loss

        torch._dynamo.reset()
        compiled = torch.compile(compute, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        for rows in (5, 6, 7):
            tensors = [
                torch.randn(s, generator=generator) for s in ((rows, 8), (8, 33), (rows, 33))
            ]
            outcomes = []
            for function in (compute, compiled):
                hidden, weight, teacher = (t.clone().to(device) for t in tensors)
                loss = function(hidden.requires_grad_(), weight.requires_grad_(), teacher)
                loss.backward()
                outcomes.append((loss.detach(), hidden.grad, weight.grad))
            torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-7)
        torch._dynamo.reset()
