"""Who is measured from hidden states: as `providers.py`, with the GEMMs of the output layers.

A provider takes a `LinearProblem` and returns a function that computes the mean loss and its
gradient w.r.t. the student's hidden states and weight. What all are measured against is the time of
the four GEMMs alone.
"""

import contextlib
import importlib
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hybrid_kernels
from bench.providers import Provider, Run, _composition, _without_init, random_options
from hybrid_kernels import LinearTeacher, reference

TERMS = "dense + sparse"


class LinearProblem(NamedTuple):
    """Hidden states `[N, D]` and weights `[V, D]` of both models; samples and their advantages."""

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
        """Logits of spread 2 nats whose teacher differs by `noise` nats, from a fixed seed."""
        options = random_options(device)
        hidden = torch.randn(rows, size, **options).to(dtype)
        weight = torch.empty(vocabulary, size, dtype=dtype, device=device)
        other = torch.empty_like(weight)
        for w, t in zip(weight.split(8192), other.split(8192), strict=True):
            own = torch.randn(w.shape, **options) * (2 / size**0.5)
            w.copy_(own)
            t.copy_(own + torch.randn(w.shape, **options) * (noise / size**0.5))
        ids = torch.randint(vocabulary, (rows,), **options)
        advantages = torch.randn(rows, **options)
        teacher = LinearTeacher(hidden.clone(), other)
        leaves = (hidden.requires_grad_(), weight.requires_grad_())
        return cls(*leaves, teacher, ids, advantages, divergence)

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients that every provider has to leave behind."""
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.element_size()


def _backward(problem: LinearProblem, loss: Tensor) -> Tensor:
    problem.hidden.grad = problem.weight.grad = None
    loss.backward()
    assert problem.hidden.grad is not None
    return problem.hidden.grad


def gemms(problem: LinearProblem) -> Run:
    """The four GEMMs alone, of the inputs' dtype: what nobody can do without."""
    teacher, weight = problem.teacher, problem.weight.detach()
    assert isinstance(teacher.weight, Tensor)
    theirs = teacher.weight

    def run() -> Tensor:
        hidden = problem.hidden.detach()
        logits = hidden @ weight.T
        torch.mm(teacher.hidden, theirs.T)
        gradient = logits @ weight
        torch.mm(logits.T, hidden)
        return gradient

    return run


def _ours(problem: LinearProblem, sparse: bool, **options) -> Run:
    ids = problem.token_ids if sparse else None
    advantages = problem.advantages if sparse else None
    options = {"divergence": problem.divergence, "advantages": advantages, **options}
    return lambda: _backward(
        problem,
        hybrid_kernels.linear_hybrid_loss(
            problem.hidden, problem.weight, problem.teacher, ids, **options
        ).loss,
    )


def ours(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss`, the dense term alone."""
    return _ours(problem, sparse=False)


def ours_hybrid(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with the policy gradient."""
    return _ours(problem, sparse=True)


def ours_in_chunks(rows: int):
    """`linear_hybrid_loss` with chunks of some rows."""
    return lambda problem: _ours(problem, sparse=True, chunk_rows=rows)


def ours_16_bit(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with logits rounded to bf16."""
    return _ours(problem, sparse=True, logits_dtype=torch.bfloat16)


def ours_16_bit_dense(problem: LinearProblem) -> Run:
    """The dense term alone with logits rounded to bf16."""
    return _ours(problem, sparse=False, logits_dtype=torch.bfloat16)


def ours_callable(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with advantages that depend on the fresh statistics: six GEMMs."""
    own = problem.advantages
    return _ours(problem, True, advantages=lambda t: own * (t.entropy - t.entropy.mean()))


def ours_frozen(problem: LinearProblem) -> Run:
    """`linear_hybrid_loss` with a frozen weight: three GEMMs."""
    return _ours(problem._replace(weight=problem.weight.detach()), sparse=True)


def ours_scoring(problem: LinearProblem) -> Run:
    """`linear_token_terms` without a gradient: two GEMMs."""

    def run() -> Tensor:
        terms = hybrid_kernels.linear_token_terms(
            problem.hidden, problem.weight, problem.teacher, problem.token_ids
        )
        assert terms.divergence is not None
        return terms.divergence

    return torch.no_grad()(run)


def _dense_and_sparse(problem: LinearProblem, sparse: bool) -> Tensor:
    """What a user writes from whole logits."""
    logits = (problem.hidden @ problem.weight.T).float()
    with torch.no_grad():
        assert isinstance(problem.teacher.weight, Tensor)
        theirs = (problem.teacher.hidden @ problem.teacher.weight.T).float()
    dense = _composition(logits, theirs, problem.divergence)
    if not sparse:
        return dense
    log_prob = logits.log_softmax(-1).gather(-1, problem.token_ids[:, None])[:, 0]
    return dense - (problem.advantages * log_prob).mean()


def eager(problem: LinearProblem) -> Run:
    """The composition in eager torch, from whole logits."""
    return lambda: _backward(problem, _dense_and_sparse(problem, sparse=True))


def eager_dense(problem: LinearProblem) -> Run:
    """The dense term alone."""
    return lambda: _backward(problem, _dense_and_sparse(problem, sparse=False))


def _trl_kernels() -> tuple:
    """TRL's kernels alone: of its trainers, which import data-set libraries, they need a function,
    for DeepSpeed."""
    _without_init("trl", "trl.kernels", "trl.trainer")
    stub = types.ModuleType("trl.trainer.utils")
    vars(stub)["maybe_gather_lm_head_ctx"] = lambda *weights: contextlib.nullcontext()
    sys.modules.setdefault("trl.trainer.utils", stub)
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    log_prob = importlib.import_module("trl.kernels.chunked_logprob")
    return divergence.ChunkedDivergenceFunction, log_prob.ChunkedLogProbFunction


def _trl_divergence(problem: LinearProblem) -> Tensor:
    beta = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}[problem.divergence]
    teacher = problem.teacher
    function, _ = _trl_kernels()
    sides = (problem.hidden, problem.weight, None, teacher.hidden, teacher.weight, None)
    return function.apply(*sides, beta)[0].mean()


def trl(problem: LinearProblem) -> Run:
    """TRL's chunked divergence and its chunked log-prob, the two that one step needs."""
    _, log_prob = _trl_kernels()

    def run() -> Tensor:
        dense = _trl_divergence(problem)
        arguments = (problem.hidden, problem.weight, None, problem.token_ids, 1.0, 32768)
        own = log_prob.apply(*arguments, None, 1.0, ())[0]
        return _backward(problem, dense - (problem.advantages * own).mean())

    return run


def trl_divergence(problem: LinearProblem) -> Run:
    """TRL's chunked divergence alone."""
    return lambda: _backward(problem, _trl_divergence(problem))


def liger_chunked(chunk_size: int):
    """Liger's chunked distillation loss, soft part alone."""

    def make(problem: LinearProblem) -> Run:
        module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
        beta = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}[problem.divergence]
        loss = module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, chunk_size=chunk_size
        )
        teacher = problem.teacher
        sides = (problem.hidden, problem.weight, teacher.hidden, teacher.weight)
        return lambda: _backward(problem, loss(*sides, problem.token_ids))

    return make


def orda(problem: LinearProblem) -> Run:
    """orda-kernel's fused linear distillation, KL alone."""
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
_KL_AND_JSD = ("reverse_kl", "forward_kl", "jsd")
_ALONE: dict[str, Any] = {"op": "dense"}
_SPECIAL: dict[str, Any] = {"op": TERMS, "is_gradient": False}

LINEAR_PROVIDERS: dict[str, Provider] = {
    "four GEMMs alone": Provider(gemms, op="gemms", is_gradient=False),
    "hybrid_kernels, dense + sparse": Provider(ours_hybrid, op=TERMS),
    "hybrid_kernels, dense": Provider(ours, **_ALONE),
    "hybrid_kernels, callable advantages": Provider(ours_callable, **_SPECIAL),
    "hybrid_kernels, frozen weight": Provider(ours_frozen, op=TERMS),
    "hybrid_kernels, bf16 logits": Provider(ours_16_bit, op=TERMS),
    "hybrid_kernels, dense, bf16 logits": Provider(ours_16_bit_dense, **_ALONE),
    "hybrid_kernels, scoring": Provider(ours_scoring, op="no gradient", is_gradient=False),
    **{
        f"hybrid_kernels, chunks of {rows}": Provider(ours_in_chunks(rows), op=TERMS)
        for rows in (512, 1024, 2048, 4096)
    },
    "torch eager": Provider(eager, op=TERMS, divergences=_KL_AND_JSD),
    "torch eager, dense": Provider(eager_dense, divergences=_KL_AND_JSD, **_ALONE),
    "TRL 1.16, divergence + log-prob": Provider(trl, "trl", op=TERMS, divergences=_KL_AND_JSD),
    "TRL 1.16, divergence": Provider(trl_divergence, "trl", divergences=_KL_AND_JSD, **_ALONE),
    **{
        f"Liger 0.8.5 chunked, {rows} rows": Provider(
            liger_chunked(rows), "liger_kernel", True, _KL_AND_JSD, **_ALONE
        )
        for rows in (1024, 4096)
    },
    "fla-core 0.6.0": Provider(fla, "fla", True, ("forward_kl",), **_ALONE),
    # Last, for it compiles many variants.
    "orda-kernel 0.1.0": Provider(orda, "orda_kernel", True, _KL, **_ALONE),
}


def linear_oracle(problem: LinearProblem, rows: Tensor, sparse: bool) -> Tensor:
    """The gradient of some rows' hidden states in float64, scaled as in the mean over all."""
    own = LinearTeacher(problem.teacher.hidden[rows], problem.teacher.weight)
    assert isinstance(own.weight, Tensor)
    hidden = problem.hidden.detach()[rows].double().requires_grad_()
    logits = hidden @ problem.weight.detach().double().T
    theirs = own.hidden.double() @ own.weight.double().T
    result = reference.hybrid_loss(
        logits,
        theirs,
        problem.token_ids[rows],
        problem.advantages[rows].double() if sparse else None,
        divergence=problem.divergence,
        num_tokens=len(problem.hidden),
    )
    result.loss.backward()
    assert hidden.grad is not None
    return hidden.grad
