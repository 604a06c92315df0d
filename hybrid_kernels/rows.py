"""What the backends share about rows of logits: the problem, its statistics, its coefficients.

Logits are `[O, I, V]` with N = O * I rows, because a slice such as `logits[:, :-1]` has two row
strides; everything per row is `[N]`; the statistics of all rows are one fp32 tensor
`[STATISTICS, N]`, indexed by `FIELDS`.
"""

from typing import NamedTuple

from torch import Tensor

# Stands for -inf in a log-ratio: 0 times it is 0, where 0 * -inf would be NaN. (About -1e30, and a
# power of two, which bf16 holds exactly.)
LOWEST = -(2.0**100)

# The divergences that SMALL_DIVERGENCE is for.
KL_FAMILY = ("reverse_kl", "forward_kl", "jeffreys")

# Below this many nats the swept value of a KL, a difference of large sums with an absolute error of
# a few 1e-7, is replaced by a sum of positive terms, which keeps its relative precision.
SMALL_DIVERGENCE = 1e-2

# Divergences whose statistics are sums of exp(z) * poly(z, w), so that one sweep finds them. The
# others, and every one under a teacher floor, need both normalisers first.
ONE_SWEEP = ("reverse_kl", "forward_kl", "jeffreys")


class Fields(NamedTuple):
    """The rows of a statistics tensor. The first five are for users, the rest for the gradient."""

    divergence: int = 0
    log_prob: int = 1
    teacher_log_prob: int = 2
    entropy: int = 3
    logsumexp: int = 4
    student_max: int = 5  # max_v z_v
    teacher_max: int = 6  # max_v w_v
    student_lse: int = 7  # log sum_v exp((z_v - max z) / T)
    teacher_lse: int = 8  # log sum_v exp((w_v - max w) / T)
    slope_sum: int = 9  # sum_v s_v, with s_v = dt_v/dlog p_v up to a multiple of p_v


FIELDS = Fields()
STATISTICS = len(FIELDS)


class Rows(NamedTuple):
    """One problem: the tensors of N rows and the constants of the divergence."""

    student: Tensor
    teacher: Tensor | None
    token_ids: Tensor | None
    valid: Tensor | None
    divergence: str
    parameter: float
    temperature: float
    teacher_floor: float | None

    @property
    def total(self) -> int:
        return self.student.shape[0] * self.student.shape[1]

    @property
    def one_sweep(self) -> bool:
        return self.divergence in ONE_SWEEP and self.teacher_floor is None


class Coefficients(NamedTuple):
    """Factors of dD/dz, dlog p(y)/dz and dH/dz: fp32, `[N]` or one element; None is 0."""

    divergence: Tensor | None
    log_prob: Tensor | None
    entropy: Tensor | None
