"""How a loss is made of row statistics: weights, coefficients of the gradient, normaliser.

Per row, with D, log p(y) and H(p) from the statistics,

    L = dense D - advantages log p(y) - entropy H(p)

so the coefficients of its gradient are the weights, with these signs, times the normaliser.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import checks, validate
from hybrid_kernels.rows import FIELDS, Coefficients, per_row, weighted
from hybrid_kernels.types import TokenTerms


class Objective(NamedTuple):
    """What a loss is made of, as the caller gave it to `hybrid_loss`."""

    advantages: float | Tensor | Callable[[TokenTerms], float | Tensor] | None
    dense_weight: float | Tensor
    entropy_weight: float | Tensor
    reduction: str
    num_tokens: float | Tensor | None

    def checked(self, shape: checks.CallShape, has_teacher: bool, has_tokens: bool) -> "Objective":
        """The same with numbers as Python's own, checked but for what a function returns.

        Raises:
            ValueError: an argument of the wrong kind, shape, device or range.
        """
        checks.choice("reduction", self.reduction, validate.REDUCTIONS)
        checked = self._replace(
            dense_weight=checks.row_values("dense_weight", self.dense_weight, shape),
            entropy_weight=checks.row_values("entropy_weight", self.entropy_weight, shape),
            num_tokens=validate.num_tokens(self.num_tokens, self.reduction, shape.device),
        )
        if not has_teacher and not _is_zero(checked.dense_weight):
            raise ValueError(
                f"teacher: None with dense_weight={self.dense_weight!r}; give the teacher's "
                "logits, or dense_weight=0 for the policy gradient alone"
            )
        if self.advantages is None:
            return checked
        if not has_tokens:
            raise ValueError("token_ids: None, but advantages need the sampled tokens; give both")
        if callable(self.advantages):
            return checked
        advantages = checks.row_values("advantages", self.advantages, shape)
        return checked._replace(advantages=advantages)

    def of_rows(
        self, advantages: float | Tensor | None, valid: Tensor | None, shape: checks.CallShape
    ) -> "RowLoss":
        """The loss as a function of row statistics.

        Args:
            advantages: the given ones, or what the given function returned.
            valid: bool `[N]`, the rows that count, or None for all.
            shape: the call's.
        """
        weights = Weights(
            dense=_row_weight(self.dense_weight),
            advantages=_row_weight(advantages),
            entropy=_row_weight(self.entropy_weight),
        )
        return RowLoss(weights, self._normaliser(valid, shape), self.reduction != "none")

    def _normaliser(self, valid: Tensor | None, shape: checks.CallShape) -> Tensor:
        options = {"dtype": torch.float32, "device": shape.device}
        if self.reduction != "mean":
            return torch.ones((), **options)
        if isinstance(self.num_tokens, Tensor):
            count = self.num_tokens.to(**options)
            # What only a device knows to be no count must not give a loss of 0 in silence.
            return torch.where((count > 0) & (count < math.inf), count.reciprocal(), math.nan)
        if self.num_tokens is not None:
            return torch.full((), 1.0 / self.num_tokens, **options)
        if valid is None:
            return torch.full((), 1.0 / max(shape.leading.numel(), 1), **options)
        return valid.sum().clamp(min=1).float().reciprocal()


def _row_weight(weight: float | Tensor | None) -> float | Tensor | None:
    if isinstance(weight, Tensor):
        return weight.float() if weight.ndim == 0 else weight.reshape(-1).float()
    return None if weight is None or weight == 0 else float(weight)


def _is_zero(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


class Weights(NamedTuple):
    """Weights of the three terms of a loss. Each is a number; a tensor `[]` or `[R]`, one element
    for N/R consecutive rows; or None, which stands for 0."""

    dense: float | Tensor | None
    advantages: float | Tensor | None
    entropy: float | Tensor | None


class RowLoss(NamedTuple):
    """A loss as a function of row statistics.

    Attributes:
        weights: of its terms.
        scale: the normaliser, a scalar tensor that multiplies every row.
        summed: whether the loss is the sum over all rows; otherwise there is one loss per row.
    """

    weights: Weights
    scale: Tensor
    summed: bool

    def value(self, statistics: Tensor, valid: Tensor | None) -> Tensor:
        """The loss: a scalar, or `[N]`, not yet multiplied by the scale, which is 1 there."""
        losses = self.per_row(statistics, valid)
        return (losses * self.scale).sum() if self.summed else losses

    def per_row(self, statistics: Tensor, valid: Tensor | None) -> Tensor:
        """`[N]`, without the scale; 0 on masked rows.

        Where the policy gradient corrects the divergence for tokens sampled outside a top-K
        support, that correction belongs to the advantages.
        """
        dense, advantages, entropy = (
            per_row(weight, statistics.shape[1]) if isinstance(weight, Tensor) else weight
            for weight in self.weights
        )
        log_prob = statistics[FIELDS.log_prob]
        terms = []
        if dense is not None:
            corrected = weighted(statistics[FIELDS.tail_correction], log_prob)
            terms.append(weighted(dense, statistics[FIELDS.divergence] + corrected))
        if advantages is not None:
            terms.append(-weighted(advantages, log_prob))
        if entropy is not None:
            terms.append(-weighted(entropy, statistics[FIELDS.entropy]))
        if terms:
            losses = sum(terms[1:], terms[0])
        else:  # 0, as differentiable as any other loss
            losses = log_prob.masked_fill(torch.ones_like(log_prob, dtype=torch.bool), 0.0)
        return losses if valid is None else torch.where(valid, losses, 0.0)

    def coefficients(self, scale: Tensor | None = None) -> Coefficients:
        """The gradient's coefficients: dL/d(term) of every row, times the scale (or another)."""
        scale = self.scale if scale is None else scale
        dense, advantages, entropy = self.weights
        return Coefficients(
            None if dense is None else (dense * scale).reshape(-1),
            None if advantages is None else -(advantages * scale).reshape(-1),
            None if entropy is None else -(entropy * scale).reshape(-1),
        )
