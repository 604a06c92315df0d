"""Long ordinary rows on the CPU under the reverse KL, one by one, in as few operators as there are.

A value per row is a Python number here, since an operator on a tensor of one element takes longer
than it is worth. Logits of ordinary size are exponentiated as they are, without their maximum; the
sum shows afterwards whether that was right.

A row is ordinary if its results are finite, and neither they nor its coefficients are large. All
other rows, and the other divergences, are left to `blocks.py`.
"""

import math

import torch
from torch import Tensor

from hybrid_kernels.rows import (
    FIELDS,
    MEMBER,
    SMALL_DIVERGENCE,
    STUDENT_FIELDS,
    Coefficients,
    Rows,
)
from hybrid_kernels.torch_backend.divergences import FORMS, Entries, row_dot

# The results of ordinary numbers are smaller than that.
ORDINARY = 2.0**20

# The sum of exponentials, between these, of logits that need no reference. No exponential is then
# infinite, and none that counts is 0.
LEAST_SUM, MOST_SUM = 2.0**-40, 2.0**60

# Products up to this can be added in fp32.
MOST_PRODUCT = 2.0**125

# Below this entropy (nats) a few entries have so much of the mass that others get lost in sums.
PEAKED = 2.0


class OrdinaryRows:
    """Rows by their numbers, 0 to N - 1; what follows is of the row at hand.

    Attributes:
        p: `[V]`, e^((z_v - reference)/T).
        d: `[V]`, z_v - w_v, less a constant.
        factor: what normalises p.
        mean_d, mean_z: means of d and z under the normalised p.
        peaked: whether a few entries have nearly all of the mass.
        reference: what was subtracted from the student's logits.
        log_normaliser: log sum e^(z/T).
        entropy: H(p).
    """

    def __init__(
        self,
        rows: Rows,
        coefficients: Coefficients | None,
        gradient: Tensor | None,
        token_terms: Tensor | None,
    ) -> None:
        """
        Args:
            rows: a problem that `can_take` allows.
            coefficients: columns `[N, 1]` of the gradient; None where there is none to write.
            gradient: where to write it, all but the sampled tokens' own terms.
            token_terms: these, `[N, 1]`, where they are to be added before a gradient is rounded.
        """
        self.rows, self.inv_t = rows, 1.0 / rows.temperature
        # The largest factor, but for p's, that a coefficient meets on its way to an entry.
        self.enlargement = max(1.0, self.inv_t) * max([1.0, *rows.shares])
        self.p, self.d, *copies = _fp32((4, rows.student.shape[-1])).unbind()
        self.copies = tuple(copies)  # of 16-bit logits
        self.number = _fp32(())
        self.sides = [_rows_of(side) for side in rows.logits]
        self.gradients = None if gradient is None else _rows_of(gradient)
        self.coefficients = [None if c is None else c[:, 0].tolist() for c in coefficients or ()]
        self.token_ids = self.token_terms = None
        if token_terms is not None and rows.token_ids is not None:
            self.token_ids, self.token_terms = rows.token_ids.tolist(), token_terms[:, 0].tolist()
        self.statistics: dict[int, dict[int, float]] = {}
        self.peaked, self.factor = False, 0.0
        self.mean_d = self.mean_z = 0.0
        self.reference = self.log_normaliser = self.entropy = 0.0

    @staticmethod
    def can_take(rows: Rows) -> bool:
        """Whether these are such rows. Shards, whose maxima are compared, are not."""
        return (
            rows.student.device.type == "cpu"
            and not rows.group
            and rows.support is None
            and len(rows.teachers) < 2
            and (not rows.teachers or rows.divergence == "reverse_kl")
            and rows.teacher_floor is None
            and rows.row_temperature is None
        )

    def compute(self, row: int) -> bool:
        """Measures a row and writes its gradient, unless it is not ordinary: then nothing."""
        statistics = self._measure(row)
        if not all(abs(number) < ORDINARY for number in statistics.values()):
            return False
        # A large weight may make an infinity of the lowest logits.
        weights = [0.0 if c is None else abs(c[row]) for c in self.coefficients]
        weight = sum(weights) * self.factor * self.enlargement
        if not weight < 0.5 and not self._bears(row, weight):
            return False
        self.statistics[row] = statistics
        if self.gradients is not None:
            self._write_gradient(row, self.gradients[row])
        return True

    def _bears(self, row: int, weight: float) -> bool:
        """Whether all numbers of the row stay finite under a weight."""
        values = [self._logits(0, row), self.d] if self.rows.teachers else [self._logits(0, row)]
        extremes = [abs(float(extreme)) for v in values for extreme in v.aminmax()]
        # The weight is a factor by itself, too, however small the numbers that it multiplies.
        return weight < MOST_PRODUCT and max(extremes) * weight < MOST_PRODUCT

    def write_statistics(self, statistics: Tensor) -> None:
        """Writes those of the rows that were computed."""
        rows, fields = list(self.statistics), range(len(statistics))
        columns = [[each.get(f, 0.0) for f in fields] for each in self.statistics.values()]
        if rows:
            statistics[:, rows] = torch.tensor(columns, dtype=torch.float32, device="cpu").T

    def _logits(self, side: int, row: int) -> Tensor:
        """A row of the student (0) or the teacher (1) in fp32."""
        logits = self.sides[side][row]
        return logits if logits.dtype == torch.float32 else self.copies[side].copy_(logits)

    def _measure(self, row: int) -> dict[int, float]:
        """The statistics of a row by their fields. Fills p and d."""
        z, self.peaked = self._logits(0, row), False
        self._normalise(z)
        if self.entropy < PEAKED:
            self.peaked = True
            self._normalise(z)
        # Statistics are rounded to fp32, which a small logarithm bears best.
        reference, in_logits = self.reference, self.log_normaliser / self.inv_t
        if not reference and abs(in_logits) < ORDINARY:
            reference = float(round(in_logits))
        statistics = {
            FIELDS.student_max: reference,
            FIELDS.student_lse: self.log_normaliser - reference * self.inv_t,
            FIELDS.logsumexp: self.log_normaliser,
            FIELDS.entropy: self.entropy,
        }
        # Blocks will take a row whose entropy is not finite, so the teacher need not be read here.
        if self.rows.teachers and math.isfinite(self.entropy):
            statistics |= self._compare(z, self._logits(1, row), reference)
        return statistics

    def _normalise(self, z: Tensor) -> None:
        """Fills p, and what is known of the student alone."""
        self.reference, total, x = self._exponentials(z, self.p, self.peaked)
        lse, self.factor = math.log(total), 1.0 / total
        self.log_normaliser = self.reference * self.inv_t + lse
        mean_x = self._mean(x)
        self.mean_z, self.entropy = self.reference + mean_x, lse - mean_x * self.inv_t

    def _mean(self, values: Tensor) -> float:
        """The mean under the normalised p."""
        return float(row_dot(self.p[None], values[None])) * self.factor

    def _exponentials(
        self, logits: Tensor, out: Tensor, centred: bool = False
    ) -> tuple[float, float, Tensor]:
        """Fills e^((z - reference)/T). Returns the reference, the sum, and z - reference.

        Args:
            centred: whether the reference has to be the maximum.
        """
        if self.inv_t == 1.0 and not centred:
            total = float(torch.exp(logits, out=out).sum())
            if LEAST_SUM < total < MOST_SUM:
                return 0.0, total, logits
        # A division by T before the subtraction would round what matters.
        reference = float(logits.amax())
        x = torch.sub(logits, reference, out=self.d)
        torch.exp(x if self.inv_t == 1.0 else torch.mul(x, self.inv_t, out=out), out=out)
        return reference, float(out.sum()), x

    def _compare(self, z: Tensor, w: Tensor, reference: float) -> dict[int, float]:
        """The statistics that need the teacher. Fills d."""
        inv_t = self.inv_t
        teacher_reference, teacher_total, _ = self._exponentials(w, self.d)
        log_normaliser = teacher_reference * inv_t + math.log(teacher_total)
        shift = log_normaliser - self.log_normaliser
        if not abs(shift / inv_t) < ORDINARY:
            return {FIELDS.divergence: math.nan}
        # By which the logits differ where the models agree, or nearly so.
        offset = -float(round(shift / inv_t))
        divergence = self._subtract(z, w, offset) + shift
        is_small = divergence < SMALL_DIVERGENCE
        if is_small or self.peaked:
            # The mean of log-ratios that count must not be a difference of larger numbers: l has a
            # small one where the models are close, and d less its own mean elsewhere.
            constant = offset + shift / inv_t if is_small else -self.mean_d
            added = float(self.number.fill_(constant))
            self.d.add_(added)
            self.mean_d = self._mean(self.d)
            divergence = (self.mean_d - added + offset) * inv_t + shift
        if is_small:
            divergence = self._small_divergence()
        # As far from the student's as the normalisers are, so that its logarithm is small, too.
        first = STUDENT_FIELDS
        teacher_max = float(self.number.fill_(reference - offset))
        return {
            FIELDS.divergence: self.rows.shares[0] * divergence,
            first + MEMBER.teacher_max: teacher_max,
            first + MEMBER.teacher_lse: log_normaliser - teacher_max * inv_t,
            first + MEMBER.slope_sum: divergence,
        }

    def _subtract(self, z: Tensor, w: Tensor, offset: float) -> float:
        """Fills d = z - w - offset, exact where it is small, and its mean. Returns the mean of
        (z - w)/T."""
        # An integer off the larger side leaves its digits as they are.
        if abs(self.mean_z) > abs(self.mean_z - offset):
            z = torch.sub(z, offset, out=self.d)
        elif offset:
            w = torch.add(w, offset, out=self.d)
        torch.sub(z, w, out=self.d)
        self.mean_d = self._mean(self.d)
        return (self.mean_d + offset) * self.inv_t

    def _small_divergence(self) -> float:
        """The divergence of close models as a sum of positive terms, from l T in d."""
        small_value = FORMS["reverse_kl"].small_value
        assert small_value is not None
        p, log_ratio = self.p * self.factor, self.d * self.inv_t
        q = torch.exp(-log_ratio).mul_(p)
        return float(small_value(Entries(p[None], q[None], log_ratio[None], log_ratio)))

    def _write_gradient(self, row: int, gradient: Tensor) -> None:
        """Writes the gradient `[V]` of the row that was measured last. Its logits may lie there."""
        rows, factor, inv_t = self.rows, self.factor, self.inv_t
        c_div, c_logp, c_ent = (0.0 if c is None else c[row] for c in self.coefficients)
        c_div = c_div * rows.shares[0] * inv_t if rows.teachers else 0.0
        constant = -c_logp - c_div * self.mean_d
        constant += c_ent * (self.log_normaliser - self.reference * inv_t - self.entropy)
        multiplier = self.number.fill_(constant * factor)
        if c_div:
            multiplier = torch.add(multiplier, self.d, alpha=c_div * factor, out=self.d)
        if c_ent:
            x = self._logits(0, row)
            if self.reference:
                x = torch.sub(x, self.reference, out=self.copies[0])
            multiplier = torch.add(multiplier, x, alpha=-c_ent * factor * inv_t, out=self.d)
        if gradient.dtype == torch.float32:
            torch.mul(self.p, multiplier, out=gradient)
            return
        torch.mul(self.p, multiplier, out=self.p)
        if self.token_ids is not None and self.token_terms is not None:
            term = self.token_terms[row]
            if term:  # not of a token outside, which has none
                self.p[self.token_ids[row]] += term
        gradient.copy_(self.p)


def _fp32(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _rows_of(logits: Tensor) -> list[Tensor]:
    """The rows of `[O, I, V]`."""
    return [row for plane in logits.unbind() for row in plane.unbind()]
