"""Who is measured: every way to get the same loss and gradient from the same raw logits.

A provider takes a `Problem` and returns a function that computes the mean loss and its gradient
w.r.t. the student's logits. Adding a peer is one function and one line in `PROVIDERS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import reference


class Problem(NamedTuple):
    """Raw logits `[N, V]` of both models and the divergence between them."""

    student: Tensor
    teacher: Tensor
    divergence: str

    @classmethod
    def random(
        cls, rows: int, vocabulary: int, dtype: torch.dtype, divergence: str, device: str = "cpu"
    ) -> "Problem":
        """Logits of spread 2 nats whose teacher differs by 0.5 nats, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        student = 2 * torch.randn(rows, vocabulary, generator=generator)
        teacher = student + 0.5 * torch.randn(rows, vocabulary, generator=generator)
        student = student.to(device, dtype).requires_grad_()
        return cls(student, teacher.to(device, dtype), divergence)


Run = Callable[[], Tensor]


def ours(problem: Problem) -> Run:
    """`hybrid_loss`, the dense term alone."""
    return lambda: _backward(
        problem,
        hybrid_kernels.hybrid_loss(
            problem.student, problem.teacher, divergence=problem.divergence
        ).loss,
    )


def ours_hybrid(problem: Problem) -> Run:
    """`hybrid_loss` with the policy-gradient and entropy terms in the same gradient."""
    rows, vocabulary = problem.student.shape
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows,), generator=generator).to(problem.student.device)
    advantages = torch.randn(rows, generator=generator).to(problem.student.device)
    return lambda: _backward(
        problem,
        hybrid_kernels.hybrid_loss(
            problem.student,
            problem.teacher,
            ids,
            advantages,
            entropy_weight=0.01,
            divergence=problem.divergence,
        ).loss,
    )


def _composition(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """What a user writes: log_softmax of both sides in fp32, then the formula, under autograd."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    if divergence == "jeffreys":
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    value = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return 0.5 * value.sum(-1).mean()


def eager(problem: Problem) -> Run:
    """The composition in eager torch."""
    return lambda: _backward(problem, _composition(*problem))


def compiled(problem: Problem) -> Run:
    """The composition under `torch.compile`."""
    composition = torch.compile(_composition)
    return lambda: _backward(problem, composition(*problem))


def _backward(problem: Problem, loss: Tensor) -> Tensor:
    problem.student.grad = None
    loss.backward()
    assert problem.student.grad is not None
    return problem.student.grad


PROVIDERS: dict[str, Callable[[Problem], Run]] = {
    "hybrid_kernels": ours,
    "hybrid_kernels, dense + sparse + entropy": ours_hybrid,
    "torch eager": eager,
    "torch.compile": compiled,
}


def oracle(problem: Problem, rows: int) -> Tensor:
    """The dense gradient of the first rows in float64, scaled as in the mean over all rows."""
    student = problem.student.detach()[:rows].double().requires_grad_()
    result = reference.hybrid_loss(
        student,
        problem.teacher[:rows].double(),
        divergence=problem.divergence,
        num_tokens=problem.student.shape[0],
    )
    result.loss.backward()
    assert student.grad is not None
    return student.grad
