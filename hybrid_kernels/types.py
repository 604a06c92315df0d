"""The values that go into and come out of the public functions.

Everything here is plain data; the only arithmetic is that of `TopK.from_logits`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_ROWS = 64  # that `TopK.from_logits` works on at once
IGNORED_TOKEN = -100  # the token id of a masked row, as in transformers


class HybridLoss(NamedTuple):
    """What `hybrid_loss` returns. Everything but `loss` is per token, detached and fp32.

    A field is None where its input was not given: `divergence` and `teacher_log_prob` without a
    teacher, `log_prob` and `teacher_log_prob` without token ids. Masked rows hold exactly 0.

    Attributes:
        loss: scalar, or `[...]` for `reduction="none"`; differentiable w.r.t. the student.
        divergence: `[...]`, D(student, teacher) in nats.
        log_prob: `[...]`, log p(y).
        teacher_log_prob: `[...]`, log q(y).
        entropy: `[...]`, H(p) in nats.
        student_mass: the student's mass on a top-K support; None for a full teacher.
        teacher_mass: the teacher's mass on a top-K support; None for a full teacher.
        dropped_norm: scalar, what `grad_filter` dropped of the logit gradient: its L2 norm over
            that of all. None where nothing was to be dropped, or only the backward does.
    """

    loss: Tensor
    divergence: Tensor | None
    log_prob: Tensor | None
    teacher_log_prob: Tensor | None
    entropy: Tensor
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    dropped_norm: Tensor | None = None


class TokenTerms(NamedTuple):
    """Per-token statistics, fp32, `[...]`; what was not asked for is None.

    `divergence`, `log_prob` and `entropy` are differentiable w.r.t. the student where
    `token_terms` returns them, and detached where a callable `advantages` receives them.

    Attributes:
        divergence: D(student, teacher) in nats.
        log_prob: log p(y).
        teacher_log_prob: log q(y).
        entropy: H(p) in nats.
        logsumexp: log sum_v exp(z_v / T) of the student.
        student_mass: the student's mass on a top-K support; None for a full teacher.
        teacher_mass: the teacher's mass on a top-K support; None for a full teacher.
    """

    divergence: Tensor | None
    log_prob: Tensor | None
    teacher_log_prob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


@dataclass(frozen=True)
class TopK:
    """A teacher known by K of its log-probabilities, as servers return them.

    The student's logits, and they alone, are divided by the temperature of a loss: give
    log-probabilities of the same temperature.

    Attributes:
        ids: `[..., K]` int64 or int32, the support; -1 is padding, and of equal ids the first
            counts.
        log_probs: `[..., K]` floating, log-probabilities of the softmax over the whole vocabulary,
            with all digits of their dtype. (Rounded to a few decimals they tell a wrong tail: of
            [-0.0105, -4.6] one of 0.0005, of [-0.01, -4.6] none. bf16 and fp16 are allowed for.)
        token_log_prob: `[...]`, log q(y) of the sampled tokens, where known. For tokens outside the
            support it is what `teacher_log_prob` then holds (else NaN), and it makes the gradient
            of the reverse KL unbiased (see `tail` in `hybrid_loss`). NaN means unknown, and leaves
            the row's gradient without that correction.
    """

    ids: Tensor
    log_probs: Tensor
    token_log_prob: Tensor | None = None

    @classmethod
    def from_logits(
        cls,
        teacher_logits: Tensor,
        k: int | None = None,
        *,
        ids: Tensor | None = None,
        token_ids: Tensor | None = None,
        temperature: float = 1.0,
    ) -> "TopK":
        """The support and its log-probabilities from full logits.

        A support of the teacher's own K best entries misses the tokens that the student likes and
        the teacher rejects, which the reverse KL is there for: `ids=student_logits.topk(k).indices`
        has them, and with `k` as well the support is the union.

        Args:
            teacher_logits: `[..., V]` floating.
            k: how many of the teacher's own best entries to take.
            ids: `[..., K]` int64, entries to take.
            token_ids: `[...]` int64, the sampled tokens; fills `token_log_prob`. -100 marks rows
                without one.
            temperature: that of the loss.

        Raises:
            ValueError: neither `k` nor `ids`, `k` outside [1, V], or another bad argument.

        Notes:
            Log-probabilities near 0 keep their relative precision, so that the tail of a peaked
            teacher is not lost. Works row by row: no `[..., V]` copy in fp32 exists.
        """
        if not isinstance(teacher_logits, Tensor) or not teacher_logits.is_floating_point():
            raise ValueError("teacher_logits: expected a floating [..., V] tensor")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature!r} is not in (0, inf)")
        vocabulary = teacher_logits.shape[-1]
        if k is None and ids is None:
            raise ValueError("k: neither k nor ids is given; give one of them, or both")
        if k is not None and (not isinstance(k, int) or not 1 <= k <= vocabulary):
            raise ValueError(f"k: {k!r} is not a whole number in [1, {vocabulary}], the vocabulary")
        if ids is not None and (
            not isinstance(ids, Tensor) or ids.shape[:-1] != teacher_logits.shape[:-1]
        ):
            raise ValueError(
                "ids: expected integers [..., K] with the leading shape of teacher_logits, "
                f"{tuple(teacher_logits.shape[:-1])}"
            )
        best = None if k is None else teacher_logits.detach().topk(k, dim=-1).indices
        if ids is None or best is None:
            # (The same tensor: the members of a mixture share it.)
            support = best if ids is None else ids.long()
            assert support is not None
        else:
            support = torch.cat([ids.long(), best], -1)
        wanted = support if token_ids is None else torch.cat([support, token_ids[..., None]], -1)
        log_probs = _log_probs(teacher_logits.detach(), wanted, temperature)
        if token_ids is None:
            return cls(support, log_probs)
        return cls(support, log_probs[..., :-1].contiguous(), log_probs[..., -1].contiguous())

    @property
    def resolution(self) -> float:
        """The relative rounding of the log-probabilities."""
        return torch.finfo(self.log_probs.dtype).eps / 2


def _log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits/T) at some ids, fp32; -inf at ids below 0."""
    if logits.ndim > 2:
        pairs = zip(logits, ids, strict=True)
        parts = [_log_probs(z, i, temperature) for z, i in pairs]
        return torch.stack(parts) if parts else ids.to(torch.float32)
    if logits.ndim == 2 and logits.shape[0] > _ROWS:
        pairs = zip(logits.split(_ROWS), ids.split(_ROWS), strict=True)
        return torch.cat([_log_probs(z, i, temperature) for z, i in pairs])
    x = logits.float() / temperature
    top, first = x.max(-1, keepdim=True)
    x -= top
    # log1p of what is beside the largest entry: the largest log-probability may be -1e-12.
    lse = x.exp().scatter_(-1, first, 0.0).sum(-1, keepdim=True).log1p()
    found = x.gather(-1, ids.clamp(min=0)) - lse
    return found.masked_fill(ids < 0, -math.inf)


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher given by hidden states and its output layer: with x = hidden weight^T + bias,

        w = softcap tanh(logit_scale x / softcap),   or logit_scale x without a softcap

    A softcap is `final_logit_softcapping` of a Gemma config, a logit scale that of Cohere's
    (Granite divides by `logits_scaling`).

    Attributes:
        hidden: `[..., D_t]`, as it enters the output layer (after the last norm).
        weight: `[V, D_t]`, or the output layer itself (as `student_weight` in
            `linear_hybrid_loss`).
        bias: `[V]` or None.
        softcap: above 0, or None.
        logit_scale: factor on the logits.
    """

    hidden: Tensor
    weight: Tensor | torch.nn.Module
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several weighted teachers: the divergence is `sum_i weight_i D(p, q_i)`.

    For the reverse KL that is, up to a constant, W = sum_i weight_i times the divergence from the
    normalised geometric mean of the teachers (arXiv 2512.23097 for one teacher). The
    `teacher_log_prob` of the results is `sum_i (weight_i / W) log q_i(y)`, so that a token's cost
    is `W (log_prob - teacher_log_prob)`; masses on a support are weighted means alike. Where one
    member's `token_log_prob` is unknown, so is the mean.

    Attributes:
        members: pairs of (weight > 0, teacher), all full (logits, `LinearTeacher`) or all `TopK`
            with the same `ids`.
    """

    members: Sequence[tuple[float, "Teacher"]]


Teacher: TypeAlias = Tensor | TopK | LinearTeacher | Mixture
