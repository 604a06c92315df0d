"""Right or wrong: kernels of every form against float64 on the GPU, in a few seconds.

Of each problem those rows are compared that differ in how a kernel comes to them
(`measure.steady_rows`).
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
    """One problem, and the form in which it is put to the kernels."""

    form: str
    divergence: str
    dtype: torch.dtype
    vocabulary: int
    rows: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form}, {self.divergence}, {dtype}, V={self.vocabulary}, N={self.rows}"


# What is given in each form, beside logits and sampled tokens.
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
    # What the headline is about comes first, and every kernel with many rows and with few.
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
    """Errors of a check, and whether they are those of its dtype. New memory holds NaN, so that an
    entry that is not written shows."""
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


class Problem(NamedTuple):
    """What is given.

    Attributes:
        student: `[N, V]` logits; `[N, D]` hidden states where there are `weights`.
        weights: `[V, D]` of both models, or None.
        teacher: in any form; None where there is none.
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
    def random(cls, check: Check, device: str) -> "Problem":
        form, options = FORMS[check.form], random_options(device)
        rows, vocabulary, dtype = check.rows, check.vocabulary, check.dtype

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, **options)

        ids = torch.randint(vocabulary, (rows,), **options)
        weights, count = None, form.get("teachers", 1)
        if "linear" in form:
            student = normal(rows, WIDTH).to(dtype)
            own = normal(vocabulary, WIDTH) / 4
            weights = (own.to(dtype), (own + normal(vocabulary, WIDTH) / 16).to(dtype))
            teacher = LinearTeacher(student, weights[1])
        else:
            logits = 2 * normal(rows, vocabulary)
            student = logits.to(dtype)
            others = [(logits + 0.5 * normal(rows, vocabulary)).to(dtype) for _ in range(count)]
            teacher = others[0] if others else None
            if count == 2:
                teacher = Mixture([(1.0, others[0]), (0.5, others[1])])
            if size := form.get("support"):
                teacher = TopK.from_logits(others[0], size, token_ids=ids)
        if "masked" in form:
            ids[::7] = -100
        sparse = form.get("sparse", True)
        given = (ids, normal(rows)) if sparse else (None, None)
        return cls(student, weights, teacher, *given, check.form, check.divergence)

    def rows(self, index: Tensor) -> "Problem":
        """Some rows in float64; from hidden states as what their logits are made of."""

        def of(teacher: Any) -> Any:
            if isinstance(teacher, Mixture):
                return Mixture([(weight, of(one)) for weight, one in teacher.members])
            if isinstance(teacher, TopK):
                known = teacher.token_log_prob
                own = (teacher.ids[index], teacher.log_probs[index])
                return TopK(*own, None if known is None else known[index])
            if isinstance(teacher, LinearTeacher):
                assert isinstance(teacher.weight, Tensor)
                return teacher.hidden[index].double() @ teacher.weight.double().T
            return None if teacher is None else teacher[index].double()

        own = self.student[index].double(), of(self.teacher)
        weights = self.weights and (self.weights[0].double(), self.weights[1].double())
        ids, advantages = (None if t is None else t[index] for t in (self.ids, self.advantages))
        return self._replace(
            student=own[0], weights=weights, teacher=own[1], ids=ids, advantages=advantages
        )

    def _of_the_statistics(self, terms: Any) -> Tensor:
        """The same advantages, asked for between the two launches."""
        assert self.advantages is not None
        return self.advantages + 0 * terms.log_prob

    def solve(self, module: Any) -> tuple[Any, Tensor]:
        """The values per token, and the gradient of the sum of all losses w.r.t. `student`."""
        form, specified = FORMS[self.form], module is reference
        leaf = self.student.clone().requires_grad_()
        options: dict[str, Any] = {"divergence": self.divergence}
        logits = leaf if self.weights is None else leaf @ self.weights[0].T if specified else leaf
        advantages: Any = self.advantages
        if "terms" in form:
            found = module.token_terms(logits, self.teacher, self.ids, **options)
            (found.divergence - advantages * found.log_prob).sum().backward()
        else:
            options |= {"reduction": "sum"}
            names = ("entropy_weight", "teacher_floor", "dense_weight")
            options |= {name: form[name] for name in names if name in form}
            if "callable" in form and not specified:
                advantages = self._of_the_statistics
            arguments = (self.teacher, self.ids, advantages)
            if "linear" in form and not specified:
                assert self.weights
                found = hybrid_kernels.linear_hybrid_loss(
                    leaf, self.weights[0], *arguments, **options
                )
            else:
                if "inplace" in form and not specified:
                    logits, options["inplace"] = leaf.clone(), True
                found = module.hybrid_loss(logits, *arguments, **options)
            found.loss.backward()
        assert leaf.grad is not None
        return found, leaf.grad


def _errors(check: Check, device: str) -> dict[str, float] | None:
    """Of the gradient, relative, L2; and the largest of a value, relative to 1 + its size."""
    problem = Problem.random(check, device)
    values, gradient = problem.solve(hybrid_kernels)
    index = steady_rows(problem.student, 1 if problem.weights else rows_in_flight(problem.student))
    expected, truth = problem.rows(index).solve(reference)
    error = relative_error(gradient[index], truth)
    if error is None:
        return None
    if not bool(gradient.isfinite().all()):
        error = torch.inf
    worst = 0.0
    for name in ("divergence", "log_prob", "teacher_log_prob", "entropy"):
        got, wanted = getattr(values, name), getattr(expected, name)
        if got is not None:
            wanted = wanted.detach()
            off = (got[index].detach().double() - wanted).abs() / (1 + wanted.abs())
            worst = max(worst, float(off.nan_to_num(torch.inf).max()))
    return {"gradient": error, "values": worst}
