"""The table of divergences: what the package knows about each one, except its formulas.

The formulas are in `reference.py` (values only) and, for the backends, in
`torch_backend/divergences.py` and `triton_backend/divergences.py` (values and slopes).
"""

import math
from dataclasses import KW_ONLY, dataclass, field

from hybrid_kernels.checks import real


@dataclass(frozen=True)
class Parameter:
    """The parameter of a family: its range from `low` to `high`, each end excluded where `open`.

    `limits` maps special values to the divergence that the family equals, or tends to, there.
    """

    name: str
    default: float
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    limits: dict[float, str] = field(default_factory=dict)

    def allows(self, value: object) -> bool:
        number = real(value)
        if number is None:
            return False
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below

    @property
    def interval(self) -> str:
        left = "(" if self.open_low or self.low == -math.inf else "["
        right = ")" if self.open_high or self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Family:
    """A row of the table, for a student p and a teacher q whose logits differ by d.

    Attributes:
        parameter: its parameter, if it has one.
        student_d: whether one sweep is enough and KL(p||q), unweighted, is part of it: the sweep
            computes sum p d, which is infinite where q = 0 < p.
        teacher_d: the same for KL(q||p): the sweep computes sum q d, infinite where p = 0 < q.
        has_u: whether the slopes of its terms, s = dt/dlog p = p u + v, have a u.
        has_v: whether they have a v.
        tilted: whether its slopes need log S of the whole row, S = sum p^a q^(1-a).
        chained: the largest number of teachers for which the chain rule over shards of the
            vocabulary gives it.
        resident: whether a GPU keeps rows in registers instead of reading them again, which pays
            where reading takes longer than the arithmetic.
    """

    parameter: Parameter | None = None
    _: KW_ONLY
    student_d: bool = False
    teacher_d: bool = False
    has_u: bool = True
    has_v: bool = False
    tilted: bool = False
    chained: float = 0
    resident: bool = False

    @property
    def one_sweep(self) -> bool:
        """Whether one sweep over the vocabulary gives its statistics, sums of exp(z) poly(z, w).

        The others need both normalisers first. The value from one sweep is a difference of large
        sums, so a small one is summed again (`SMALL_DIVERGENCE` in `rows.py`).
        """
        return self.student_d or self.teacher_d

    @property
    def linear(self) -> bool:
        """Whether it is KL(p||q) alone: its sums do not need q, and p may be unnormalised."""
        return self.student_d and not self.teacher_d


FAMILIES = {
    "reverse_kl": Family(student_d=True, chained=math.inf, resident=True),
    "forward_kl": Family(teacher_d=True, has_u=False, has_v=True, chained=1, resident=True),
    "jeffreys": Family(student_d=True, teacher_d=True, has_v=True, resident=True),
    "jsd": Family(
        Parameter("beta", 0.5, low=0, high=1, limits={0: "forward_kl", 1: "reverse_kl"}),
        resident=True,
    ),
    "skew_reverse_kl": Family(
        Parameter("alpha", 0.1, low=0, high=1, open_high=True, limits={0: "reverse_kl"}),
    ),
    "skew_forward_kl": Family(
        Parameter("alpha", 0.1, low=0, high=1, open_high=True, limits={0: "forward_kl"}),
    ),
    "alpha": Family(
        Parameter("alpha", 0.5, limits={0: "forward_kl", 1: "reverse_kl"}),
        has_v=True,
    ),
    "renyi": Family(
        Parameter("alpha", 0.5, low=0, open_low=True, limits={1: "reverse_kl"}),
        has_v=True,
        tilted=True,
    ),
    "tv": Family(),
}


def available_divergences() -> tuple[str, ...]:
    """The names that `divergence=` accepts."""
    return tuple(FAMILIES)


class Divergence:
    """A divergence between the student p and the teacher q, with its parameters.

    ===================  ===============================================================
    name                 value
    ===================  ===============================================================
    ``reverse_kl``       KL(p||q) = sum_v p_v (log p_v - log q_v)
    ``forward_kl``       KL(q||p)
    ``jeffreys``         KL(p||q) + KL(q||p)
    ``jsd``              beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p;
                         beta = 0 is KL(q||p) and beta = 1 is KL(p||q), their limits after
                         division by beta (1-beta) (the convention of GKD, arXiv 2306.13649)
    ``skew_reverse_kl``  KL(p || (1-alpha) q + alpha p) (DistiLLM, arXiv 2402.03898)
    ``skew_forward_kl``  KL(q || alpha q + (1-alpha) p)
    ``alpha``            (1 - S) / (alpha (1-alpha)), S = sum_v p_v^alpha q_v^(1-alpha)
                         (Amari); alpha = 1 is its limit KL(p||q), alpha = 0 KL(q||p)
    ``renyi``            log(S) / (alpha - 1); alpha = 1 is its limit KL(p||q)
    ``tv``               total variation, sum_v |p_v - q_v| / 2
    ===================  ===============================================================

    Parameters within 1e-3 of a limit lose precision: use the limit itself.

    Args:
        name: one of `available_divergences()`.
        **params: `beta` in [0, 1] for ``jsd`` (default 0.5); `alpha` in [0, 1) for the skew KLs
            (default 0.1), any number for ``alpha``, above 0 for ``renyi`` (default 0.5 for both).

    Raises:
        ValueError: unknown name or parameter, or a parameter outside its range.
    """

    def __init__(self, name: str, **params: float) -> None:
        if not isinstance(name, str) or name not in FAMILIES:
            names = ", ".join(FAMILIES)
            raise ValueError(f"divergence: unknown name {name!r}; available: {names}")
        parameter = FAMILIES[name].parameter
        for key, value in params.items():
            if parameter is None or key != parameter.name:
                accepted = f"only {parameter.name!r}" if parameter else "no parameter"
                raise ValueError(f"divergence: {name!r} got {key!r}, it takes {accepted}")
            if not parameter.allows(value):
                raise ValueError(
                    f"divergence: {name!r} got {key}={value!r}, which must be a number in "
                    f"{parameter.interval}"
                )
        self.name = name
        self.params = params

    def __repr__(self) -> str:
        params = "".join(f", {key}={value!r}" for key, value in self.params.items())
        return f"Divergence({self.name!r}{params})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Divergence) and self.canonical() == other.canonical()

    def __hash__(self) -> int:
        return hash(self.canonical())

    def canonical(self) -> tuple[str, float]:
        """The kernels' name for this divergence and its parameter (0 where it has none)."""
        parameter = FAMILIES[self.name].parameter
        if parameter is None:
            return self.name, 0.0
        value = float(self.params.get(parameter.name, parameter.default))
        limit = parameter.limits.get(value)
        return (self.name, value) if limit is None else (limit, 0.0)
