"""The eager specification: what every backend must compute.

Only VALUES are written here, in the plainest form and in whatever precision the inputs have (use
float64 for an oracle); autograd derives the gradients. No kernel and no closed-form gradient
appears, so that this file stays an independent check on those that have them.
Formulas: arXiv 2512.23097 and, for the Jensen-Shannon convention, arXiv 2306.13649.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_kernels.types import IGNORED_TOKEN, Divergence, HybridLoss, TokenTerms


def valid_rows(shape: torch.Size, mask: Tensor | None, token_ids: Tensor | None, device) -> Tensor:
    """Bool `[...]`: rows that count. A row is out if its mask is 0 or its token id is -100."""
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        valid = valid & (mask != 0)
    if token_ids is not None:
        valid = valid & (token_ids != IGNORED_TOKEN)
    return valid


def divergence_value(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """D(p, q) per row from log-probabilities `[..., V]`.

    An entry with log p = -inf takes no part. Where q = 0 < p the term is its limit: +inf for the
    divergences that contain p log(p/q), finite for the others.
    """
    name, beta = divergence.canonical()
    taking_part = log_p != -torch.inf
    log_p = torch.where(taking_part, log_p, 0.0)
    p, q = log_p.exp(), log_q.exp()
    has_q = log_q != -torch.inf
    finite_log_q = torch.where(has_q, log_q, 0.0)

    def q_times(value: Tensor) -> Tensor:
        return torch.where(has_q, q * value, 0.0)

    if name == "reverse_kl":
        terms = p * (log_p - log_q)
    elif name == "forward_kl":
        terms = q_times(finite_log_q - log_p)
    elif name == "jeffreys":
        terms = p * (log_p - log_q) + q_times(finite_log_q - log_p)
    elif name == "jsd":
        m = beta * q + (1 - beta) * p
        log_m = torch.where(taking_part, m, 1.0).log()
        terms = beta * q_times(finite_log_q - log_m) + (1 - beta) * p * (log_p - log_m)
    else:
        raise ValueError(f"divergence: no reference value for {name!r}")
    return torch.where(taking_part, terms, 0.0).sum(-1)


def token_terms(
    student_logits: Tensor,
    teacher: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    teacher_floor: float | None = None,
) -> TokenTerms:
    """`hybrid_kernels.token_terms` as eager torch; every field follows autograd."""
    if isinstance(divergence, str):
        divergence = Divergence(divergence)
    valid = valid_rows(student_logits.shape[:-1], mask, token_ids, student_logits.device)
    keep = valid[..., None]
    # Selecting before the arithmetic keeps a masked row's NaN out of values and gradients alike.
    z = torch.where(keep, student_logits, 0.0) / temperature
    log_p = z.log_softmax(-1)
    support = log_p != -torch.inf
    entropy = -torch.where(support, log_p.exp() * torch.where(support, log_p, 0.0), 0.0).sum(-1)
    value = log_prob = teacher_log_prob = None
    ids = None if token_ids is None else torch.where(valid, token_ids, 0)[..., None]
    if ids is not None:
        log_prob = torch.where(valid, log_p.gather(-1, ids)[..., 0], 0.0)
    if teacher is not None:
        log_q = (torch.where(keep, teacher, 0.0).to(z.dtype) / temperature).log_softmax(-1)
        if teacher_floor is not None:
            log_q = log_q.clamp(min=teacher_floor)
        value = torch.where(valid, divergence_value(log_p, log_q, divergence), 0.0)
        if ids is not None:
            teacher_log_prob = torch.where(valid, log_q.gather(-1, ids)[..., 0], 0.0)
    return TokenTerms(
        divergence=value,
        log_prob=log_prob,
        teacher_log_prob=teacher_log_prob,
        entropy=torch.where(valid, entropy, 0.0),
        logsumexp=torch.where(valid, z.logsumexp(-1), 0.0),
    )


def hybrid_loss(
    student_logits: Tensor,
    teacher: Tensor | None,
    token_ids: Tensor | None = None,
    advantages: Tensor | Callable[[TokenTerms], Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    dense_weight: float | Tensor = 1.0,
    entropy_weight: float | Tensor = 0.0,
    divergence: str | Divergence = "reverse_kl",
    temperature: float = 1.0,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    teacher_floor: float | None = None,
) -> HybridLoss:
    """`hybrid_kernels.hybrid_loss` as eager torch.

    Per token `dense_weight * D(p, q) - advantages * log p(y) - entropy_weight * H(p)`.
    """
    terms = token_terms(
        student_logits,
        teacher,
        token_ids,
        mask=mask,
        divergence=divergence,
        temperature=temperature,
        teacher_floor=teacher_floor,
    )
    detached = TokenTerms(
        divergence=None if terms.divergence is None else terms.divergence.detach(),
        log_prob=None if terms.log_prob is None else terms.log_prob.detach(),
        teacher_log_prob=terms.teacher_log_prob,
        entropy=terms.entropy.detach(),
        logsumexp=terms.logsumexp.detach(),
    )
    valid = valid_rows(student_logits.shape[:-1], mask, token_ids, student_logits.device)
    loss = torch.zeros_like(terms.entropy)
    if terms.divergence is not None and not _is_zero(dense_weight):
        dense = dense_weight * terms.divergence
        if isinstance(dense_weight, Tensor):
            dense = torch.where(dense_weight == 0, 0.0, dense)  # even of an infinite divergence
        loss = loss + dense
    if advantages is not None and terms.log_prob is not None:
        if callable(advantages):
            advantages = advantages(detached)
        loss = loss - torch.where(valid, advantages, 0.0) * terms.log_prob
    if not _is_zero(entropy_weight):
        loss = loss - entropy_weight * terms.entropy
    loss = torch.where(valid, loss, 0.0)
    if reduction == "mean":
        count = valid.sum().clamp(min=1) if num_tokens is None else num_tokens
        loss = loss.sum() / count
    elif reduction == "sum":
        loss = loss.sum()
    return HybridLoss(
        loss, detached.divergence, detached.log_prob, detached.teacher_log_prob, detached.entropy
    )


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0
