"""Sampled tokens on the torch backend: of all rows at once, as a gather and a scatter."""

import torch
from torch import Tensor

from hybrid_kernels.rows import FIELDS, MEMBER, MEMBER_FIELDS, STUDENT_FIELDS, Rows


class Tokens:
    """The sampled token of every row.

    An id outside the vocabulary, as one on another rank is, has log p = log q = NaN, and no term of
    its own in the gradient. Ids on masked rows may be anything.

    Attributes:
        ids: int64 `[N, 1]`, inside the vocabulary.
        outside: bool `[N]`, whether that replaces an id outside.
        logits: the student's `[N]`, then each full teacher's, of these tokens; gathered before a
            gradient is written over them.
    """

    def __init__(self, rows: Rows) -> None:
        assert rows.token_ids is not None
        outer, inner, size = rows.student.shape
        ids = rows.token_ids.long()
        inside = ids.clamp(0, size - 1)
        self.rows, self.ids, self.outside = rows, inside[:, None], ids != inside
        places = inside.view(outer, inner, 1)
        # On the CPU in double precision, in which the lowest logit over the smallest temperature is
        # a number. Not all devices have it.
        dtype = torch.float64 if ids.device.type == "cpu" else torch.float32
        self.logits = [side.gather(-1, places).view(-1).to(dtype) for side in rows.logits]

    def fill(self, statistics: Tensor) -> None:
        """Fills log p(y) and, for full teachers, log q(y) by the normalisers of the rows."""
        rows = self.rows
        maxima, lses = [FIELDS.student_max], [FIELDS.student_lse]
        for member in range(len(self.logits) - 1):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            maxima.append(first + MEMBER.teacher_max)
            lses.append(first + MEMBER.teacher_lse)
        temperature = rows.temperature_of()
        log_probs = [
            ((logits - statistics[top])[:, None] / temperature)[:, 0] - statistics[lse]
            for logits, top, lse in zip(self.logits, maxima, lses, strict=True)
        ]
        self._write(statistics, FIELDS.log_prob, log_probs[0])
        if len(log_probs) > 1:
            self._write(statistics, FIELDS.teacher_log_prob, self._mean(log_probs[1:]))

    def _mean(self, log_probs: list[Tensor]) -> Tensor:
        """The weighted mean over the members, each at least the floor."""
        floor, total = self.rows.teacher_floor, sum(self.rows.shares)
        mean = torch.zeros_like(log_probs[0])
        for share, log_prob in zip(self.rows.shares, log_probs, strict=True):
            mean += share / total * (log_prob if floor is None else log_prob.clamp(min=floor))
        return mean

    def _write(self, statistics: Tensor, field: int, values: Tensor) -> None:
        values = values.masked_fill(self.outside, torch.nan)
        if self.rows.valid is not None:
            values = torch.where(self.rows.valid, values, 0.0)
        statistics[field] = values

    def terms(self, log_prob: Tensor) -> Tensor:
        """The gradient's term c_logp 1[v = y] at these tokens, `[N, 1]`.

        Args:
            log_prob: the coefficient, `[N, 1]`.
        """
        without = self.outside if self.rows.valid is None else self.outside | ~self.rows.valid
        return log_prob.masked_fill(without[:, None], 0.0)

    def add_to(self, gradient: Tensor, terms: Tensor) -> None:
        """Adds `terms` to a gradient `[O, I, V]`."""
        shape = (*gradient.shape[:2], 1)
        gradient.scatter_add_(-1, self.ids.view(shape), terms.to(gradient.dtype).view(shape))
