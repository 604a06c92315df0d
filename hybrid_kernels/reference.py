"""The eager specification: what every backend must compute.

Only VALUES are written here, in the plainest form and in the precision of the inputs (use float64
for an oracle); autograd derives the gradients. Without kernels and closed-form gradients, this file
stays an independent check on the code that has them.
Formulas: arXiv 2512.23097 and, for the Jensen-Shannon convention, arXiv 2306.13649.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.divergences import Divergence
from hybrid_kernels.types import (
    IGNORED_TOKEN,
    HybridLoss,
    Mixture,
    Teacher,
    TokenTerms,
    TopK,
)


def valid_rows(shape: torch.Size, mask: Tensor | None, token_ids: Tensor | None, device) -> Tensor:
    """Bool `[...]`: the rows that count, whose mask is not 0 and whose token id is not -100."""
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        valid = valid & (mask != 0)
    if token_ids is not None:
        valid = valid & (token_ids != IGNORED_TOKEN)
    return valid


def divergence_value(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """D(p, q) per row from log-probabilities `[..., V]`.

    Where one of p and q is 0, a term is its limit as that logarithm falls to -inf, which is +inf
    for p log(p/q) where q = 0 < p. Where both are 0 the term is 0.
    """
    name, parameter = divergence.canonical()
    possible = (log_p != -torch.inf) | (log_q != -torch.inf)
    log_p = torch.where(possible, log_p, -torch.inf)
    log_q = torch.where(possible, log_q, -torch.inf)
    p, q = log_p.exp(), log_q.exp()

    def times(probability: Tensor, value: Tensor) -> Tensor:
        """Their product, which is 0 where the probability is 0, even for an infinite value."""
        positive = ~(probability == 0)  # or NaN
        return torch.where(positive, probability * torch.where(positive, value, 0.0), 0.0)

    def log_mixture(weight: float) -> Tensor:
        """log(weight q + (1 - weight) p)."""
        mixed = torch.logaddexp(
            torch.where(possible, log_q, 0.0) + math.log(weight),
            torch.where(possible, log_p, 0.0) + math.log1p(-weight),
        )
        return torch.where(possible, mixed, -torch.inf)

    if name == "reverse_kl":
        terms = times(p, log_p - log_q)
    elif name == "forward_kl":
        terms = times(q, log_q - log_p)
    elif name == "jeffreys":
        terms = times(p, log_p - log_q) + times(q, log_q - log_p)
    elif name == "jsd":
        log_m = log_mixture(parameter)
        terms = parameter * times(q, log_q - log_m) + (1 - parameter) * times(p, log_p - log_m)
    elif name == "skew_reverse_kl":
        terms = times(p, log_p - log_mixture(1 - parameter))
    elif name == "skew_forward_kl":
        terms = times(q, log_q - log_mixture(parameter))
    elif name in ("alpha", "renyi"):
        tilted = parameter * log_p + (1 - parameter) * log_q
        log_s = torch.where(possible, tilted, -torch.inf).logsumexp(-1)
        if name == "renyi":
            return log_s / (parameter - 1)
        return -torch.expm1(log_s) / (parameter * (1 - parameter))
    elif name == "tv":
        terms = (p - q).abs() / 2
    else:
        raise ValueError(f"divergence: no reference value for {name!r}")
    return terms.sum(-1)


def log_tail_mass(log_probs: Tensor, resolution: float) -> Tensor:
    """log(1 - sum_k exp(log_probs_k)) over the last dimension.

    1 - q_max comes from expm1, so that a tail of 1e-12 is not lost. Where the rest is smaller than
    the rounding error of the log-probabilities, the tail counts as one rounding error of 1: 2^-24,
    or more for 16-bit log-probabilities.
    """
    largest, index = log_probs.max(-1, keepdim=True)
    others = log_probs.exp().scatter(-1, index, 0.0)
    tail = -torch.expm1(largest[..., 0]) - others.sum(-1)
    spread = torch.where(log_probs > -torch.inf, log_probs.exp() * log_probs.abs(), 0.0).sum(-1)
    hidden = max(resolution, 2.0**-24)
    return torch.where(tail <= spread * resolution, hidden, tail).log()


class CoarseLogProbs(NamedTuple):
    """The K+1 categories of a top-K teacher: log p and log q `[..., K + 1]`, the tail last."""

    log_p: Tensor
    log_q: Tensor

    @classmethod
    def of(cls, log_p: Tensor, teacher: TopK, floor: float | None) -> "CoarseLogProbs":
        ids, counts = teacher.ids, distinct(teacher.ids)
        log_q = torch.where(counts, teacher.log_probs.to(log_p.dtype), -torch.inf)
        log_q = torch.cat([log_q, log_tail_mass(log_q, teacher.resolution)[..., None]], -1)
        on_support = torch.where(counts, log_p.gather(-1, ids.clamp(min=0)), -torch.inf)
        outside = torch.ones_like(log_p, dtype=torch.int32)
        outside = outside.scatter_add(-1, ids.clamp(min=0), -counts.to(torch.int32)) > 0
        possible = (outside & (log_p != -torch.inf)).any(-1)
        # The gradient of a logsumexp over -inf alone would be NaN.
        tail = torch.where(outside | ~possible[..., None], log_p, -torch.inf).logsumexp(-1)
        tail = torch.where(possible, tail, -torch.inf)
        # A tail without entries does not count as a category.
        counts = torch.cat([counts, outside.any(-1, keepdim=True)], -1)
        log_p = torch.cat([on_support, tail[..., None]], -1)
        return cls(log_p, torch.where(counts, raised(log_q, log_p, floor), -torch.inf))

    def renormalised(self) -> "CoarseLogProbs":
        log_p, log_q = self.log_p[..., :-1], self.log_q[..., :-1]
        return CoarseLogProbs(log_p - log_p.logsumexp(-1, True), log_q - log_q.logsumexp(-1, True))


def raised(log_q: Tensor, log_p: Tensor, floor: float | None) -> Tensor:
    """log q raised to the floor, except where both sides forbid the entry."""
    if floor is None:
        return log_q
    forbidden = (log_q == -torch.inf) & (log_p == -torch.inf)
    return torch.where(forbidden, log_q, log_q.clamp(min=floor))


def distinct(ids: Tensor) -> Tensor:
    """Bool `[..., K]`: ids that are not padding (-1) and did not occur before."""
    same = ids[..., :, None] == ids[..., None, :]
    return (ids >= 0) & ~same.tril(-1).any(-1)


def members(teacher: Teacher | None) -> list[tuple[float, Teacher]]:
    """A teacher as a list of weighted members."""
    if teacher is None:
        return []
    return list(teacher.members) if isinstance(teacher, Mixture) else [(1.0, teacher)]


class _MemberTerms(NamedTuple):
    """The terms of one member of the teacher, per row."""

    divergence: Tensor
    teacher_log_prob: Tensor | None = None
    correction: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


def _compare(z, teacher, ids, keep, divergence, temperature, floor, tail) -> _MemberTerms:
    """Compares one member; z are the student's logits over the temperature, ids `[..., 1]`."""
    log_p = z.log_softmax(-1)
    if not isinstance(teacher, TopK):
        log_q = (torch.where(keep, teacher, 0.0).to(z.dtype) / temperature).log_softmax(-1)
        value = divergence_value(log_p, raised(log_q, log_p, floor), divergence)
        log_q = log_q if floor is None else log_q.clamp(min=floor)
        return _MemberTerms(value, None if ids is None else log_q.gather(-1, ids)[..., 0])
    valid_ids = torch.arange(teacher.ids.shape[-1], device=z.device) % z.shape[-1]
    teacher = TopK(
        torch.where(keep, teacher.ids, valid_ids),
        torch.where(keep, teacher.log_probs, -50.0),
        teacher.token_log_prob,
    )
    categories = CoarseLogProbs.of(log_p, teacher, floor)
    counts = distinct(teacher.ids)
    raw_mass = torch.where(counts, teacher.log_probs.to(z.dtype), -torch.inf).exp().sum(-1)
    # NaN for a student that is NaN, however little of it lies on the support.
    nothing = 0.0 * log_p.detach().logsumexp(-1)
    masses = categories.log_p[..., :-1].exp().sum(-1).detach() + nothing, raw_mass
    if tail == "renormalize":
        # An empty support, which can't be renormalised, has the value 0.
        has_entries = counts.any(-1)
        finite = (torch.where(has_entries[..., None], x, 0.0) for x in categories)
        value = divergence_value(*CoarseLogProbs(*finite).renormalised(), divergence)
        value = torch.where(has_entries, value, nothing)
    elif tail == "mask":
        # The value of the bucket, with a gradient on the support only.
        inside = torch.zeros_like(z, dtype=torch.int32)
        inside = inside.scatter_add(-1, teacher.ids.clamp(min=0), counts.to(torch.int32)) > 0
        masked = torch.where(inside, z, z.detach()).log_softmax(-1)
        value = divergence_value(*CoarseLogProbs.of(masked, teacher, floor), divergence)
    else:
        value = divergence_value(*categories, divergence)
    if ids is None:
        return _MemberTerms(value, None, None, *masses)
    is_token = (teacher.ids == ids) & counts
    outside = ~is_token.any(-1)
    log_q = torch.where(is_token, categories.log_q[..., :-1], 0.0).sum(-1)
    log_q = log_q if floor is None else log_q.clamp(min=floor)
    elsewhere = torch.full_like(log_q, torch.nan)
    correction = None
    if teacher.token_log_prob is not None:
        elsewhere = teacher.token_log_prob.to(log_q.dtype)
        elsewhere = elsewhere if floor is None else elsewhere.clamp(min=floor)
        if tail == "bucket" and divergence.canonical()[0] == "reverse_kl":
            log_tail = categories.log_p[..., -1]
            correction = log_p.gather(-1, ids)[..., 0] - elsewhere
            correction = (correction - log_tail + categories.log_q[..., -1]).detach()
            correction = torch.where(outside & (log_tail > -torch.inf), correction, 0.0)
    log_q = torch.where(outside, elsewhere, log_q)
    return _MemberTerms(value, log_q, correction, *masses)


def token_terms(
    student_logits: Tensor,
    teacher: Teacher | None = None,
    token_ids: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    divergence: str | Divergence = "reverse_kl",
    temperature: float | Tensor = 1.0,
    tail: str = "bucket",
    teacher_floor: float | None = None,
) -> TokenTerms:
    """`hybrid_kernels.token_terms` in eager torch, with every field differentiable by autograd."""
    options = mask, divergence, temperature, tail, teacher_floor
    return _terms(student_logits, teacher, token_ids, *options)[0]


def _terms(student_logits, teacher, token_ids, mask, divergence, temperature, tail, floor):
    """The `TokenTerms`, and the correction of the advantages or None."""
    if isinstance(divergence, str):
        divergence = Divergence(divergence)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature[..., None]
    valid = valid_rows(student_logits.shape[:-1], mask, token_ids, student_logits.device)
    keep = valid[..., None]
    # Selecting before the arithmetic keeps NaN in masked rows out of both values and gradients.
    z = torch.where(keep, student_logits, 0.0) / temperature
    log_p = z.log_softmax(-1)
    possible = log_p != -torch.inf
    entropy = -torch.where(possible, log_p.exp() * torch.where(possible, log_p, 0.0), 0.0).sum(-1)
    log_prob = None
    ids = None if token_ids is None else torch.where(valid, token_ids, 0)[..., None]
    if ids is not None:
        log_prob = torch.where(valid, log_p.gather(-1, ids)[..., 0], 0.0)
    weights = [weight for weight, _ in members(teacher)]
    member_terms = [
        _compare(z, member, ids, keep, divergence, temperature, floor, tail)
        for _, member in members(teacher)
    ]

    def total(field: str, divisor: float = 1.0) -> Tensor | None:
        """The weighted sum of a field over the members; None where there is none."""
        values = [getattr(terms, field) for terms in member_terms]
        if not values or any(value is None for value in values):
            return None
        value = sum(weight / divisor * x for weight, x in zip(weights, values, strict=True))
        return torch.where(valid, value, 0.0)

    terms = TokenTerms(
        divergence=total("divergence"),
        log_prob=log_prob,
        teacher_log_prob=total("teacher_log_prob", sum(weights)),
        entropy=torch.where(valid, entropy, 0.0),
        # NaN, as everything else is, where a logit is +inf.
        logsumexp=torch.where(valid, z.logsumexp(-1) + 0.0 * entropy, 0.0),
        student_mass=total("student_mass", sum(weights)),
        teacher_mass=total("teacher_mass", sum(weights)),
    )
    correction = total("correction")
    if correction is not None and terms.teacher_log_prob is not None:
        # No correction where log q(y) is unknown for any of the members.
        correction = torch.where(terms.teacher_log_prob.isnan(), 0.0, correction)
    return terms, correction


def hybrid_loss(
    student_logits: Tensor,
    teacher: Teacher | None,
    token_ids: Tensor | None = None,
    advantages: float | Tensor | Callable[[TokenTerms], Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    dense_weight: float | Tensor = 1.0,
    entropy_weight: float | Tensor = 0.0,
    divergence: str | Divergence = "reverse_kl",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    tail: str = "bucket",
    teacher_floor: float | None = None,
) -> HybridLoss:
    """`hybrid_kernels.hybrid_loss` in eager torch.

    The loss of a token is `dense_weight * D(p, q) - advantages * log p(y) - entropy_weight * H(p)`,
    where the advantages include the sampled-tail correction of a top-K teacher.
    """
    options = mask, divergence, temperature, tail, teacher_floor
    terms, correction = _terms(student_logits, teacher, token_ids, *options)
    fields = terms._asdict().items()
    detached = terms._replace(**{name: t.detach() for name, t in fields if t is not None})
    valid = valid_rows(student_logits.shape[:-1], mask, token_ids, student_logits.device)
    loss = torch.zeros_like(terms.entropy)
    if terms.divergence is not None and not _is_zero(dense_weight):
        loss = loss + _weighted(dense_weight, terms.divergence)
    if advantages is not None and terms.log_prob is not None:
        if callable(advantages):
            advantages = advantages(detached)
        if not isinstance(advantages, Tensor):
            advantages = torch.full_like(loss, advantages)
        loss = loss - _weighted(torch.where(valid, advantages, 0.0), terms.log_prob)
    if correction is not None and terms.log_prob is not None:
        loss = loss + _weighted(dense_weight, _weighted(correction, terms.log_prob))
    if not _is_zero(entropy_weight):
        loss = loss - _weighted(entropy_weight, terms.entropy)
    loss = torch.where(valid, loss, 0.0)
    if reduction == "mean":
        count = valid.sum().clamp(min=1) if num_tokens is None else num_tokens
        loss = loss.sum() / count
    elif reduction == "sum":
        loss = loss.sum()
    return HybridLoss(
        loss,
        detached.divergence,
        detached.log_prob,
        detached.teacher_log_prob,
        detached.entropy,
        detached.student_mass,
        detached.teacher_mass,
    )


def _weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 gives 0 even for an infinite value."""
    zero = torch.as_tensor(weight, device=value.device) == 0
    return torch.where(zero, 0.0, weight * torch.where(zero, 0.0, value))


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
