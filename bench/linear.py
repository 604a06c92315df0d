"""The implementations that are measured from hidden states, with the GEMMs of the output layers.

A provider takes a `LinearProblem` and returns a function that computes the mean loss and its
gradient w.r.t. the student's hidden states and weight. Its time is compared with that of the four
GEMMs alone.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from bench.providers import (
    JSD_BETA,
    KL_AND_JSD,
    Provider,
    Run,
    _composition,
    _without_init,
    random_options,
)
from hybrid_kernels import LinearTeacher, reference

# The operation that includes the policy gradient.
TERMS = "dense + sparse"
Make = Callable[["LinearProblem"], Run]


class LinearProblem(NamedTuple):
    """Hidden states `[N, D]` and weights `[V, D]` of both models, sampled tokens, advantages."""

    hidden: Tensor
    weight: Tensor
    teacher: LinearTeacher
    token_ids: Tensor
    advantages: Tensor
    divergence: str

    @classmethod
    def random(
        cls,
        rows: int,
        vocabulary: int,
        size: int,
        dtype: torch.dtype,
        divergence: str,
        device: str = "cpu",
        noise: float = 0.5,
    ) -> "LinearProblem":
        """Random models from a fixed seed.

        The student's logits have a standard deviation of 2 nats, and those of the teacher differ
        from them by `noise` nats.
        """
        options = random_options(device)
        hidden = torch.randn(rows, size, **options).to(dtype)
        weight = torch.empty(vocabulary, size, dtype=dtype, device=device)
        teacher_weight = torch.empty_like(weight)
        for w, t in zip(weight.split(8192), teacher_weight.split(8192), strict=True):
            exact = torch.randn(w.shape, **options) * (2 / size**0.5)
            w.copy_(exact)
            t.copy_(exact + torch.randn(w.shape, **options) * (noise / size**0.5))
        ids = torch.randint(vocabulary, (rows,), **options)
        advantages = torch.randn(rows, **options)
        teacher = LinearTeacher(hidden.clone(), teacher_weight)
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        return cls(*leaves, teacher, ids, advantages, divergence)

    def teacher_logits(self) -> Tensor:
        assert isinstance(self.teacher.weight, Tensor)
        return self.teacher.hidden @ self.teacher.weight.T


def _backward(problem: LinearProblem, loss: Tensor) -> Tensor:
    problem.hidden.grad = problem.weight.grad = None
    loss.backward()
    assert problem.hidden.grad is not None
    return problem.hidden.grad


def gemms(problem: LinearProblem) -> Run:
    """The four GEMMs alone, in the inputs' dtype; every implementation needs them."""
    weight = problem.weight.detach()

    def run() -> Tensor:
        hidden = problem.hidden.detach()
        logits = hidden @ weight.T
        problem.teacher_logits()
        gradient = logits @ weight
        torch.mm(logits.T, hidden)
        return gradient

    return run


def ours(sparse: bool = True, **options) -> Make:
    """`linear_hybrid_loss`, with the policy gradient if `sparse`."""

    def make(problem: LinearProblem) -> Run:
        ids, advantages = (problem.token_ids, problem.advantages) if sparse else (None, None)
        arguments = {"divergence": problem.divergence, "advantages": advantages, **options}
        return lambda: _backward(
            problem, hybrid_kernels.linear_hybrid_loss(*problem[:3], ids, **arguments).loss
        )

    return make


def ours_callable(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with advantages that depend on the fresh statistics, in six GEMMs."""
    advantages = problem.advantages
    return ours(advantages=lambda t: advantages * (t.entropy - t.entropy.mean()))(problem)


def ours_frozen(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with a frozen weight, in three GEMMs."""
    return ours()(problem._replace(weight=problem.weight.detach()))


def ours_scoring(problem: LinearProblem) -> Run:
    """`linear_token_terms` without a gradient, in two GEMMs."""

    def run() -> Tensor:
        terms = hybrid_kernels.linear_token_terms(*problem[:4])
        assert terms.divergence is not None
        return terms.divergence

    return torch.no_grad()(run)


def eager(sparse: bool) -> Make:
    """The loss as a user would write it; with the policy gradient if `sparse`."""

    def loss(problem: LinearProblem) -> Tensor:
        logits = (problem.hidden @ problem.weight.T).float()
        with torch.no_grad():
            teacher_logits = problem.teacher_logits().float()
        dense = _composition(logits, teacher_logits, problem.divergence)
        if not sparse:
            return dense
        log_prob = logits.log_softmax(-1).gather(-1, problem.token_ids[:, None])[:, 0]
        return dense - (problem.advantages * log_prob).mean()

    return lambda problem: lambda: _backward(problem, loss(problem))


def _trl_kernels() -> tuple:
    """TRL's kernels without its trainers, which import data-set libraries.

    The kernels need one function from there, which does something under DeepSpeed only.
    """
    _without_init("trl", "trl.kernels", "trl.trainer")
    stub = types.ModuleType("trl.trainer.utils")
    vars(stub)["maybe_gather_lm_head_ctx"] = lambda *weights: contextlib.nullcontext()
    sys.modules.setdefault("trl.trainer.utils", stub)
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    log_prob = importlib.import_module("trl.kernels.chunked_logprob")
    return divergence.ChunkedDivergenceFunction, log_prob.ChunkedLogProbFunction


def _trl_divergence(problem: LinearProblem) -> Tensor:
    teacher = problem.teacher
    function, _ = _trl_kernels()
    sides = (problem.hidden, problem.weight, None, teacher.hidden, teacher.weight, None)
    return function.apply(*sides, JSD_BETA[problem.divergence])[0].mean()


def trl(problem: LinearProblem) -> Run:
    """TRL's chunked divergence and its chunked log-prob; a training step needs both."""
    _, function = _trl_kernels()

    def run() -> Tensor:
        dense = _trl_divergence(problem)
        arguments = (problem.hidden, problem.weight, None, problem.token_ids, 1.0, 32768)
        log_prob = function.apply(*arguments, None, 1.0, ())[0]
        return _backward(problem, dense - (problem.advantages * log_prob).mean())

    return run


def trl_divergence(problem: LinearProblem) -> Run:
    """TRL's chunked divergence alone."""
    return lambda: _backward(problem, _trl_divergence(problem))


def liger_chunked(chunk_size: int) -> Make:
    """Liger's chunked distillation loss without its hard part."""

    def make(problem: LinearProblem) -> Run:
        module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
        options = {"beta": JSD_BETA[problem.divergence], "chunk_size": chunk_size}
        loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
        teacher = problem.teacher
        sides = (problem.hidden, problem.weight, teacher.hidden, teacher.weight)
        return lambda: _backward(problem, loss(*sides, problem.token_ids))

    return make


def orda(problem: LinearProblem) -> Run:
    """orda-kernel's fused linear distillation without its cross-entropy."""
    module = importlib.import_module("orda_kernel")
    names = {"reverse_kl": "reverse", "forward_kl": "forward"}
    teacher = module.SeparateTeacher(problem.teacher.hidden, problem.teacher.weight)
    options: dict[str, Any] = {"student_ce_weight": 0.0, "kl_weight": 1.0}
    options["kl_divergence"] = names[problem.divergence]
    return lambda: _backward(
        problem,
        module.distillation_loss(
            problem.hidden, problem.weight, problem.token_ids, teacher, **options
        ).loss,
    )


def fla(problem: LinearProblem) -> Run:
    """fla's fused linear KL(teacher || student)."""
    module = importlib.import_module("fla.modules.fused_kl_div")
    teacher = problem.teacher
    sides = (problem.hidden, teacher.hidden, problem.weight, teacher.weight)
    return lambda: _backward(problem, module.fused_kl_div_loss(*sides))


_KL = ("reverse_kl", "forward_kl")
_ALONE: dict[str, Any] = {"op": "dense"}
_SPECIAL: dict[str, Any] = {"op": TERMS, "is_gradient": False}

LINEAR_PROVIDERS: dict[str, Provider] = {
    "four GEMMs alone": Provider(gemms, op="gemms", is_gradient=False),
    "hybrid_kernels, dense + sparse": Provider(ours(), op=TERMS),
    "hybrid_kernels, dense": Provider(ours(sparse=False), **_ALONE),
    "hybrid_kernels, callable advantages": Provider(ours_callable, **_SPECIAL),
    "hybrid_kernels, frozen weight": Provider(ours_frozen, op=TERMS),
    "hybrid_kernels, bf16 logits": Provider(ours(logits_dtype=torch.bfloat16), op=TERMS),
    "hybrid_kernels, dense, bf16 logits": Provider(
        ours(sparse=False, logits_dtype=torch.bfloat16), **_ALONE
    ),
    "hybrid_kernels, scoring": Provider(ours_scoring, op="no gradient", is_gradient=False),
    **{
        f"hybrid_kernels, chunks of {rows}": Provider(ours(chunk_rows=rows), op=TERMS)
        for rows in (512, 1024, 2048, 4096)
    },
    "torch eager": Provider(eager(sparse=True), op=TERMS, divergences=KL_AND_JSD),
    "torch eager, dense": Provider(eager(sparse=False), divergences=KL_AND_JSD, **_ALONE),
    "TRL 1.16, divergence + log-prob": Provider(trl, "trl", op=TERMS, divergences=KL_AND_JSD),
    "TRL 1.16, divergence": Provider(trl_divergence, "trl", divergences=KL_AND_JSD, **_ALONE),
    **{
        f"Liger 0.8.5 chunked, {rows} rows": Provider(
            liger_chunked(rows), "liger_kernel", True, KL_AND_JSD, **_ALONE
        )
        for rows in (1024, 4096)
    },
    "fla-core 0.6.0": Provider(fla, "fla", True, ("forward_kl",), **_ALONE),
    # It compiles many variants, so it comes last.
    "orda-kernel 0.1.0": Provider(orda, "orda_kernel", True, _KL, **_ALONE),
}


def linear_oracle(problem: LinearProblem, rows: Tensor, sparse: bool) -> Tensor:
    """The gradient of some rows' hidden states in float64, as part of the mean over all rows."""
    teacher = problem.teacher
    assert isinstance(teacher.weight, Tensor)
    hidden = problem.hidden.detach()[rows].double().requires_grad_()
    result = reference.hybrid_loss(
        hidden @ problem.weight.detach().double().T,
        teacher.hidden[rows].double() @ teacher.weight.double().T,
        problem.token_ids[rows],
        problem.advantages[rows].double() if sparse else None,
        divergence=problem.divergence,
        num_tokens=len(problem.hidden),
    )
    result.loss.backward()
    assert hidden.grad is not None
    return hidden.grad
