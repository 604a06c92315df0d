"""The divergences of the torch backend: values and slopes on buffers of probabilities.

`kernels/math.py` has the same formulas for Triton, and says where they come from.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.rows import LOWEST


class Form(NamedTuple):
    """A divergence on block buffers, in terms of p, q and the log-ratio l.

    The slopes of its terms are dt/dlog p = p g - h, up to a multiple of p (which changes no logit
    gradient), where the g or the h may be absent.

    Attributes:
        sums: (p, q, l, parameter) -> the value and the sum of the slopes, each `[r, 1]`; leaves g
            in the buffer of l and h in that of q.
        linear: whether both sums are linear in p and do not read q: p may be unnormalised.
        has_g: whether the slopes have p g.
        has_h: whether the slopes have -h.
        diverges: whether a term is infinite where q = 0 < p.
        small_value: (p, q, l) -> `[r, 1]`, the value as a sum of positive terms, right near p = q.
        lost_sign: the sign with which 1 - sum q of the entries that take part enters it.
        lost_share: parameter -> the factor with which it enters `sums`.
        outer: (value, parameter) -> the divergence as a function of the sum of its terms, and the
            derivative of that function.
    """

    sums: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    linear: bool = False
    has_g: bool = True
    has_h: bool = False
    diverges: bool = False
    small_value: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    lost_sign: float = 0.0
    lost_share: Callable[[float], float] | None = None
    outer: Callable[[Tensor, float], tuple[Tensor, Tensor]] | None = None


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value; a weight of 0 leaves nothing of an infinity."""
    return torch.where(weight == 0, 0.0, weight * value)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    # torch.dot would be faster on one row, and less exact: it adds a whole row up in one pass.
    return torch.linalg.vecdot(a, b)[:, None]


def _reverse_kl(p: Tensor, q: Tensor, log_ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    value = row_dot(p, log_ratio)
    return value, value


def _forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return -row_dot(q, log_ratio), -q.sum(-1, keepdim=True)


def _jeffreys(p: Tensor, q: Tensor, log_ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    reverse = row_dot(p, log_ratio)
    return reverse - row_dot(q, log_ratio), reverse - q.sum(-1, keepdim=True)


def _mixture_log_ratio(log_ratio: Tensor, beta: float) -> Tensor:
    """log(m/p) = log(beta e^-l + 1 - beta), from the side where the exponential is at most 1."""
    weight = torch.where(log_ratio > 0, beta, 1 - beta)
    return log_ratio.abs().neg_().expm1_().mul_(weight).log1p_().sub_(log_ratio.clamp(max=0.0))


def _jsd(p: Tensor, q: Tensor, log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m_over_p = _mixture_log_ratio(log_ratio, beta)
    teacher_side = row_dot(q, log_ratio.add_(log_m_over_p))
    g = torch.mul(log_m_over_p, beta - 1, out=log_ratio)
    student_side = row_dot(p, g)
    return student_side - beta * teacher_side, student_side


def _skew_reverse_kl(p: Tensor, q: Tensor, log_ratio: Tensor, a: float) -> tuple[Tensor, Tensor]:
    log_p_over_m = _mixture_log_ratio(log_ratio, 1 - a).neg_()
    value = row_dot(p, log_p_over_m)
    # log(p/m) - a p/m, which is 0 at p = q once a is added.
    g = torch.expm1(log_p_over_m, out=log_ratio).mul_(-a).add_(log_p_over_m)
    return value, row_dot(p, g)


def _skew_forward_kl(p: Tensor, q: Tensor, log_ratio: Tensor, a: float) -> tuple[Tensor, Tensor]:
    log_q_over_m = _mixture_log_ratio(log_ratio, a).add_(log_ratio).neg_()
    value = row_dot(q, log_q_over_m)
    g = torch.expm1(log_q_over_m, out=log_ratio).mul_(a - 1)  # -(1-a) q/m, but for 1-a
    slope_sum = row_dot(p, g)
    return value + 0.0 * slope_sum, slope_sum  # NaN where p is, which the terms don't read


def _alpha(p: Tensor, q: Tensor, log_ratio: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Terms (a p + (1-a) q - p^a q^(1-a)) / (a (1-a)): positive, and right where p is near q."""
    if log_ratio.device.type == "cpu":
        furthest = float(log_ratio.abs().max()) if log_ratio.numel() else 0.0
        if furthest * max(1.0, abs(a - 1)) < 60:
            # Nothing can overflow: no entry has to be told from others.
            weight = torch.expm1(-log_ratio).mul_(1 - a)
            g = torch.expm1(log_ratio.mul_(a - 1), out=log_ratio)
            value = row_dot(p, weight.sub_(g)).div_(a * (1 - a))
            q.zero_()
            return value, row_dot(p, g.div_(a - 1))
    exponent = (a - 1) * log_ratio
    near = torch.maximum(exponent.abs(), log_ratio.abs()) < 0.5
    # p^a q^(1-a), from the side on which the exponential of 0 < a < 1 is at most 1.
    below = log_ratio < 0
    base = torch.where(below, q, p)
    geometric = base * torch.where(below, a * log_ratio, exponent).exp_()
    geometric.masked_fill_(base <= 0, 0.0)
    # Where the teacher forbids an entry, however small p, a limit that no product has.
    geometric.masked_fill_(log_ratio > -LOWEST / 2, math.inf if a > 1 else 0.0)
    bounded = torch.where(near, log_ratio, 0.0)
    series = p * ((1 - a) * _excess(bounded) - _excess((1 - a) * bounded))
    terms = torch.where(near, series, a * p + (1 - a) * q - geometric)
    log_ratio.copy_(torch.where(near, exponent.expm1_(), -1.0)).div_(a - 1)
    q.copy_(torch.where(near, 0.0, geometric)).div_(1 - a)
    slope_sum = row_dot(p, log_ratio) - q.sum(-1, keepdim=True)
    return terms.sum(-1, keepdim=True) / (a * (1 - a)), slope_sum


def _renyi(alpha_divergence: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """log(S)/(a-1) of S = 1 - a (1-a) A, and its derivative a/S with respect to A."""
    change = (a * (a - 1) * alpha_divergence).clamp(min=-1.0)
    return change.log1p() / (a - 1), a / (1 + change)


def _tv(p: Tensor, q: Tensor, log_ratio: Tensor, _: float) -> tuple[Tensor, Tensor]:
    near = log_ratio.abs() < 0.5
    terms = torch.where(near, p * torch.where(near, -log_ratio, 0.0).expm1_(), p - q).abs_()
    value = 0.5 * terms.sum(-1, keepdim=True)
    g = log_ratio.sign_().mul_(0.5)
    return value, row_dot(p, g) + 0.0 * value  # NaN where l is, of which no sign tells


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
    "reverse_kl": Form(
        _reverse_kl, linear=True, diverges=True, small_value=_reverse_small, lost_sign=1.0
    ),
    "forward_kl": Form(
        _forward_kl, has_g=False, has_h=True, small_value=_forward_small, lost_sign=-1.0
    ),
    "jeffreys": Form(_jeffreys, has_h=True, diverges=True, small_value=_jeffreys_small),
    "jsd": Form(_jsd),
    "skew_reverse_kl": Form(_skew_reverse_kl),
    "skew_forward_kl": Form(_skew_forward_kl),
    "alpha": Form(_alpha, has_h=True, lost_share=lambda a: 1 / a),
    "renyi": Form(_alpha, has_h=True, lost_share=lambda a: 1 / a, outer=_renyi),
    "tv": Form(_tv),
}
