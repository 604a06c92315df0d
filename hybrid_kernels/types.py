"""The values that go into and come out of the public functions.

Everything here is data; only `TopK.from_logits` computes anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hybrid_kernels import checks

_ROWS = 64  # how many rows `TopK.from_logits` works on at once
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
        dropped_norm: scalar, the L2 norm of the part of the logit gradient that `grad_filter`
            dropped, relative to the whole. None without a filter, and where the gradient is
            computed only in the backward.
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
    """Per-token statistics, fp32, `[...]`; None where the inputs for them were not given.

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
    """A teacher given by K of its log-probabilities, as servers return them.

    A loss divides only the student's logits by its temperature: give log-probabilities computed at
    the same temperature.

    An entry is padding where its id is -1. A log-probability of -inf with another id is a
    probability of 0; servers that pad with it need the ids of their padding set to -1.

    Attributes:
        ids: `[..., K]` int64 or int32, the support; where an id is repeated, only the first counts.
        log_probs: `[..., K]` floating, log-probabilities of the softmax over the whole vocabulary,
            in the full precision of their dtype. Rounding them to a few decimals makes the tail
            wrong: [-0.0105, -4.6] leaves a tail of 0.0005, [-0.01, -4.6] leaves none. The rounding
            of bf16 and fp16 is accounted for.
        token_log_prob: `[...]`, log q(y) of the sampled tokens, where known. For tokens outside the
            support, `teacher_log_prob` holds it (otherwise NaN), and it makes the gradient of the
            reverse KL unbiased (see `tail` in `hybrid_loss`). NaN means unknown: the row's gradient
            then goes without that correction.
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
        temperature: float | Tensor = 1.0,
    ) -> "TopK":
        """The support and its log-probabilities from full logits.

        The teacher's own K best entries miss the tokens that the student likes and the teacher
        rejects, which are exactly what the reverse KL penalises.
        `ids=student_logits.topk(k).indices` includes them; with `k` as well, the support is the
        union of both.

        Args:
            teacher_logits: `[..., V]` floating.
            k: how many of the teacher's own best entries to take.
            ids: `[..., K]` int64, the entries to take.
            token_ids: `[...]` int64, the sampled tokens; fills `token_log_prob`. -100 marks rows
                without one.
            temperature: the loss's temperature: a number, a scalar tensor, `[...]`, or `[...]` with
                its last dimension 1, where a value that is not above 0 and finite gives NaN.

        Raises:
            ValueError: neither `k` nor `ids`, `k` outside [1, V], or another bad argument.

        Notes:
            Log-probabilities near 0 keep their relative precision, so that the tail of a peaked
            teacher is not lost. A few rows at a time: no `[..., V]` copy in fp32 is made.
        """
        logits = checks.tensor("teacher_logits", teacher_logits, "a [..., V] tensor").detach()
        checks.floating("teacher_logits", logits)
        if logits.ndim < 1 or logits.shape[-1] < 1:
            raise ValueError(
                f"teacher_logits: expected shape [..., V], V >= 1, got {tuple(logits.shape)}"
            )
        vocabulary = logits.shape[-1]
        shape = checks.CallShape(logits.shape[:-1], logits.device, vocabulary)
        given = checks.row_values("temperature", temperature, shape, positive=True)
        given = torch.as_tensor(given, dtype=torch.float32, device=logits.device)
        valid = torch.where((given > 0) & (given < math.inf), given, math.nan)
        temperatures = valid.expand(shape.leading)[..., None]
        if k is None and ids is None:
            raise ValueError("k: neither k nor ids is given; give one of them, or both")
        best = None
        if k is not None:
            expected = f"a whole number in [1, {vocabulary}], the vocabulary"
            k = checks.whole_number("k", k, expected, high=vocabulary)
            best = logits.topk(k, dim=-1).indices
        if ids is not None:
            ids = checks.integers("ids", ids, "a [..., K] tensor")
            if ids.ndim < 1 or ids.shape[:-1] != shape.leading:
                raise ValueError(
                    f"ids: shape {tuple(ids.shape)}, expected [..., K] with the leading shape of "
                    f"teacher_logits, {tuple(shape.leading)}"
                )
            checks.same_device("ids", ids, shape.device)
            checks.largest_id("ids", ids, vocabulary)
        if token_ids is not None:
            token_ids = checks.token_ids(token_ids, shape)
            checks.largest_id("token_ids", token_ids, vocabulary)
        if ids is None or best is None:
            # Not a copy, so that the members of a mixture can share one tensor.
            support = best if ids is None else ids.long()
            assert support is not None
        else:
            support = torch.cat([ids.long(), best], -1)
        entries = support if token_ids is None else torch.cat([support, token_ids[..., None]], -1)
        log_probs = _log_probs(logits, entries, temperatures)
        if token_ids is None:
            return cls(support, log_probs)
        return cls(support, log_probs[..., :-1].contiguous(), log_probs[..., -1].contiguous())

    @property
    def resolution(self) -> float:
        """The relative rounding error of the log-probabilities."""
        return torch.finfo(self.log_probs.dtype).eps / 2


def _log_probs(logits: Tensor, ids: Tensor, temperatures: Tensor) -> Tensor:
    """log softmax(logits/T) at the given ids, fp32; -inf at ids below 0. T is `[..., 1]`."""
    sides = logits, ids, temperatures
    if logits.ndim > 2:
        parts = [_log_probs(*side) for side in zip(*sides, strict=True)]
        return torch.stack(parts) if parts else ids.to(torch.float32)
    if logits.ndim == 2 and logits.shape[0] > _ROWS:
        pieces = zip(*(side.split(_ROWS) for side in sides), strict=True)
        return torch.cat([_log_probs(*piece) for piece in pieces])
    x = logits.to(torch.float32, copy=True)
    top, first = x.max(-1, keepdim=True)
    # A division before the subtraction would round what matters.
    x.sub_(top).div_(temperatures)
    # log1p of the sum without the largest entry, whose log-probability may be as small as -1e-12.
    others = x.exp().scatter_(-1, first, 0.0).sum(-1, keepdim=True)
    lse = (others + x.gather(-1, first)).log1p()  # adds 0, or NaN where that entry is infinite
    log_probs = x.gather(-1, ids.clamp(min=0)) - lse
    return log_probs.masked_fill(ids < 0, -math.inf)


class OutputLayer:
    """How a model makes logits of its last hidden states: with x = hidden weight^T + bias,

        z = softcap tanh(logit_scale x / softcap),   or logit_scale x without a softcap

    The linear functions and `LinearTeacher` take it in place of a weight. `output_layer` finds that
    of a model.

    Args:
        weight: `[V, D]`, or the layer itself, as in `linear_hybrid_loss`.
        bias: `[V]` or None; not for a layer, which has its own.
        softcap: above 0, or None (`final_logit_softcapping` of Gemma).
        logit_scale: factor on the logits (of Cohere; 1 / `logits_scaling` of Granite).

    Attributes:
        layer: the layer or, where there is none, the weight.
    """

    def __init__(
        self,
        weight: Tensor | nn.Module,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        if isinstance(weight, nn.Module) and bias is not None:
            raise ValueError("bias: given with a layer, which has its own; leave it out")
        self.layer, self._bias = weight, bias
        self.softcap, self.logit_scale = softcap, logit_scale

    def __repr__(self) -> str:
        shape = tuple(self.layer.shape) if isinstance(self.layer, Tensor) else self.layer
        return f"OutputLayer({shape}, softcap={self.softcap}, logit_scale={self.logit_scale})"

    @property
    def weight(self) -> Tensor | nn.Module:
        """`[V, D]`, read anew each time, since FSDP2 replaces parameters. Of a layer that PEFT has
        wrapped it is the layer itself, whose adapters are in no weight."""
        return self.layer.weight if isinstance(self.layer, nn.Linear) else self.layer

    @property
    def bias(self) -> Tensor | None:
        """`[V]`; None where there is none, and where `weight` is a layer and brings it."""
        return self.layer.bias if isinstance(self.layer, nn.Linear) else self._bias


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher given by hidden states and its output layer: with x = hidden weight^T + bias,

        w = softcap tanh(logit_scale x / softcap),   or logit_scale x without a softcap

    Attributes:
        hidden: `[..., D_t]`, the input of the output layer (after the last norm), computed under
            `torch.no_grad()`.
        weight: `[V, D_t]`, a layer, or an `OutputLayer`, which brings all that follows (like
            `student_weight` in `linear_hybrid_loss`). It may be the student's: a teacher gives it
            no gradient.
        bias: `[V]` or None.
        softcap: above 0, or None.
        logit_scale: factor on the logits.
    """

    hidden: Tensor
    weight: Tensor | nn.Module | OutputLayer
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several weighted teachers: the divergence is `sum_i weight_i D(p, q_i)`.

    For the reverse KL that is, up to a constant, W = sum_i weight_i times the divergence from the
    normalised geometric mean of the teachers (arXiv 2512.23097 covers one teacher). All rows follow
    all teachers; a teacher for each row is not yet supported. The
    `teacher_log_prob` of the results is `sum_i (weight_i / W) log q_i(y)`, so that a token's cost
    is `W (log_prob - teacher_log_prob)`; masses on a support are weighted means, too. Where one
    member's `token_log_prob` is unknown, so is the mean.

    Attributes:
        members: pairs of (weight > 0, teacher), all full (logits, `LinearTeacher`) or all `TopK`
            with the same `ids`.
    """

    members: Sequence[tuple[float, "Teacher"]]


Teacher: TypeAlias = Tensor | TopK | LinearTeacher | Mixture
