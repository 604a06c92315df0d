"""The divergences of the torch backend: values and slopes on buffers of probabilities.

`triton_backend/divergences.py` has the same formulas for Triton.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hybrid_kernels.divergences import Family
from hybrid_kernels.rows import LOWEST

Sums: TypeAlias = tuple[Tensor, Tensor]  # of terms and slopes, each `[r, 1]`


class Form(NamedTuple):
    """A divergence on block buffers, in terms of p, q and the log-ratio l.

    The slopes of its terms are dt/dlog p = p u + v, up to a multiple of p (which changes no logit
    gradient). `Family` says which of the two there are, and all else that holds of a divergence.

    Attributes:
        sums: (p, q, l, parameter, log p) -> the value and the sum of the slopes, each `[r, 1]`;
            leaves u in the buffer of l and -v in that of q. Of a tilted family S - 1 and log S, as
            `settle` wants them, with the buffers left alone: `tilt` fills them later.
        small_value: (p, q, l) -> `[r, 1]`, the value as a sum of positive terms, right near p = q.
        lost_sign: the sign with which 1 - sum q of the entries that take part enters it.
        lost_share: parameter -> the factor with which it enters the value of `sums`.
    """

    sums: Callable[[Tensor, Tensor, Tensor, float, Tensor], Sums]
    small_value: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    lost_sign: float = 0.0
    lost_share: Callable[[float], float] | None = None

    def compare(
        self, p: Tensor, q: Tensor, log_ratio: Tensor, a: float, log_p: Tensor, lost: Tensor | float
    ) -> Sums:
        """As `sums`, with what 1 - sum q of the entries that take part does to the value."""
        value, slope_sum = self.sums(p, q, log_ratio, a, log_p)
        if self.lost_share is not None:
            value = value + self.lost_share(a) * lost
        return value, slope_sum


def settle(
    family: Family, value: Tensor, slope_sum: Tensor, finite: Tensor, a: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a row's divergence makes of the sums of its terms and slopes, and its edge cases.

    Returns the value, the sum of slopes and, for Renyi's, the log S that its slopes need (else 0).
    S is 1 + sum (p^a q^(1-a) - p) where it is near 1; elsewhere a log-sum-exp, which stands in the
    place of the slopes' sum.

    Where both normalisers are `finite`, a NaN is the 0 * inf of a p that underflows, and means that
    the teacher forbids what the student may still say.
    """
    log_s = torch.zeros_like(value)
    if family.tilted:
        near = value.abs() < 0.5
        log_s = torch.where(near, value.clamp(-0.5, 0.5).log1p(), slope_sum)
        # Where the teacher forbids an entry the log-ratio is a huge number, for infinity.
        log_s = log_s.masked_fill(log_s > 1e20, math.inf)
        value, slope_sum = log_s / (a - 1), torch.where(log_s == math.inf, math.inf, 0.0)
    if family.diverges:
        infinite = (value.isnan() & finite) | (value == math.inf)
        value = torch.where(infinite, math.inf, value)
        slope_sum = torch.where(infinite, math.inf, slope_sum)
    # Comparisons lose sight of a NaN.
    value, slope_sum = (torch.where(finite, x, math.nan) for x in (value, slope_sum))
    return value, slope_sum, log_s


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value; a weight of 0 leaves nothing of an infinity."""
    return torch.where(weight == 0, 0.0, weight * value)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    # torch.dot would be faster on one row, and less exact: it adds a whole row up in one pass.
    return torch.linalg.vecdot(a, b)[:, None]


def _reverse_kl(p: Tensor, q: Tensor, log_ratio: Tensor, *_: object) -> Sums:
    value = row_dot(p, log_ratio)
    return value, value


def _forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor, *_: object) -> Sums:
    return -row_dot(q, log_ratio), -q.sum(-1, keepdim=True)


def _jeffreys(p: Tensor, q: Tensor, log_ratio: Tensor, *_: object) -> Sums:
    reverse = row_dot(p, log_ratio)
    return reverse - row_dot(q, log_ratio), reverse - q.sum(-1, keepdim=True)


def _mixture_log_ratio(log_ratio: Tensor, beta: float) -> Tensor:
    """log(m/p) = log(beta e^-l + 1 - beta), from the side where the exponential is at most 1."""
    weight = torch.where(log_ratio > 0, beta, 1 - beta)
    return log_ratio.abs().neg_().expm1_().mul_(weight).log1p_().sub_(log_ratio.clamp(max=0.0))


def _jsd(p: Tensor, q: Tensor, log_ratio: Tensor, beta: float, _: Tensor) -> Sums:
    log_m_over_p = _mixture_log_ratio(log_ratio, beta)
    teacher_side = row_dot(q, log_ratio.add_(log_m_over_p))
    u = torch.mul(log_m_over_p, beta - 1, out=log_ratio)
    student_side = row_dot(p, u)
    return student_side - beta * teacher_side, student_side


def _skew_reverse_kl(p: Tensor, q: Tensor, log_ratio: Tensor, a: float, _: Tensor) -> Sums:
    log_p_over_m = _mixture_log_ratio(log_ratio, 1 - a).neg_()
    value = row_dot(p, log_p_over_m)
    # log(p/m) - a p/m, which is 0 at p = q once a is added.
    u = torch.expm1(log_p_over_m, out=log_ratio).mul_(-a).add_(log_p_over_m)
    return value, row_dot(p, u)


def _skew_forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor, a: float, _: Tensor) -> Sums:
    log_q_over_m = _mixture_log_ratio(log_ratio, a).add_(log_ratio).neg_()
    value = row_dot(q, log_q_over_m)
    u = torch.expm1(log_q_over_m, out=log_ratio).mul_(a - 1)  # -(1-a) q/m, but for 1-a
    return value, row_dot(p, u)


def _alpha_terms(p: Tensor, q: Tensor, log_ratio: Tensor, a: float) -> Tensor:
    """The sum of a p + (1-a) q - p^a q^(1-a), over a (1-a): of positive terms.

    With x = -|l| a term is c (e^x - 1) - (e^(cx) - 1) times the larger of p and q, where c is a or
    1-a; near x = 0 less the parts of first order, which cancel.
    """
    below = log_ratio < 0
    c = torch.where(below, a, 1 - a)
    x = log_ratio.abs().neg_()
    cx = c * x
    near = torch.minimum(x, -cx.abs()) > -_NEAR
    terms = torch.expm1(x).mul_(c).sub_(torch.expm1(cx))
    if bool(near.any()) if near.device.type == "cpu" else True:
        x, cx = torch.where(near, x, 0.0), torch.where(near, cx, 0.0)
        terms = torch.where(near, _square(x).mul_(c).sub_(_square(cx)), terms)
    base = torch.where(below, q, p)
    terms = torch.where(base > 0, terms.mul_(base), 0.0)
    if a > 1:
        # Where the teacher forbids an entry, however small p, there is no limit.
        terms.masked_fill_(log_ratio > -LOWEST / 2, -math.inf)
    return terms.sum(-1, keepdim=True) / (a * (1 - a))


# Where the series of `_square` has seven digits.
_NEAR = 0.05


def _square(x: Tensor) -> Tensor:
    """e^x - 1 - x near 0."""
    series = x * (1 / 120)
    for factorial in (24, 6, 2):
        series.add_(1 / factorial).mul_(x)
    return series.mul_(x)


def _tilted(q: Tensor, exponent: Tensor, whole: Callable[[], Tensor]) -> None:
    """Leaves u = e^exponent - 1 in `exponent` and -v = 0 in q; where u would be a large number, for
    an entry whose p is next to nothing against `whole`, -1 and -whole."""
    plain = exponent.abs() < 30
    if exponent.device.type == "cpu" and bool(plain.all()):
        exponent.expm1_()
        q.zero_()
        return
    q.copy_(torch.where(plain, 0.0, whole())).neg_()
    exponent.copy_(torch.where(plain, torch.where(plain, exponent, 0.0).expm1_(), -1.0))


def _geometric(p: Tensor, q: Tensor, log_ratio: Tensor, a: float) -> Tensor:
    """p^a q^(1-a), from the side on which the exponential of 0 < a < 1 is at most 1."""
    below = log_ratio < 0
    base = torch.where(below, q, p)
    product = base * (torch.where(below, a, a - 1) * log_ratio).exp_()
    product = torch.where(base > 0, product, 0.0)
    # Where the teacher forbids an entry, however small p, a limit that no product has.
    return product.masked_fill_(log_ratio > -LOWEST / 2, math.inf if a > 1 else 0.0)


def _alpha(p: Tensor, q: Tensor, log_ratio: Tensor, a: float, _: Tensor) -> Sums:
    value = _alpha_terms(p, q, log_ratio, a)
    raw = log_ratio.clone()
    _tilted(q, log_ratio.mul_(a - 1), lambda: _geometric(p, q, raw, a))
    log_ratio.div_(a - 1)
    q.div_(a - 1)
    return value, row_dot(p, log_ratio) - q.sum(-1, keepdim=True)


def _renyi(p: Tensor, q: Tensor, log_ratio: Tensor, a: float, log_p: Tensor) -> Sums:
    """sum (p^a q^(1-a) - p), which is S - 1, and log S as a log-sum-exp."""
    exponent = (a - 1) * log_ratio
    plain = exponent.abs() < 30
    log_s = (exponent + log_p).logsumexp(-1, keepdim=True)
    terms = p * torch.where(plain, exponent, 0.0).expm1_()
    if not (plain.device.type == "cpu" and bool(plain.all())):
        terms = torch.where(plain, terms, _geometric(p, q, log_ratio, a) - p)
    return terms.sum(-1, keepdim=True), log_s


def tilt(p: Tensor, q: Tensor, log_ratio: Tensor, a: float, log_p: Tensor, log_s: Tensor) -> None:
    """Leaves u and -v of a tilted family in the buffers: of slopes a/(a-1) (p^a q^(1-a)/S - p),
    which sum to 0."""
    exponent = log_ratio.mul_(a - 1).sub_(log_s)
    _tilted(q, exponent, lambda: (exponent + log_p).exp_())
    log_ratio.mul_(a / (a - 1))
    q.mul_(a / (a - 1))


def _tv(p: Tensor, q: Tensor, log_ratio: Tensor, *_: object) -> Sums:
    near = log_ratio.abs() < 0.5
    terms = torch.where(near, p * torch.where(near, -log_ratio, 0.0).expm1_(), p - q).abs_()
    u = log_ratio.sign_().mul_(0.5)
    return 0.5 * terms.sum(-1, keepdim=True), row_dot(p, u)


def _excess(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l for |l| < 0.5, by its series: the difference itself would cancel."""
    series = torch.full_like(log_ratio, 1.0 / 362880)
    for factorial in (40320, 5040, 720, 120, 24, 6, 2):
        series.mul_(-log_ratio).add_(1.0 / factorial)
    return series.mul_(log_ratio).mul_(log_ratio)


def _reverse_small(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    near = log_ratio.abs() < 0.5
    return torch.where(near, p * _excess(log_ratio), q - p + p * log_ratio).sum(-1, keepdim=True)


def _forward_small(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    return _reverse_small(q, p, -log_ratio)


def _jeffreys_small(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    near = log_ratio.abs() < 0.5
    difference = torch.where(near, -p * torch.expm1(-log_ratio), p - q)
    return (difference * log_ratio).sum(-1, keepdim=True)


FORMS = {
    "reverse_kl": Form(_reverse_kl, _reverse_small, lost_sign=1.0),
    "forward_kl": Form(_forward_kl, _forward_small, lost_sign=-1.0),
    "jeffreys": Form(_jeffreys, _jeffreys_small),
    "jsd": Form(_jsd),
    "skew_reverse_kl": Form(_skew_reverse_kl),
    "skew_forward_kl": Form(_skew_forward_kl),
    "alpha": Form(_alpha, lost_share=lambda a: 1 / a),
    "renyi": Form(_renyi),
    "tv": Form(_tv),
}
