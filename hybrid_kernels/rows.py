"""What the backends share: rows of logits, their statistics and the coefficients of a gradient.

Logits are `[O, I, V]` with N = O * I rows, because a slice such as `logits[:, :-1]` has two row
strides; everything per row is `[N]`; the statistics of all rows are one fp32 tensor
`[statistics_size(members), N]`, indexed by `FIELDS` and `MEMBER`.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.divergences import FAMILIES

# Stands for -inf in a log-ratio: 0 times it is 0, where 0 * -inf would be NaN.
LOWEST = -(2.0**100)

# The exp of a log-probability below this underflows to 0 even in float64; products with that
# probability then count as 0, even where the other factor is infinite.
LEAST = -745.13

# Below this many nats the swept value of a KL, a difference of large sums with an absolute error of
# a few 1e-7, is replaced by a sum of positive terms, which keeps its relative precision.
SMALL_DIVERGENCE = 1e-2

# For top-K supports: a student's tail with less mass than this counts as empty, because smaller
# numbers have no finite reciprocal.
SMALLEST_TAIL = 2.0**-125

# The least mass of a teacher's tail that the rounding of its log-probabilities may hide.
HIDDEN_TAIL = 2.0**-24


class Fields(NamedTuple):
    """The first rows of a statistics tensor: seven for users, the rest for the gradient."""

    divergence: int = 0
    log_prob: int = 1
    teacher_log_prob: int = 2
    entropy: int = 3
    logsumexp: int = 4
    student_mass: int = 5  # on a top-K support
    teacher_mass: int = 6
    tail_correction: int = 7  # log p(y) - log q(y) - rho where y lies outside the support
    student_max: int = 8  # max_v z_v, or another number from which e^((z_v - it)/T) is finite
    student_lse: int = 9  # log sum_v exp((z_v - student_max) / T)


class MemberFields(NamedTuple):
    """The rows that follow for each member of the teacher (once where there is none)."""

    teacher_max: int = 0  # as student_max
    teacher_lse: int = 1  # log sum_v exp((w_v - teacher_max) / T)
    slope_sum: int = 2  # sum_v s_v, with s_v = dt_v/dlog p_v up to a multiple of p_v
    log_s: int = 3  # log sum_v p_v^a q_v^(1-a), for Renyi's divergence
    tail_slope: int = 4  # s/p of the tail of a top-K support


FIELDS = Fields()
STUDENT_FIELDS = len(FIELDS)
MEMBER = MemberFields()
MEMBER_FIELDS = len(MEMBER)


def statistics_size(members: int) -> int:
    """How many rows a statistics tensor has."""
    return STUDENT_FIELDS + max(members, 1) * MEMBER_FIELDS


def repeat_of(values: Tensor, count: int) -> int:
    """How many consecutive rows share each of `[R]` values: N/R, as when `[B, 1]` meets `[B, T]`.

    Raises:
        ValueError: R does not divide N.
    """
    size = values.numel()
    if count and (size == 0 or count % size):
        raise ValueError(
            f"{size} values for {count} rows: the number of rows must be a multiple of theirs"
        )
    return count // max(size, 1)


def per_row(values: Tensor, count: int) -> Tensor:
    """`[R]` values as `[N]`, see `repeat_of`."""
    return values.reshape(-1, 1).expand(-1, repeat_of(values, count)).reshape(-1)


def weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, where a weight of 0 gives 0 even for an infinite value."""
    if not isinstance(weight, Tensor):
        return weight * value if weight else torch.zeros_like(value)
    return torch.where(weight == 0, 0.0, weight * value)


# The fields of `Rows` and `Coefficients` as the operators declare them.
ROWS = (
    "Tensor student, Tensor[] teachers, float[] shares, Tensor? support, Tensor? token_log_prob, "
    "Tensor? token_ids, Tensor? valid, Tensor? row_temperature, str divergence, float parameter, "
    "float temperature, float? teacher_floor, str tail, float resolution, str group, str backend"
)
COEFFICIENTS = (
    "Tensor? divergence_coefficient, Tensor? log_prob_coefficient, Tensor? entropy_coefficient"
)


def unflatten(arguments: Iterable, *kinds: type) -> list:
    """Rebuilds NamedTuples from an operator's flat arguments, in the order of `kinds`.

    `unflatten((*coefficients, *rows), Coefficients, Rows)` gives both back. Sequences, which
    operators receive as lists, become tuples.
    """
    values = (tuple(a) if isinstance(a, list) else a for a in arguments)
    return [kind(*(next(values) for _ in kind._fields)) for kind in kinds]


class Rows(NamedTuple):
    """The tensors of N rows and the constants of the divergence: the input of a backend.

    Attributes:
        student: logits `[O, I, V]`.
        teachers: the members, logits `[O, I, V]` or, where there is a support, log-probabilities
            `[N, K]` in fp32.
        shares: their weights.
        support: `[N, K]` integers, the ids of top-K teachers; -1 is padding, and where an id is
            repeated only the first counts. None for full teachers.
        token_log_prob: `[N]` fp32, log q(y) for tokens outside the support, a weighted mean over
            the members; NaN where unknown. Or None.
        token_ids: `[N]` integers, the sampled tokens, or None.
        valid: bool `[N]`, the rows that count, or None for all. The others may hold anything.
        row_temperature: `[R]` fp32, replaces `temperature`; each for N/R consecutive rows.
        divergence: the canonical name of the divergence.
        parameter: its parameter.
        temperature: the temperature of all rows.
        teacher_floor: lower bound on the teacher's log-probabilities, or None.
        tail: how the vocabulary outside a support counts: "bucket", "renormalize" or "mask".
        resolution: the relative rounding error of the log-probabilities as they were given.
        group: name of the process group that shares the vocabulary, empty where there is none.
        backend: "triton" or "torch".
    """

    student: Tensor
    teachers: Sequence[Tensor] = ()
    shares: Sequence[float] = ()
    support: Tensor | None = None
    token_log_prob: Tensor | None = None
    token_ids: Tensor | None = None
    valid: Tensor | None = None
    row_temperature: Tensor | None = None
    divergence: str = "reverse_kl"
    parameter: float = 0.0
    temperature: float = 1.0
    teacher_floor: float | None = None
    tail: str = "bucket"
    resolution: float = 0.0
    group: str = ""
    backend: str = "torch"

    @property
    def total(self) -> int:
        return self.student.shape[0] * self.student.shape[1]

    @property
    def one_sweep(self) -> bool:
        """Whether one sweep over the vocabulary gives all statistics."""
        if self.support is not None or not self.teachers:
            return True
        return FAMILIES[self.divergence].one_sweep and self.teacher_floor is None

    @property
    def logits(self) -> list[Tensor]:
        """The tensors of logits over the whole vocabulary: the student's and full teachers'."""
        return [self.student, *(self.teachers if self.support is None else ())]

    @property
    def corrects_tail(self) -> bool:
        """Whether tokens sampled outside the support correct the bucket's gradient."""
        if self.support is None or self.token_log_prob is None or self.token_ids is None:
            return False
        return self.tail == "bucket" and self.divergence == "reverse_kl"

    def temperature_of(self, span: slice = slice(None)) -> float | Tensor:
        """The temperature of the rows in `span`: a number, or a column `[r, 1]`."""
        if self.row_temperature is None:
            return self.temperature
        return per_row(self.row_temperature, self.total)[span, None]

    def statistics(self) -> Tensor:
        """An uninitialised statistics tensor."""
        size = (statistics_size(len(self.teachers)), self.total)
        return self.student.new_empty(size, dtype=torch.float32)


class Coefficients(NamedTuple):
    """The factors of dD/dz, dlog p(y)/dz and dH/dz in a gradient.

    Each is fp32 `[R]`, a value for N/R consecutive rows, or None for 0.
    """

    divergence: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor | None

    def columns(self, rows: Rows) -> "Coefficients":
        """The factors as `[N, 1]`, times the 1/T that every logit gradient has."""
        temperature = rows.temperature_of()
        return Coefficients(
            *(None if c is None else per_row(c, rows.total)[:, None] / temperature for c in self)
        )
