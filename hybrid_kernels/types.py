"""The values that go into and come out of the public functions.

Everything here is plain data: no arithmetic on tensors, no kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

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
    """

    loss: Tensor
    divergence: Tensor | None
    log_prob: Tensor | None
    teacher_log_prob: Tensor | None
    entropy: Tensor
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


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
    """

    divergence: Tensor | None
    log_prob: Tensor | None
    teacher_log_prob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor


@dataclass(frozen=True)
class TopK:
    """A teacher known by K of its log-probabilities.

    Attributes:
        ids: `[..., K]` int64, the support.
        log_probs: `[..., K]`, full-softmax log-probabilities on it.
        token_log_prob: `[...]`, log q(y) of the sampled token, where known.
    """

    ids: Tensor
    log_probs: Tensor
    token_log_prob: Tensor | None = None

    @classmethod
    def from_logits(
        cls, teacher_logits: Tensor, k: int | None = None, *, ids: Tensor | None = None
    ) -> "TopK":
        """The support and its log-probabilities from full logits.

        Raises:
            ValueError: top-K teachers are not yet supported.
        """
        raise ValueError(
            "teacher: TopK is not yet supported; give the teacher's logits as a [..., V] tensor"
        )


@dataclass(frozen=True)
class LinearTeacher:
    """A teacher given by hidden states and the weight of its output layer.

    Attributes:
        hidden: `[..., D_t]`.
        weight: `[V, D_t]`.
        bias: `[V]` or None.
        softcap: logits become `softcap * tanh(logits / softcap)` where given.
        logit_scale: factor on the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """Several weighted teachers: the dense term is `sum_i weight_i D(p, q_i)`.

    Attributes:
        members: pairs of (weight, teacher).
    """

    members: Sequence[tuple[float, "Teacher"]]


Teacher: TypeAlias = Tensor | TopK | LinearTeacher | Mixture


@dataclass(frozen=True)
class _Family:
    """One row of the divergence table: its parameter and the range that it may take."""

    parameter: str | None = None
    default: float = 0.0
    low: float = -math.inf
    high: float = math.inf


# The formula of each stands in `reference.py` (value) and, for the kernels, in `kernels/math.py`
# and `cpu.py` (value and derivative).
_FAMILIES = {
    "reverse_kl": _Family(),
    "forward_kl": _Family(),
    "jeffreys": _Family(),
    "jsd": _Family("beta", default=0.5, low=0.0, high=1.0),
}


def available_divergences() -> tuple[str, ...]:
    """The names that `divergence=` takes."""
    return tuple(_FAMILIES)


class Divergence:
    """A divergence between the student p and the teacher q, with its parameters.

    ================  ==================================================================
    name              value
    ================  ==================================================================
    ``reverse_kl``    KL(p||q) = sum_v p_v (log p_v - log q_v)
    ``forward_kl``    KL(q||p)
    ``jeffreys``      KL(p||q) + KL(q||p)
    ``jsd``           beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p;
                      beta = 0 is KL(q||p) and beta = 1 is KL(p||q), their limits after
                      division by beta (1-beta) (the convention of GKD, arXiv 2306.13649)
    ================  ==================================================================

    Args:
        name: one of `available_divergences()`.
        **params: `beta` in [0, 1] for ``jsd`` (default 0.5).

    Raises:
        ValueError: unknown name or parameter, or a parameter outside its range.
    """

    def __init__(self, name: str, **params: float) -> None:
        if name not in _FAMILIES:
            names = ", ".join(_FAMILIES)
            raise ValueError(f"divergence: unknown name {name!r}; available: {names}")
        family = _FAMILIES[name]
        for key, value in params.items():
            if key != family.parameter:
                takes = f"only {family.parameter!r}" if family.parameter else "no parameter"
                raise ValueError(f"divergence: {name!r} got {key!r}, it takes {takes}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not family.low <= value <= family.high:
                raise ValueError(
                    f"divergence: {name!r} got {key}={value!r}, which must be a number in "
                    f"[{family.low:g}, {family.high:g}]"
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
        """The kernel's name of this divergence and its parameter (0 where it has none)."""
        family = _FAMILIES[self.name]
        value = float(self.params.get(family.parameter or "", family.default))
        if self.name == "jsd" and value in (0.0, 1.0):
            return ("forward_kl" if value == 0.0 else "reverse_kl"), 0.0
        return self.name, value
