"""The divergences on the torch backend: values and slopes from buffers of probabilities.

`triton_backend/divergences.py` has the same formulas for Triton.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hybrid_kernels.divergences import Family
from hybrid_kernels.rows import LEAST

Sums: TypeAlias = tuple[Tensor, Tensor]  # the sums of terms and of slopes, each `[r, 1]`


class Entries(NamedTuple):
    """Student and teacher in the buffers of a block, each `[r, V]` or `[r, K + 1]`.

    Attributes:
        p, q: the probabilities.
        log_ratio: l = log p - log q, 0 where both are -inf.
        log_p: log p. Without guards it is valid for Renyi's divergence only.
        log_q: log q with guards against infinities; None without, where all logits are finite or
            the result becomes NaN.
    """

    p: Tensor
    q: Tensor
    log_ratio: Tensor
    log_p: Tensor
    log_q: Tensor | None = None

    def of_some(self, probability: Tensor, value: Tensor) -> Tensor:
        """A factor of a probability; with guards, 0 where the probability is 0."""
        return value if self.log_q is None else value.masked_fill(probability == 0, 0.0)

    def dot(self, probability: Tensor, value: Tensor) -> Tensor:
        return row_dot(probability, self.of_some(probability, value))


class Form(NamedTuple):
    """The formulas of a divergence.

    The slopes of its terms are dt/dlog p = p u + v, up to a multiple of p (which changes no logit
    gradient). `Family` says whether u and v exist, and describes the divergence otherwise.

    Attributes:
        sums: (entries, parameter) -> the value and the sum of the slopes, each `[r, 1]`; leaves u
            in the buffer of l and -v in that of q. A tilted family instead returns S - 1 and log S,
            as `settle` expects, and leaves the buffers to `tilt`.
        small_value: entries -> `[r, 1]`, the value as a sum of positive terms, exact near p = q.
        lost_sign: the sign of 1 - sum q in `small_value`, for a q that was raised to a floor.
        lost_share: parameter -> the factor of 1 - sum q in the value of `sums`.
    """

    sums: Callable[[Entries, float], Sums]
    small_value: Callable[[Entries], Tensor] | None = None
    lost_sign: float = 0.0
    lost_share: Callable[[float], float] | None = None

    def compare(self, entries: Entries, a: float, lost: Tensor | float) -> Sums:
        """Like `sums`, with `lost` = 1 - sum q accounted for in the value."""
        value, slope_sum = self.sums(entries, a)
        if self.lost_share is not None:
            value = value + self.lost_share(a) * lost
        return value, slope_sum


def settle(
    family: Family, value: Tensor, slope_sum: Tensor, finite: Tensor, a: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns a row's sums into its divergence and sum of slopes, edge cases included.

    Returns the value, the sum of slopes and, for Renyi's divergence, the log S that its slopes need
    (0 for others). For Renyi's, `value` is S - 1 = sum (p^a q^(1-a) - p), used where S is near 1,
    and `slope_sum` is log S as a log-sum-exp, used elsewhere.

    Where both normalisers are `finite`, a NaN comes from 0 * inf with a probability that
    underflows: one side forbids an entry that the other allows, and the divergence is infinite.
    """
    log_s = torch.zeros_like(value)
    if family.tilted:
        near = value.abs() < 0.5
        log_s = torch.where(near, value.clamp(-0.5, 0.5).log1p(), slope_sum)
        value, slope_sum = log_s / (a - 1), _choose(log_s.isinf(), math.inf, 0.0, log_s)
    if family.one_sweep:
        value, slope_sum = (torch.where(x.isnan(), math.inf, x) for x in (value, slope_sum))
    # A NaN does not survive comparisons, so rows without finite normalisers are set to it.
    value, slope_sum = (torch.where(finite, x, math.nan) for x in (value, slope_sum))
    return value, slope_sum, log_s


def keep_some(probability: Tensor, log_probability: Tensor) -> None:
    """Replaces a 0 by the smallest number where the probability is 0 only in its dtype, and not in
    double precision."""
    if probability.dtype != torch.float64:
        hidden = (probability == 0) & (log_probability > LEAST)
        probability.masked_fill_(hidden, 2.0**-149)


def _choose(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """`torch.where` of two numbers, in the dtype of a tensor and not in torch's default dtype."""
    return torch.where(condition, like.new_full((), a), b)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    # torch.dot would be a third faster for one row. But it is BLAS, which on some CPUs (an AMD EPYC
    # with MKL) adds all products to one sum, and so loses 2e-5 of the sum of 50,257.
    return torch.linalg.vecdot(a, b)[:, None]


def _reverse_kl(entries: Entries, _: float) -> Sums:
    value = entries.dot(entries.p, entries.log_ratio)
    return value, value


def _forward_kl(entries: Entries, _: float) -> Sums:
    return -entries.dot(entries.q, entries.log_ratio), -entries.q.sum(-1, keepdim=True)


def _jeffreys(entries: Entries, _: float) -> Sums:
    reverse, slope_sum = _reverse_kl(entries, 0.0)[0], -entries.q.sum(-1, keepdim=True)
    return reverse - entries.dot(entries.q, entries.log_ratio), reverse + slope_sum


def _mixture_log_ratios(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(m/p), in the buffer of l, and log(m/q), for m = beta q + (1-beta) p.

    For the larger of p and q it is s = log(c e^-|l| + 1 - c), where c is the weight of the smaller;
    for the smaller it is |l| + s. Each comes from s, because |l| + s rounds s away if l is large.
    """
    c = _choose(log_ratio > 0, beta, 1 - beta, log_ratio)
    s = log_ratio.abs().neg_().expm1_().mul_(c).log1p_()
    above = log_ratio.clamp(min=0.0)
    below = log_ratio.clamp_(max=0.0)
    return torch.sub(s, below, out=log_ratio), above.add_(s)


def _jsd(entries: Entries, beta: float) -> Sums:
    log_m_over_p, log_m_over_q = _mixture_log_ratios(entries.log_ratio, beta)
    u = log_m_over_p.mul_(beta - 1)
    student_side = entries.dot(entries.p, u)
    return student_side - beta * entries.dot(entries.q, log_m_over_q), student_side


def _skew_reverse_kl(entries: Entries, a: float) -> Sums:
    log_p_over_m = _mixture_log_ratios(entries.log_ratio, 1 - a)[0].neg_()
    value = entries.dot(entries.p, log_p_over_m)
    # u is log(p/m) - a p/m, plus the constant a, which makes it 0 at p = q.
    u = log_p_over_m.add_(log_p_over_m.expm1(), alpha=-a)
    return value, entries.dot(entries.p, u)


def _skew_forward_kl(entries: Entries, a: float) -> Sums:
    log_q_over_m = _mixture_log_ratios(entries.log_ratio, a)[1].neg_()
    value = entries.dot(entries.q, log_q_over_m)
    u = torch.expm1(log_q_over_m, out=entries.log_ratio).mul_(a - 1)  # -(1-a) q/m + (1-a)
    return value, entries.dot(entries.p, u)


def _alpha_terms(entries: Entries, a: float) -> Tensor:
    """The sum of a p + (1-a) q - p^a q^(1-a), divided by a (1-a), so that terms are positive.

    With x = -|l| a term is c (e^x - 1) - (e^(cx) - 1) times the larger of p and q, where c is a or
    1-a. Near x = 0 both parts are taken without their first order, which cancels.
    """
    p, q, log_ratio = entries[:3]
    below = log_ratio < 0
    c = _choose(below, a, 1 - a, log_ratio)
    x = log_ratio.abs().neg_()
    cx = c * x
    near = torch.minimum(x, -cx.abs()) > -_NEAR
    terms = torch.expm1(x).mul_(c).sub_(torch.expm1(cx))
    if bool(near.any()) if near.device.type == "cpu" else True:
        x, cx = torch.where(near, x, 0.0), torch.where(near, cx, 0.0)
        terms = torch.where(near, _square(x).mul_(c).sub_(_square(cx)), terms)
    terms.mul_(torch.where(below, q, p))
    if not 0 < a < 1:
        terms = torch.where(_is_hidden(entries, a), -_log_geometric(entries, a).exp_(), terms)
    return terms.sum(-1, keepdim=True) / (a * (1 - a))


# For |x| up to this, the series of `_square` is accurate to seven digits.
_NEAR = 0.05


def _square(x: Tensor) -> Tensor:
    """e^x - 1 - x near 0."""
    series = x * (1 / 120)
    for factorial in (24, 6, 2):
        series.add_(1 / factorial).mul_(x)
    return series.mul_(x)


def _tilted(q: Tensor, exponent: Tensor, whole: Callable[[], Tensor]) -> None:
    """Leaves u = e^exponent - 1 in `exponent` and -v = 0 in q.

    Where u would be very large, because p is tiny compared with `whole`, u is -1 and -v is -whole.
    """
    plain = exponent.abs() < 30
    if exponent.device.type == "cpu" and bool(plain.all()):
        exponent.expm1_()
        q.zero_()
        return
    q.copy_(torch.where(plain, 0.0, whole())).neg_()
    exponent.copy_(torch.where(plain, torch.where(plain, exponent, 0.0).expm1_(), -1.0))


def _from_larger(entries: Entries, a: float) -> tuple[Tensor, Tensor]:
    """The larger of p and q, and log p^a q^(1-a) minus its logarithm, at most 0 for 0 < a < 1."""
    below = entries.log_ratio < 0
    larger = torch.where(below, entries.q, entries.p)
    return larger, _choose(below, a, a - 1, entries.log_ratio) * entries.log_ratio


def _is_hidden(entries: Entries, a: float) -> Tensor:
    """Where p^a q^(1-a) may be large although the larger of p and q has (almost) underflowed."""
    larger, added = _from_larger(entries, a)
    return (larger < 1e-30) & (added > 20)


def _log_geometric(entries: Entries, a: float) -> Tensor:
    """log p^a q^(1-a); without guards, NaN where a logarithm is infinite."""
    _, _, log_ratio, log_p, log_q = entries
    if log_q is None:
        return (a - 1) * log_ratio + log_p
    log_larger = torch.where(log_ratio < 0, log_q, log_p)
    return log_larger.clamp_(min=torch.finfo(log_p.dtype).min) + _from_larger(entries, a)[1]


def _geometric(entries: Entries, a: float) -> Tensor:
    """p^a q^(1-a)."""
    larger, added = _from_larger(entries, a)
    product = larger * added.exp_()
    if 0 < a < 1:
        return product
    return torch.where(_is_hidden(entries, a), _log_geometric(entries, a).exp_(), product)


def _alpha(entries: Entries, a: float) -> Sums:
    value = _alpha_terms(entries, a)
    p, q, log_ratio = entries[:3]
    raw = entries._replace(log_ratio=log_ratio.clone())
    _tilted(q, log_ratio.mul_(a - 1), lambda: _geometric(raw, a))
    log_ratio.div_(a - 1)
    q.div_(a - 1)
    return value, entries.dot(p, log_ratio) - q.sum(-1, keepdim=True)


def _renyi(entries: Entries, a: float) -> Sums:
    """sum (p^a q^(1-a) - p), which is S - 1, and log S as a log-sum-exp."""
    exponent = (a - 1) * entries.log_ratio
    plain = exponent.abs() < 30
    log_s = _log_geometric(entries, a).logsumexp(-1, keepdim=True)
    terms = entries.p * torch.where(plain, exponent, 0.0).expm1_()
    if not (plain.device.type == "cpu" and bool(plain.all())):
        terms = torch.where(plain, terms, _geometric(entries, a) - entries.p)
    value = terms.sum(-1, keepdim=True)
    # Without guards an infinity shows only in log S.
    return value if entries.log_q is not None else value + 0.0 * log_s, log_s


def tilt(entries: Entries, a: float, log_s: Tensor) -> None:
    """Leaves u and -v of a tilted family in the buffers.

    The slopes are a/(a-1) (p^a q^(1-a)/S - p), which sum to 0.
    """
    q, log_ratio = entries.q, entries.log_ratio
    raw = entries._replace(log_ratio=log_ratio.clone())
    exponent = log_ratio.mul_(a - 1).sub_(log_s)
    # The share of an entry is at most 1, even if large logarithms are rounded.
    _tilted(q, exponent, lambda: (_log_geometric(raw, a) - log_s).clamp_(max=0.0).exp_())
    log_ratio.mul_(a / (a - 1))
    q.mul_(a / (a - 1))


def _tv(entries: Entries, _: float) -> Sums:
    p, q, log_ratio = entries[:3]
    near = log_ratio.abs() < 0.5
    terms = torch.where(near, p * torch.where(near, -log_ratio, 0.0).expm1_(), p - q).abs_()
    u = log_ratio.sign_().mul_(0.5)
    return 0.5 * terms.sum(-1, keepdim=True), entries.dot(p, u)


def _excess(log_ratio: Tensor) -> Tensor:
    """exp(-l) - 1 + l for |l| < 0.5, from its series, since the difference would cancel."""
    series = torch.full_like(log_ratio, 1.0 / 362880)
    for factorial in (40320, 5040, 720, 120, 24, 6, 2):
        series.mul_(-log_ratio).add_(1.0 / factorial)
    return series.mul_(log_ratio).mul_(log_ratio)


def _reverse_small(entries: Entries) -> Tensor:
    p, q, log_ratio = entries[:3]
    far = q - p + p * entries.of_some(p, log_ratio)
    terms = torch.where(log_ratio.abs() < 0.5, p * _excess(log_ratio), far)
    return terms.sum(-1, keepdim=True)


def _forward_small(entries: Entries) -> Tensor:
    p, q, log_ratio = entries[:3]
    return _reverse_small(entries._replace(p=q, q=p, log_ratio=-log_ratio))


def _jeffreys_small(entries: Entries) -> Tensor:
    p, q, log_ratio = entries[:3]
    far = p * entries.of_some(p, log_ratio) - q * entries.of_some(q, log_ratio)
    terms = torch.where(log_ratio.abs() < 0.5, -p * torch.expm1(-log_ratio) * log_ratio, far)
    return terms.sum(-1, keepdim=True)


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
