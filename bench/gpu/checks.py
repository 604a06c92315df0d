"""Checks on the GPU, in a few seconds, whether kernels of every form are right.

Values and gradients are compared with float64 in the rows that `measure.steady_rows` selects.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from bench.measure import relative_error, rows_in_flight, steady_rows
from bench.providers import random_options
from bench.report import TOLERANCE
from hybrid_kernels import LinearTeacher, Mixture, TopK, reference
from hybrid_kernels.divergences import FAMILIES

KINDS = tuple(name for name, family in FAMILIES.items() if family.resident)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTH = 64  # of the hidden states
VALUE_TOLERANCE = 1e-4


class Check(NamedTuple):
    """One problem: a key of `FORMS`, a divergence, and the dtype and shape of the logits."""

    form: str
    divergence: str
    dtype: torch.dtype
    vocabulary: int
    rows: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form}, {self.divergence}, {dtype}, V={self.vocabulary}, N={self.rows}"


# How each form differs from logits with one teacher, sampled tokens and advantages.
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"sparse": False},
    "hybrid": {"entropy_weight": 0.1},
    "masked": {"masked": True, "entropy_weight": 0.1},
    "two launches": {"callable": True},
    "terms": {"terms": True},
    "floor": {"teacher_floor": -20.0},
    "top-K": {"support": 128},
    "two teachers": {"teachers": 2},
    "no teacher": {"teachers": 0, "dense_weight": 0.0},
    "in place": {"inplace": True},
    "linear": {"linear": True},
}
CHECKS = [
    # The problems of the stage `headline` come first, then each kernel with many rows and with few.
    *(Check("hybrid", d, BF16, v, 704) for v in (151_936, 50_257) for d in KINDS),
    *(Check("hybrid", d, BF16, 1000, 8000) for d in KINDS),
    *(Check("dense", d, BF16, v, 704) for v in (151_936, 32_000) for d in KINDS),
    *(Check("hybrid", d, BF16, v, 48) for v in (151_936, 50_257, 1000) for d in KINDS),
    *(Check("hybrid", d, FP32, v, 704) for v in (151_936, 50_257) for d in KINDS),
    *(Check("two launches", d, BF16, 151_936, 704) for d in KINDS),
    *(Check("terms", d, BF16, 50_257, 48) for d in KINDS),
    *(Check(form, "reverse_kl", BF16, 151_936, 704) for form in FORMS),
    *(Check(form, "reverse_kl", BF16, 50_257, 48) for form in FORMS),
    *(Check("masked", "jsd", BF16, v, 704) for v in (151_936, 50_257)),
    Check("hybrid", "reverse_kl", FP16, 151_936, 704),
    Check("hybrid", "reverse_kl", FP16, 50_257, 48),
    Check("hybrid", "reverse_kl", BF16, 151_936, 1),
    *(Check("hybrid", d, BF16, 50_257, 704) for d in FAMILIES if d not in KINDS),
]
CHECKS = list(dict.fromkeys(CHECKS))


def run(check: Check, device: str) -> dict[str, Any]:
    """The errors of a check, and whether they are small enough for its dtype.

    New memory holds NaN, so that entries that are not written show.
    """
    row = {"form": check.form, "divergence": check.divergence}
    torch.use_deterministic_algorithms(device != "meta", warn_only=True)
    try:
        errors = _errors(check, device)
    finally:
        torch.use_deterministic_algorithms(False)
    if errors is None:
        return {**row, "right": None}
    allowed = TOLERANCE[str(check.dtype).removeprefix("torch.")]
    right = errors["gradient"] <= allowed and errors["values"] <= VALUE_TOLERANCE
    return {**row, "right": right, **errors}


class Inputs(NamedTuple):
    """The arguments of a loss.

    Attributes:
        student: logits `[N, V]`, or hidden states `[N, D]` if there are `weights`.
        weights: `[V, D]` of both models, or None.
        teacher: as the public functions take it; None without one.
        ids, advantages: `[N]`; None for the dense term alone.
        form: a key of `FORMS`.
        divergence: its name.
    """

    student: Tensor
    weights: tuple[Tensor, Tensor] | None
    teacher: Any
    ids: Tensor | None
    advantages: Tensor | None
    form: str
    divergence: str

    @classmethod
    def random(cls, check: Check, device: str) -> "Inputs":
        form, options = FORMS[check.form], random_options(device)
        rows, vocabulary, dtype = check.rows, check.vocabulary, check.dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, **options)

        ids = torch.randint(vocabulary, (rows,), **options)
        weights, count = None, form.get("teachers", 1)
        if "linear" in form:
            student = normal(rows, WIDTH).to(dtype)
            weight = normal(vocabulary, WIDTH) / 4
            weights = (weight.to(dtype), (weight + normal(vocabulary, WIDTH) / 16).to(dtype))
            teacher = LinearTeacher(student, weights[1])
        else:
            logits = 2 * normal(rows, vocabulary)
            student = logits.to(dtype)
            teachers = [(logits + 0.5 * normal(rows, vocabulary)).to(dtype) for _ in range(count)]
            teacher = teachers[0] if teachers else None
            if count == 2:
                teacher = Mixture([(1.0, teachers[0]), (0.5, teachers[1])])
            if size := form.get("support"):
                teacher = TopK.from_logits(teachers[0], size, token_ids=ids)
        if "masked" in form:
            ids[::7] = -100
        sparse = form.get("sparse", True)
        samples = (ids, normal(rows)) if sparse else (None, None)
        return cls(student, weights, teacher, *samples, check.form, check.divergence)

    def rows(self, index: Tensor) -> "Inputs":
        """Some rows in float64, with a linear teacher's logits in place of its hidden states."""

        def rows_of(teacher: Any) -> Any:
            if isinstance(teacher, Mixture):
                return Mixture([(weight, rows_of(member)) for weight, member in teacher.members])
            if isinstance(teacher, TopK):
                log_q = teacher.token_log_prob
                support = (teacher.ids[index], teacher.log_probs[index])
                return TopK(*support, None if log_q is None else log_q[index])
            if isinstance(teacher, LinearTeacher):
                assert isinstance(teacher.weight, Tensor)
                return teacher.hidden[index].double() @ teacher.weight.double().T
            return None if teacher is None else teacher[index].double()

        return self._replace(
            student=self.student[index].double(),
            weights=self.weights and (self.weights[0].double(), self.weights[1].double()),
            teacher=rows_of(self.teacher),
            ids=None if self.ids is None else self.ids[index],
            advantages=None if self.advantages is None else self.advantages[index],
        )

    def _callable_advantages(self, terms: Any) -> Tensor:
        """The same advantages as a function of the statistics, which takes two launches."""
        assert self.advantages is not None
        return self.advantages + 0 * terms.log_prob

    def solve(self, module: Any) -> tuple[Any, Tensor]:
        """The values per token, and the gradient of the sum of all losses w.r.t. `student`.

        `module` is `hybrid_kernels` or `reference`.
        """
        form, specified = FORMS[self.form], module is reference
        leaf = self.student.clone().requires_grad_()
        options: dict[str, Any] = {"divergence": self.divergence}
        logits = leaf if self.weights is None else leaf @ self.weights[0].T if specified else leaf
        advantages: Any = self.advantages
        if "terms" in form:
            values = module.token_terms(logits, self.teacher, self.ids, **options)
            (values.divergence - advantages * values.log_prob).sum().backward()
        else:
            options |= {"reduction": "sum"}
            names = ("entropy_weight", "teacher_floor", "dense_weight")
            options |= {name: form[name] for name in names if name in form}
            if "callable" in form and not specified:
                advantages = self._callable_advantages
            arguments = (self.teacher, self.ids, advantages)
            if "linear" in form and not specified:
                assert self.weights
                values = hybrid_kernels.linear_hybrid_loss(
                    leaf, self.weights[0], *arguments, **options
                )
            else:
                if "inplace" in form and not specified:
                    logits, options["inplace"] = leaf.clone(), True
                values = module.hybrid_loss(logits, *arguments, **options)
            values.loss.backward()
        assert leaf.grad is not None
        return values, leaf.grad


def _errors(check: Check, device: str) -> dict[str, float] | None:
    """The relative L2 error of the gradient, and the largest error of a value v over 1 + |v|."""
    inputs = Inputs.random(check, device)
    values, gradient = inputs.solve(hybrid_kernels)
    index = steady_rows(inputs.student, 1 if inputs.weights else rows_in_flight(inputs.student))
    expected, truth = inputs.rows(index).solve(reference)
    error = relative_error(gradient[index], truth)
    if error is None:
        return None
    if not bool(gradient.isfinite().all()):
        error = torch.inf
    worst = 0.0
    for name in ("divergence", "log_prob", "teacher_log_prob", "entropy"):
        value, exact = getattr(values, name), getattr(expected, name)
        if value is not None:
            exact = exact.detach()
            errors = (value[index].detach().double() - exact).abs() / (1 + exact.abs())
            worst = max(worst, float(errors.nan_to_num(torch.inf).max()))
    return {"gradient": error, "values": worst}
