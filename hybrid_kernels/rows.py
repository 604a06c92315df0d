"""What the backends share about rows of logits: the problem, its statistics, its coefficients.

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

# Of a log-probability. Below it no double is left, so that the probability is 0, and with it what
# it is a factor of, however infinite.
LEAST = -745.13

# Below this many nats the swept value of a KL, a difference of large sums with an absolute error of
# a few 1e-7, is replaced by a sum of positive terms, which keeps its relative precision.
SMALL_DIVERGENCE = 1e-2

# Of a top-K support. A tail of the student's of less mass counts as empty: smaller numbers have no
# reciprocal. And the mass, at least, that the rounding of its log-probabilities hides of a
# teacher's tail.
SMALLEST_TAIL = 2.0**-125
HIDDEN_TAIL = 2.0**-24


class Fields(NamedTuple):
    """The first rows of a statistics tensor: seven for users, and what the gradient needs."""

    divergence: int = 0
    log_prob: int = 1
    teacher_log_prob: int = 2
    entropy: int = 3
    logsumexp: int = 4
    student_mass: int = 5  # on a top-K support
    teacher_mass: int = 6
    tail_correction: int = 7  # log p(y) - log q(y) - rho where y lies outside the support
    student_max: int = 8  # max_v z_v
    student_lse: int = 9  # log sum_v exp((z_v - max z) / T)


class MemberFields(NamedTuple):
    """The rows that follow for each member of the teacher (once where there is none)."""

    teacher_max: int = 0  # max_v w_v
    teacher_lse: int = 1  # log sum_v exp((w_v - max w) / T)
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
    """For how many consecutive rows each of `[R]` values is: N/R, as of `[B, 1]` against `[B, T]`.

    Raises:
        ValueError: R does not divide N.
    """
    size = values.numel()
    if count and (size == 0 or count % size):
        raise ValueError(
            f"{size} values for {count} rows: their number must divide that of the rows"
        )
    return count // max(size, 1)


def per_row(values: Tensor, count: int) -> Tensor:
    """`[R]` as `[N]`, see `repeat_of`."""
    return values.reshape(-1, 1).expand(-1, repeat_of(values, count)).reshape(-1)


def weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value; a weight of 0 leaves nothing of an infinity."""
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
    """An operator's arguments as the NamedTuples whose fields they are, in this order.

    `unflatten((*coefficients, *rows), Coefficients, Rows)` gives both back. Sequences, which
    operators get as lists, become tuples.
    """
    each = (tuple(a) if isinstance(a, list) else a for a in arguments)
    return [kind(*(next(each) for _ in kind._fields)) for kind in kinds]


class Rows(NamedTuple):
    """One problem: the tensors of N rows and the constants of the divergence.

    Attributes:
        student: logits `[O, I, V]`.
        teachers: the members, logits `[O, I, V]` or, where there is a support, log-probabilities
            `[N, K]` in fp32.
        shares: their weights.
        support: `[N, K]` integers, the ids of top-K teachers; -1 is padding, and of equal ids the
            first counts. None for full teachers.
        token_log_prob: `[N]` fp32, log q(y) for tokens outside the support, a weighted mean over
            the members; NaN where unknown. Or None.
        token_ids: `[N]` integers, the sampled tokens, or None.
        valid: bool `[N]`, the rows that count, or None for all. The others may hold anything.
        row_temperature: `[R]` fp32 in place of `temperature`, for N/R consecutive rows each.
        divergence: its canonical name.
        parameter: that of the divergence.
        temperature: of all rows.
        teacher_floor: under the teacher's log-probabilities, or None.
        tail: what stands for the vocabulary outside a support: "bucket", "renormalize" or "mask".
        resolution: the relative rounding of the log-probabilities as they were given.
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
        """Whether one sweep over the vocabulary finds all statistics."""
        if self.support is not None or not self.teachers:
            return True
        return FAMILIES[self.divergence].one_sweep and self.teacher_floor is None

    @property
    def logits(self) -> list[Tensor]:
        """All sides that are known on the whole vocabulary."""
        return [self.student, *(self.teachers if self.support is None else ())]

    @property
    def corrects_tail(self) -> bool:
        """Whether tokens sampled outside the support correct the bucket's gradient."""
        if self.support is None or self.token_log_prob is None or self.token_ids is None:
            return False
        return self.tail == "bucket" and self.divergence == "reverse_kl"

    def temperature_of(self, span: slice = slice(None)) -> float | Tensor:
        """The temperature of some rows: a number, or a column `[r, 1]`."""
        if self.row_temperature is None:
            return self.temperature
        return per_row(self.row_temperature, self.total)[span, None]

    def statistics(self) -> Tensor:
        """An empty statistics tensor."""
        size = (statistics_size(len(self.teachers)), self.total)
        return self.student.new_empty(size, dtype=torch.float32)


class Coefficients(NamedTuple):
    """Factors of dD/dz, dlog p(y)/dz and dH/dz: fp32 `[R]`, for N/R consecutive rows each; None
    is 0."""

    divergence: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor | None

    def columns(self, rows: Rows) -> "Coefficients":
        """`[N, 1]`, with the factor 1/T that every logit gradient has."""
        temperature = rows.temperature_of()
        return Coefficients(
            *(None if c is None else per_row(c, rows.total)[:, None] / temperature for c in self)
        )
