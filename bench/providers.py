"""The implementations that are measured: all get the same loss and gradient from raw logits.

A provider takes a `Problem` and returns a function that computes the mean loss and its gradient
w.r.t. the student's logits. Adding a peer is one function and one line in `PROVIDERS`.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from hybrid_kernels import Mixture, TopK, reference


def random_options(device: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of torch's random functions, for numbers from a fixed seed (none on "meta")."""
    if device == "meta":
        return {"device": device}
    return {"device": device, "generator": torch.Generator(device).manual_seed(seed)}


class Problem(NamedTuple):
    """Raw logits of both models, and the divergence between them.

    Attributes:
        student: `[N, V]`.
        teacher: `[N, V]`.
        divergence: its name.
        mask: bool `[N]`, the rows that count; None for all.
        top_k: for providers of top-K losses, all that they may know of the teacher.
    """

    student: Tensor
    teacher: Any
    divergence: str
    mask: Tensor | None = None
    top_k: TopK | None = None

    @property
    def loss_scale(self) -> float:
        """Of fp16, as with a GradScaler: it can't hold the gradient of a mean over many rows."""
        return 2.0**16 if self.student.dtype == torch.float16 else 1.0

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        divergence: str,
        device: str = "cpu",
        noise: float = 0.5,
        masked: float = 0.0,
        support: int = 0,
    ) -> "Problem":
        """Random logits from a fixed seed.

        Args:
            shape: N and V.
            dtype: of the logits, whose standard deviation is 2 nats.
            divergence: its name.
            device: where the tensors are.
            noise: standard deviation of the teacher's logits from the student's, in nats.
            masked: the share of rows that don't count.
            support: K of a top-K teacher; 0 for a full one.
        """
        options = random_options(device)
        student = torch.empty(shape, dtype=dtype, device=device)
        teacher = torch.empty_like(student)
        for z, w in zip(student.split(1024), teacher.split(1024), strict=True):
            logits = 2 * torch.randn(z.shape, **options)
            z.copy_(logits)
            w.copy_(logits + noise * torch.randn(z.shape, **options))
        mask = torch.rand(len(student), **options) >= masked if masked else None
        top_k = TopK.from_logits(teacher, support) if support else None
        return cls(student.requires_grad_(), teacher, divergence, mask, top_k)


Run = Callable[[], Tensor]

# The weights of a generalised JSD, by which peers select a divergence.
JSD_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
KL_AND_JSD = tuple(JSD_BETA)


class Provider(NamedTuple):
    """How to run an implementation, what it needs and what it can do.

    Attributes:
        make: takes a `Problem` or a `LinearProblem`, returns a function that computes the gradient.
        needs: the package that must be installed; None for torch alone.
        gpu_only: whether it has no CPU version.
        divergences: the names of those that it computes.
        op: the operation; only providers with the same one compute the same.
        moved: how many tensors of the size of the logits the operation has to read and write.
        is_gradient: whether it returns the gradient of the dense term, which the oracle checks.
    """

    make: Callable[[Any], Run]
    needs: str | None = None
    gpu_only: bool = False
    divergences: tuple[str, ...] = hybrid_kernels.available_divergences()
    op: str = "hybrid_loss"
    moved: int = 3
    is_gradient: bool = True

    def missing(self) -> str | None:
        """Why this machine can't run it; None if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.gpu_only and not torch.cuda.is_available():
            return "it needs a GPU"
        return None


def ours(problem: Problem, *samples: Any, **options: Any) -> Run:
    """`hybrid_loss`; without samples (token ids and advantages) it is the dense term alone."""
    arguments = (problem.student, problem.teacher, *samples)
    options |= {"mask": problem.mask, "divergence": problem.divergence}
    return lambda: _backward(problem, hybrid_kernels.hybrid_loss(*arguments, **options).loss)


def ours_top_k(problem: Problem) -> Run:
    """`hybrid_loss` from K log-probabilities of the teacher, with the tail as a bucket."""
    return ours(problem._replace(teacher=_top_k(problem)))


def _top_k(problem: Problem) -> TopK:
    assert problem.top_k is not None
    return problem.top_k


def select(problem: Problem) -> Run:
    """The choice of the student's K best entries, which precedes a loss on such a support."""
    size = _top_k(problem).ids.shape[-1]
    return lambda: problem.student.detach().topk(size).indices


def ours_two_teachers(problem: Problem) -> Run:
    """`hybrid_loss` from a mixture of two teachers."""
    mixture = Mixture([(1.0, problem.teacher), (0.5, problem.teacher.flip(0))])
    return ours(problem._replace(teacher=mixture))


def ours_hybrid(problem: Problem) -> Run:
    """`hybrid_loss` with the policy-gradient and entropy terms."""
    return ours(problem, *_samples(problem), entropy_weight=0.01)


def ours_callable(problem: Problem) -> Run:
    """`hybrid_loss` with advantages that depend on the fresh statistics: two launches."""
    ids, advantages = _samples(problem)
    return ours(problem, ids, lambda t: advantages * (t.entropy - t.entropy.mean()))


def ours_token_terms(problem: Problem) -> Run:
    """`token_terms`, and a backward with a different upstream gradient for each row."""
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
    """A copy of the student's logits, whose bandwidth is the reference for the others."""
    target = torch.empty_like(problem.teacher)
    return lambda: target.copy_(problem.student.detach())


def add(problem: Problem) -> Run:
    """An addition, which reads and writes as many tensors as a loss and its gradient."""
    target = torch.empty_like(problem.teacher)
    return lambda: torch.add(problem.student.detach(), problem.teacher, out=target)


def read(problem: Problem) -> Run:
    """A sum over the student's logits."""
    return lambda: problem.student.detach().sum(dtype=torch.float32)


def _composition(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """The loss as a user would write it, from log_softmax of both sides in fp32."""
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


def _top_k_composition(student: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """The top-K reverse KL as a careful user would write it, with tails in logarithms."""
    log_p = student.float().log_softmax(-1)
    log_p_tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    log_q_tail = torch.log1p(-log_q.exp().sum(-1))
    log_p = log_p.gather(-1, ids)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (value + log_p_tail.exp() * (log_p_tail - log_q_tail)).mean()


def composed_top_k(problem: Problem, composition: Callable = _top_k_composition) -> Run:
    """The top-K composition in eager torch, or as it is given."""
    arguments = (problem.student, _top_k(problem).ids, _top_k(problem).log_probs)
    return lambda: _backward(problem, composition(*arguments))


def compiled_top_k(problem: Problem) -> Run:
    """The top-K composition under `torch.compile`."""
    return composed_top_k(problem, torch.compile(_top_k_composition, dynamic=False))


def eager_two_teachers(problem: Problem) -> Run:
    """The composition in eager torch, once for each of two teachers."""
    second_teacher = problem.teacher.flip(0)

    def run() -> Tensor:
        first = _composition(problem.student, problem.teacher, problem.divergence)
        second = _composition(problem.student, second_teacher, problem.divergence)
        return _backward(problem, first + 0.5 * second)

    return run


def eager(problem: Problem) -> Run:
    """The composition in eager torch."""
    return lambda: _backward(problem, _composition(*problem[:3]))


def compiled(problem: Problem, mode: str = "default") -> Run:
    """The composition under `torch.compile`."""
    composition = torch.compile(_composition, mode=mode, dynamic=False)
    return lambda: _backward(problem, composition(*problem[:3]))


def speculators(problem: Problem) -> Run:
    """The fused losses of speculators (Apache-2.0), which map raw logits to a loss per token."""
    # Its packages import servers and data sets, which the losses don't need.
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
    """Liger's divergence of log-probabilities, with the log_softmax of both sides."""
    module = importlib.import_module("liger_kernel.transformers.jsd")
    loss = module.LigerJSD(beta=JSD_BETA[problem.divergence])

    def run() -> Tensor:
        log_p = problem.student.log_softmax(-1, dtype=torch.float32)
        log_q = problem.teacher.log_softmax(-1, dtype=torch.float32)
        return _backward(problem, loss(log_p, log_q))

    return run


def _without_init(root: str, *names: str) -> None:
    """Registers packages of an installed distribution without running their `__init__`."""
    root_spec = importlib.util.find_spec(root)
    assert root_spec is not None
    assert root_spec.submodule_search_locations
    for name in (root, *names):
        folder = Path(root_spec.submodule_search_locations[0], *name.split(".")[1:])
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


_COMPOSED = ("reverse_kl", "forward_kl", "jeffreys", "jsd")

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
    "torch eager, top-K": Provider(composed_top_k, divergences=("reverse_kl",)),
    "torch.compile, top-K": Provider(compiled_top_k, divergences=("reverse_kl",)),
    "torch eager, two teachers": Provider(eager_two_teachers, is_gradient=False),
    "torch eager": Provider(eager, divergences=_COMPOSED),
    "torch.compile": Provider(compiled, divergences=_COMPOSED),
    "torch.compile, max-autotune": Provider(
        partial(compiled, mode="max-autotune-no-cudagraphs"), gpu_only=True, divergences=_COMPOSED
    ),
    "speculators 0.9.0": Provider(speculators, "speculators", True, KL_AND_JSD),
    "Liger 0.8.5": Provider(liger, "liger_kernel", True, KL_AND_JSD),
}


def oracle(problem: Problem, rows: Tensor) -> Tensor:
    """The dense gradient of some valid rows in float64, as part of the mean over all valid rows."""
    student = problem.student.detach()[rows].double().requires_grad_()
    count = len(problem.student) if problem.mask is None else problem.mask.sum()
    teacher: Tensor | TopK = problem.teacher[rows].double()
    if problem.top_k is not None:
        teacher = TopK(problem.top_k.ids[rows], problem.top_k.log_probs[rows])
    result = reference.hybrid_loss(
        student, teacher, divergence=problem.divergence, num_tokens=count
    )
    (result.loss * problem.loss_scale).backward()
    assert student.grad is not None
    return student.grad
