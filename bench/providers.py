"""Who is measured: every way to get the same loss and gradient from the same raw logits.

A provider takes a `Problem` and returns a function that computes the mean loss and its gradient
w.r.t. the student's logits. Adding a peer is one function and one line in `PROVIDERS`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import Mixture, TopK, reference


def random_options(device: str, seed: int = 0) -> dict[str, Any]:
    """What torch's random functions take for numbers from a fixed seed ("meta" has no numbers)."""
    if device == "meta":
        return {"device": device}
    return {"device": device, "generator": torch.Generator(device).manual_seed(seed)}


class Problem(NamedTuple):
    """Raw logits `[N, V]` of both models and the divergence between them. Where `known` is given,
    it is all that anybody knows of the teacher."""

    student: Tensor
    teacher: Any
    divergence: str
    mask: Tensor | None = None
    known: TopK | None = None

    @property
    def loss_scale(self) -> float:
        """As a GradScaler would have it: fp16 can't hold the gradient of a mean over many rows."""
        return 2.0**16 if self.student.dtype == torch.float16 else 1.0

    @classmethod
    def random(
        cls,
        rows: int,
        vocabulary: int,
        dtype: torch.dtype,
        divergence: str,
        device: str = "cpu",
        noise: float = 0.5,
        masked: float = 0.0,
        support: int = 0,
    ) -> "Problem":
        """Logits of spread 2 nats whose teacher differs by `noise` nats, from a fixed seed.

        `masked` is the share of rows that don't count; `support` the K of a top-K teacher, as a
        server returns it.
        """
        options = random_options(device)
        student = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        teacher = torch.empty_like(student)
        for z, w in zip(student.split(1024), teacher.split(1024), strict=True):
            logits = 2 * torch.randn(z.shape, **options)
            z.copy_(logits)
            w.copy_(logits + noise * torch.randn(z.shape, **options))
        mask = torch.rand(rows, **options) >= masked if masked else None
        known = TopK.from_logits(teacher, support) if support else None
        return cls(student.requires_grad_(), teacher, divergence, mask, known)


Run = Callable[[], Tensor]


class Provider(NamedTuple):
    """How to run a peer, what it needs and what it can do.

    Attributes:
        make: `Problem` (or `linear.LinearProblem`) -> function that computes the gradient.
        needs: the package that must be installed; None for torch alone.
        gpu_only: whether it has no CPU version.
        divergences: those that it has.
        op: what it computes.
        moved: logits read and gradients written, in entries per entry, of the fastest such program.
        is_gradient: whether its gradient is that of the dense term, which the oracle checks.
    """

    make: Callable[[Any], Run]
    needs: str | None = None
    gpu_only: bool = False
    divergences: tuple[str, ...] = hybrid_kernels.available_divergences()
    op: str = "hybrid_loss"
    moved: int = 3
    is_gradient: bool = True

    def missing(self) -> str | None:
        """Why this machine can't run it."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.gpu_only and not torch.cuda.is_available():
            return "it needs a GPU"
        return None


def ours(problem: Problem) -> Run:
    """`hybrid_loss`, the dense term alone."""
    return lambda: _backward(
        problem,
        hybrid_kernels.hybrid_loss(
            problem.student, problem.teacher, mask=problem.mask, divergence=problem.divergence
        ).loss,
    )


def ours_top_k(problem: Problem) -> Run:
    """`hybrid_loss` from K log-probabilities of the teacher, with the tail as a bucket."""
    assert problem.known is not None
    problem = problem._replace(teacher=problem.known)
    return ours(problem)


def select(problem: Problem) -> Run:
    """What a support of the student's best entries costs before the loss."""
    assert problem.known is not None
    size = problem.known.ids.shape[-1]
    return lambda: problem.student.detach().topk(size).indices


def ours_two_teachers(problem: Problem) -> Run:
    """`hybrid_loss` from two teachers, whose logits are never averaged in memory."""
    mixture = Mixture([(1.0, problem.teacher), (0.5, problem.teacher.flip(0))])
    return ours(problem._replace(teacher=mixture))


def ours_hybrid(problem: Problem) -> Run:
    """`hybrid_loss` with the policy-gradient and entropy terms in the same gradient."""
    ids, advantages = _samples(problem)
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


def ours_callable(problem: Problem) -> Run:
    """`hybrid_loss` with advantages that depend on the fresh statistics: two launches."""
    ids, advantages = _samples(problem)
    return lambda: _backward(
        problem,
        hybrid_kernels.hybrid_loss(
            problem.student,
            problem.teacher,
            ids,
            lambda terms: advantages * (terms.entropy - terms.entropy.mean()),
            divergence=problem.divergence,
        ).loss,
    )


def ours_token_terms(problem: Problem) -> Run:
    """`token_terms`, and a backward with an upstream gradient of its own for every row."""
    upstream = _samples(problem)[1]
    return lambda: _backward(problem, (_divergences(problem) * upstream).sum())


def ours_statistics(problem: Problem) -> Run:
    """`token_terms` without a gradient: scoring."""
    return torch.no_grad()(lambda: _divergences(problem))


def _divergences(problem: Problem) -> Tensor:
    divergences = hybrid_kernels.token_terms(
        problem.student, problem.teacher, divergence=problem.divergence
    ).divergence
    assert divergences is not None
    return divergences


def copy(problem: Problem) -> Run:
    """A copy of the student's logits: the bandwidth that the others are measured against."""
    target = torch.empty_like(problem.teacher)
    return lambda: target.copy_(problem.student.detach())


def add(problem: Problem) -> Run:
    """Both logits read and one tensor written, as a loss and its gradient have to."""
    target = torch.empty_like(problem.teacher)
    return lambda: torch.add(problem.student.detach(), problem.teacher, out=target)


def read(problem: Problem) -> Run:
    """A sum over the student's logits."""
    return lambda: problem.student.detach().sum(dtype=torch.float32)


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


def _top_k_composition(student: Tensor, known: TopK) -> Tensor:
    """What a careful user writes for the reverse KL: the tail of both sides by logsumexp."""
    log_p = student.float().log_softmax(-1)
    own = log_p.gather(-1, known.ids)
    log_p_tail = log_p.scatter(-1, known.ids, -torch.inf).logsumexp(-1)
    log_q_tail = torch.log1p(-known.log_probs.exp().sum(-1))
    value = (own.exp() * (own - known.log_probs)).sum(-1)
    return (value + log_p_tail.exp() * (log_p_tail - log_q_tail)).mean()


def eager_top_k(problem: Problem) -> Run:
    """The top-K composition in eager torch."""
    assert problem.known is not None
    known = problem.known
    return lambda: _backward(problem, _top_k_composition(problem.student, known))


def compiled_top_k(problem: Problem) -> Run:
    """The top-K composition under `torch.compile`."""
    assert problem.known is not None
    known = problem.known
    # (Not the dataclass, which the compiler would guard.)
    ids, log_probs = known.ids, known.log_probs
    composition = torch.compile(lambda z, i, q: _top_k_composition(z, TopK(i, q)), dynamic=False)
    return lambda: _backward(problem, composition(problem.student, ids, log_probs))


def eager_two_teachers(problem: Problem) -> Run:
    """The composition twice, in eager torch."""
    other = problem.teacher.flip(0)

    def run() -> Tensor:
        first = _composition(problem.student, problem.teacher, problem.divergence)
        second = _composition(problem.student, other, problem.divergence)
        return _backward(problem, first + 0.5 * second)

    return run


def eager(problem: Problem) -> Run:
    """The composition in eager torch."""
    return lambda: _backward(problem, _composition(*problem[:3]))


def compiled(problem: Problem, mode: str = "default") -> Run:
    """The composition under `torch.compile`."""
    composition = torch.compile(_composition, mode=mode, dynamic=False)
    return lambda: _backward(problem, composition(*problem[:3]))


def compiled_autotuned(problem: Problem) -> Run:
    return compiled(problem, "max-autotune-no-cudagraphs")


def speculators(problem: Problem) -> Run:
    """The fused losses of speculators (Apache-2.0): raw logits in, per token out."""
    # Its packages import servers and data sets; the losses need none of them.
    _without_init("speculators", "speculators.losses", "speculators.utils")
    fused = importlib.import_module("speculators.losses.fused")
    functions = {
        "reverse_kl": fused.fused_reverse_kl_div_loss,
        "forward_kl": fused.fused_kl_div_loss,
        "jsd": fused.fused_js_div_loss,
    }
    loss = functions[problem.divergence]
    return lambda: _backward(problem, loss(problem.student[None], problem.teacher[None]).mean())


def liger(problem: Problem) -> Run:
    """Liger's divergence of log-probabilities, both log_softmax included."""
    module = importlib.import_module("liger_kernel.transformers.jsd")
    beta = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}[problem.divergence]
    loss = module.LigerJSD(beta=beta)

    def run() -> Tensor:
        log_p = problem.student.log_softmax(-1, dtype=torch.float32)
        log_q = problem.teacher.log_softmax(-1, dtype=torch.float32)
        return _backward(problem, loss(log_p, log_q))

    return run


def _without_init(root: str, *names: str) -> None:
    """Registers packages of an installed distribution without running their `__init__`."""
    found = importlib.util.find_spec(root)
    assert found is not None
    assert found.submodule_search_locations
    for name in (root, *names):
        folder = Path(found.submodule_search_locations[0], *name.split(".")[1:])
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules.setdefault(name, importlib.util.module_from_spec(spec))


def _samples(problem: Problem) -> tuple[Tensor, Tensor]:
    """Sampled tokens and their advantages."""
    rows, vocabulary = problem.student.shape
    options = random_options(problem.student.device.type, 1)
    return torch.randint(vocabulary, (rows,), **options), torch.randn(rows, **options)


def _backward(problem: Problem, loss: Tensor) -> Tensor:
    problem.student.grad = None
    (loss if problem.loss_scale == 1 else loss * problem.loss_scale).backward()
    assert problem.student.grad is not None
    return problem.student.grad


_WRITTEN = ("reverse_kl", "forward_kl", "jeffreys", "jsd")
_KL_AND_JSD = ("reverse_kl", "forward_kl", "jsd")

PROVIDERS: dict[str, Provider] = {
    "copy": Provider(copy, op="copy", moved=2, is_gradient=False),
    "add": Provider(add, op="add", is_gradient=False),
    "read": Provider(read, op="read", moved=1, is_gradient=False),
    "hybrid_kernels": Provider(ours),
    "hybrid_kernels, dense + sparse + entropy": Provider(ours_hybrid, is_gradient=False),
    "hybrid_kernels, callable advantages": Provider(ours_callable, is_gradient=False),
    "hybrid_kernels token_terms": Provider(ours_token_terms, op="token_terms", is_gradient=False),
    "hybrid_kernels scoring": Provider(
        ours_statistics, op="token_terms, no gradient", moved=2, is_gradient=False
    ),
    "hybrid_kernels, top-K": Provider(ours_top_k, moved=2),
    "torch.topk": Provider(select, op="support selection", moved=1, is_gradient=False),
    "hybrid_kernels, two teachers": Provider(ours_two_teachers, moved=4, is_gradient=False),
    "torch eager, top-K": Provider(eager_top_k, divergences=("reverse_kl",)),
    "torch.compile, top-K": Provider(compiled_top_k, divergences=("reverse_kl",)),
    "torch eager, two teachers": Provider(eager_two_teachers, is_gradient=False),
    "torch eager": Provider(eager, divergences=_WRITTEN),
    "torch.compile": Provider(compiled, divergences=_WRITTEN),
    "torch.compile, max-autotune": Provider(
        compiled_autotuned, gpu_only=True, divergences=_WRITTEN
    ),
    "speculators 0.9.0": Provider(speculators, "speculators", True, _KL_AND_JSD),
    "Liger 0.8.5": Provider(liger, "liger_kernel", True, _KL_AND_JSD),
}


def oracle(problem: Problem, rows: Tensor) -> Tensor:
    """The dense gradient of some valid rows in float64, scaled as in the mean over all of them."""
    student = problem.student.detach()[rows].double().requires_grad_()
    count = len(problem.student) if problem.mask is None else problem.mask.sum()
    teacher: Tensor | TopK = problem.teacher[rows].double()
    if problem.known is not None:
        teacher = TopK(problem.known.ids[rows], problem.known.log_probs[rows])
    result = reference.hybrid_loss(
        student,
        teacher,
        divergence=problem.divergence,
        num_tokens=count,
    )
    (result.loss * problem.loss_scale).backward()
    assert student.grad is not None
    return student.grad
