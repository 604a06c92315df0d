"""Top-K teachers on the torch backend: the K + 1 categories of a block of rows.

A divergence is that of two coarse distributions, on the support and on the tail, as
`triton_backend/topk.py` says, which has the formulas for Triton. Everything here is `[r, K]`;
what needs a sweep over the vocabulary, the normaliser and the mass outside the support, comes from
the caller.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import (
    FIELDS,
    HIDDEN_TAIL,
    LOWEST,
    SMALL_DIVERGENCE,
    SMALLEST_TAIL,
    Coefficients,
    Rows,
    weighted,
)
from hybrid_kernels.torch_backend.divergences import FORMS, Entries, settle, tilt

# Rows that are compared at once, on the CPU; and entries elsewhere, where launches are what costs.
_ROWS = 256
_ENTRIES = 4 << 20


class Comparison(NamedTuple):
    """What the teachers add to a block, columns `[r, 1]` unless said otherwise.

    Attributes:
        divergence: the weighted sum over the members.
        teacher_log_prob: log q(y), NaN where unknown.
        correction: of the advantage, for tokens outside the support.
        student_mass: P on the support.
        teacher_mass: Q on the support.
        pull: `[r, K]`, dD/dz on the support.
        tail_pull: dD/dz outside the support, over p.
    """

    divergence: Tensor
    teacher_log_prob: Tensor | None
    correction: Tensor | None
    student_mass: Tensor
    teacher_mass: Tensor
    pull: Tensor
    tail_pull: Tensor


class Supports:
    """The supports of all rows: what sweeps over the vocabulary tell of them, and what follows.

    Attributes:
        counts: `[N, K]` bool, the ids that count.
        full: `[N, 1]` bool, whether nothing is outside.
        index: `[N, K]` int64, those ids; 0 where none counts.
        x: `[N, K]`, z - max z on the support.
        outside: `[N, 1]`, sum exp((z - max z)/T) outside.
        log_prob: `[N, 1]`, the coefficient of dlog p(y)/dz that stands for all but the entropy in
            the gradient outside the support: what the divergence pulls there is a multiple of p.
        constant: `[N, 1]`, the gradient outside the support over p, less the entropy's own term.
        gradient: `[N, K]`, the gradient on the support, less 1[v = y].
        exponentials: `[O, I, V]`, where exp((z - max z)/T) is to be kept; None where nowhere.
    """

    def __init__(self, rows: Rows, size: int | Tensor) -> None:
        """`size` is that of the whole vocabulary, of which `rows` may have a part."""
        assert rows.support is not None
        ids = rows.support.long()
        self.rows = rows
        self.impossible = (ids < -1) | (ids >= size)
        self.counts = first_of_each(ids) & ~self.impossible
        self.full = self.counts.sum(-1, keepdim=True) >= size
        self.index = torch.where(self.counts, ids, 0)
        self.x = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        self.outside = torch.zeros((len(ids), 1), dtype=torch.float32, device=ids.device)
        self.compared: list[Comparison] = []
        self.exponentials: Tensor | None = None

    def compare(self, statistics: Tensor) -> None:
        """Fills the fields that depend on the teachers."""
        count, size = self.index.shape
        step = _ROWS if self.index.device.type == "cpu" else max(1, _ENTRIES // size)
        for start in range(0, count, step):
            span = slice(start, start + step)
            own, ids = statistics[:, span], self.rows.token_ids
            compared = compare(
                self.rows,
                span,
                self.x[span],
                own[FIELDS.student_lse][:, None],
                self.outside[span],
                self.counts[span],
                self.full[span],
                None if ids is None else ids[span, None],
                None if ids is None else own[FIELDS.log_prob][:, None],
            )
            self.compared.append(compared)
            # (On the CPU such ids were an error before.)
            impossible = self.impossible[span].any(-1, keepdim=True)
            own[FIELDS.divergence] = compared.divergence.masked_fill(impossible, torch.nan)[:, 0]
            own[FIELDS.student_mass] = compared.student_mass[:, 0]
            own[FIELDS.teacher_mass] = compared.teacher_mass[:, 0]
            if compared.teacher_log_prob is not None:
                own[FIELDS.teacher_log_prob] = compared.teacher_log_prob[:, 0]
            if compared.correction is not None:
                own[FIELDS.tail_correction] = compared.correction[:, 0]
        if self.rows.valid is not None:
            statistics.masked_fill_(~self.rows.valid, 0.0)

    def finish(self, statistics: Tensor, coefficients: Coefficients) -> Coefficients:
        """Fills `log_prob`, `constant` and `gradient`; returns the coefficients with the correction
        in them."""
        c_div, c_logp, c_ent = coefficients
        lse, entropy = statistics[FIELDS.student_lse][:, None], statistics[FIELDS.entropy][:, None]
        log_prob = torch.zeros_like(lse)
        log_p = torch.where(self.x > LOWEST, self.x / self.rows.temperature_of() - lse, LOWEST)
        if c_div is not None and self.rows.corrects_tail:
            own = weighted(c_div, statistics[FIELDS.tail_correction][:, None])
            c_logp = own if c_logp is None else c_logp + own
        inner = torch.zeros_like(self.x)
        if c_logp is not None:
            log_prob = log_prob + c_logp
            inner = inner - c_logp
        if c_ent is not None:
            inner = inner - c_ent * (log_p + entropy)
        self.gradient = log_p.exp() * inner
        if c_div is not None:
            pull = torch.cat([part.pull for part in self.compared])
            tail_pull = torch.cat([part.tail_pull for part in self.compared])
            self.gradient += weighted(c_div, pull)
            log_prob = log_prob - weighted(c_div, tail_pull)
        self.log_prob, self.constant = log_prob, -log_prob
        if c_ent is not None:
            self.constant = self.constant + c_ent * (lse - entropy)
        return Coefficients(c_div, c_logp, c_ent)

    def write(self, out: Tensor, span: slice) -> None:
        """Writes the gradient on the support of some rows `[r, V]` over what is there."""
        overwrite(out, self.index[span], self.counts[span], self.gradient[span])


def overwrite(out: Tensor, index: Tensor, kept: Tensor, values: Tensor) -> None:
    """Writes the `[..., K]` values that are kept over entries of the last dimension of `out`, and
    nothing else. The index of what is dropped is 0."""
    # What is dropped writes the same as one that is kept; where nothing is, all as it was.
    first = kept.to(torch.int8).argmax(-1, keepdim=True)
    some = kept.gather(-1, first)
    index = torch.where(kept, index, index.gather(-1, first))
    instead = torch.where(some, values.gather(-1, first), out[..., :1])
    out.scatter_(-1, index, torch.where(kept, values, instead))


def first_of_each(ids: Tensor) -> Tensor:
    """Bool `[r, K]`: ids that are no padding and did not occur before."""
    ordered, order = ids.sort(dim=-1, stable=True)
    repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.empty_like(repeated).scatter_(-1, order, ~repeated) & (ids >= 0)


def tail_of_teacher(log_q: Tensor, q: Tensor, resolution: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tail's mass 1 - sum q, as it comes out and as it is taken, and sum q; each `[r, 1]`.

    1 - q_max comes from expm1, so that a tail of 1e-12 is not lost. One that is smaller than the
    rounding of the log-probabilities is taken as what that hides.
    """
    top, first = log_q.max(-1, keepdim=True)
    others = q.scatter(-1, first, 0.0).sum(-1, keepdim=True)
    spread = torch.where(q > 0, q * log_q.abs(), 0.0).sum(-1, keepdim=True)
    tail = -torch.expm1(top) - others
    taken = torch.where(tail <= spread * resolution, max(resolution, HIDDEN_TAIL), tail)
    return tail, taken, others + top.exp()


def compare(
    rows: Rows,
    span: slice,
    x: Tensor,
    lse: Tensor,
    tail_sum: Tensor,
    kept: Tensor,
    full: Tensor,
    token: Tensor | None,
    token_log_p: Tensor | None,
) -> Comparison:
    """Compares a block.

    Args:
        rows: the problem.
        span: the block's rows.
        x: `[r, K]`, z - max z on the support.
        lse: log sum exp((z - max z)/T).
        tail_sum: sum exp((z - max z)/T) outside the support.
        kept: `[r, K]`, which of the support count.
        full: `[r, 1]`, whether nothing is outside.
        token: `[r, 1]` sampled ids, or None.
        token_log_p: log p of them.
    """
    assert rows.support is not None
    inv_t, total = 1.0 / rows.temperature_of(span), sum(rows.shares)
    # In which the lowest logit over the smallest temperature is a number. Not all devices have it.
    dtype = torch.float64 if x.device.type == "cpu" else torch.float32
    x, lse, tail_sum = x.to(dtype), lse.to(dtype), tail_sum.to(dtype)
    log_p = torch.where(kept, x * inv_t - lse, -torch.inf)
    own = torch.cat([log_p, tail_sum.log() - lse], -1)
    student_mass = log_p.exp().sum(-1, keepdim=True) + 0.0 * lse  # NaN where the row is
    part = torch.cat([kept, ~full], -1)
    if rows.tail == "renormalize":
        own = torch.where(part, own - log_p.logsumexp(-1, keepdim=True), -torch.inf)
        part[:, -1] = False
    own = torch.where(part, own, -torch.inf)
    found = None
    if token is not None:
        found = (rows.support[span] == token) & kept
    value = pull = tail_pull = teacher_mass = log_q_token = rho = 0.0
    for share, log_probs in zip(rows.shares, rows.teachers, strict=True):
        log_q = torch.where(kept, log_probs[span].to(dtype), -torch.inf)
        member = _compare_member(rows, log_q, own, part, lse)
        if found is not None:
            floor = -torch.inf if rows.teacher_floor is None else rows.teacher_floor
            of_token = torch.where(found, log_q.clamp(min=floor), 0.0).sum(-1, keepdim=True)
            log_q_token = log_q_token + share * of_token
        value = value + share * member.divergence
        pull = pull + share * member.pull
        tail_pull = tail_pull + share * member.tail_pull
        teacher_mass = teacher_mass + share / total * member.mass
        rho = rho + share * member.rho
    log_q_token, correction = _token(rows, span, found, log_q_token, token_log_p, rho)
    if rows.tail != "bucket":
        tail_pull = torch.zeros_like(lse)
    assert isinstance(value, Tensor)
    assert isinstance(pull, Tensor)
    assert isinstance(tail_pull, Tensor)
    assert isinstance(teacher_mass, Tensor)
    return Comparison(
        value.float(),
        None if log_q_token is None else log_q_token.float(),
        None if correction is None else correction.float(),
        student_mass.float(),
        teacher_mass.float(),
        pull.float(),
        tail_pull.float(),
    )


class _Member(NamedTuple):
    """What one teacher adds, before its share: as in `Comparison`; the mass on the support; and rho
    of the tail, NaN where the student forbids it."""

    divergence: Tensor
    pull: Tensor
    tail_pull: Tensor
    mass: Tensor
    rho: Tensor


def _compare_member(rows: Rows, log_q: Tensor, own: Tensor, part: Tensor, lse: Tensor) -> _Member:
    """Compares log q `[r, K]` with log p `[r, K + 1]`, the last one the tail's; `part` are the
    categories that take part."""
    family, floor = FAMILIES[rows.divergence], rows.teacher_floor
    raw_tail, tail_q, mass = tail_of_teacher(log_q, log_q.exp(), rows.resolution)
    raw_q = torch.cat([log_q.exp(), raw_tail], -1)
    their = torch.cat([log_q, tail_q.log()], -1)
    # What both sides forbid is left out, and not raised to the floor.
    some = part & ((own > -torch.inf) | (their > -torch.inf))
    if floor is not None:
        their = torch.where(some, their.clamp(min=floor), -torch.inf)
    if rows.tail == "renormalize":
        their = their - their[:, :-1].logsumexp(-1, keepdim=True)
        raw_q = torch.where(part, their.exp(), 0.0)
    p, q = own.exp(), torch.where(some, their.exp(), 0.0)
    log_ratio = torch.where(some, own - their, 0.0)
    rho = torch.where(p[:, -1:] > 0, log_ratio[:, -1:], torch.nan)
    entries = Entries(p, q, log_ratio, own, torch.where(some, their, -torch.inf))
    # (NaN where a side that is renormalised has no mass on the support.)
    finite = (mass + lse + (p + q).sum(-1, keepdim=True)).isfinite()
    lost = (raw_q - q).sum(-1, keepdim=True)
    value, slope_sum = _sums(rows, entries, lost, finite)
    slopes = p * entries.of_some(p, log_ratio) if family.has_u else torch.zeros_like(p)
    if family.has_v:
        slopes = slopes - q
    slopes = slopes - p * slope_sum
    # Of an empty tail no entry is left to have a slope.
    per_p = torch.where(p[:, -1:] >= SMALLEST_TAIL, slopes[:, -1:] / p[:, -1:], 0.0)
    return _Member(value, slopes[:, :-1], per_p, mass, rho)


def _sums(rows: Rows, entries: Entries, lost: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Value and sum of slopes; leaves u and -v as `Form.sums` does."""
    form, family, a = FORMS[rows.divergence], FAMILIES[rows.divergence], rows.parameter
    small = None
    if form.small_value is not None:
        small = form.small_value(entries) + form.lost_sign * lost
    value, slope_sum = form.compare(entries, a, lost)
    value, slope_sum, log_s = settle(family, value, slope_sum, finite, a)
    if family.tilted:
        tilt(entries, a, log_s)
    if small is not None:
        value = torch.where(value < SMALL_DIVERGENCE, small, value)
    return value, slope_sum


def _token(
    rows: Rows,
    span: slice,
    found: Tensor | None,
    log_q: Tensor | float,
    log_p: Tensor | None,
    rho: Tensor | float,
) -> tuple[Tensor | None, Tensor | None]:
    """log q(y), and the correction of the advantage."""
    if found is None or log_p is None:
        return None, None
    total = sum(rows.shares)
    outside = ~found.any(-1, keepdim=True)
    known = rows.token_log_prob
    elsewhere = torch.full_like(log_p, torch.nan) if known is None else known[span, None]
    if rows.teacher_floor is not None:
        elsewhere = elsewhere.clamp(min=rows.teacher_floor)
    correction = None
    if rows.corrects_tail:
        # (Not in a tail that the student forbids.)
        corrected = outside & ~(elsewhere + rho).isnan()
        correction = torch.where(corrected, total * (log_p - elsewhere) - rho, 0.0)
    return torch.where(outside, elsewhere, log_q / total), correction
