"""Top-K teachers on the torch backend: the K + 1 categories of a block of rows.

The divergence is between two coarse distributions, whose categories are the entries of the support
and the tail; `triton_backend/topk.py` explains it, with the formulas for Triton. Everything here is
`[r, K]`: the normaliser and the mass outside the support, which need a sweep over the vocabulary,
come from the caller.
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

# How much is compared at once: rows on the CPU; entries elsewhere, where launches are expensive.
_ROWS = 256
_ENTRIES = 4 << 20


class SupportTerms(NamedTuple):
    """The terms of a block of rows that depend on the teachers, `[r, 1]` unless stated otherwise.

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
    """The supports of all rows, with the results of sweeps over the vocabulary.

    Attributes:
        counts: `[N, K]` bool, the ids that count.
        full: `[N, 1]` bool, whether the support is the whole vocabulary.
        index: `[N, K]` int64, the ids, with 0 for those that do not count.
        x: `[N, K]`, z - max z on the support.
        outside: `[N, 1]`, sum exp((z - max z)/T) outside the support.
        log_prob: `[N, 1]`, the coefficient of dlog p(y)/dz that covers all but the entropy in the
            gradient outside the support, where the divergence's part is a multiple of p, too.
        constant: `[N, 1]`, the gradient outside the support over p, without the entropy's own term.
        gradient: `[N, K]`, the gradient on the support, without the term of 1[v = y].
        exponentials: `[O, I, V]`, the buffer that keeps exp((z - max z)/T), or None.
    """

    def __init__(self, rows: Rows, size: int | Tensor) -> None:
        """`size` is the size of the whole vocabulary; `rows` may hold only a shard of it."""
        assert rows.support is not None
        ids = rows.support.long()
        self.rows = rows
        self.impossible = (ids < -1) | (ids >= size)
        self.counts = first_of_each(ids) & ~self.impossible
        self.full = self.counts.sum(-1, keepdim=True) >= size
        self.index = torch.where(self.counts, ids, 0)
        self.x = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        self.outside = torch.zeros((len(ids), 1), dtype=torch.float32, device=ids.device)
        self.terms: list[SupportTerms] = []
        self.exponentials: Tensor | None = None

    def compare(self, statistics: Tensor) -> None:
        """Fills the statistics that depend on the teachers."""
        count, size = self.index.shape
        step = _ROWS if self.index.device.type == "cpu" else max(1, _ENTRIES // size)
        for start in range(0, count, step):
            span = slice(start, start + step)
            block = statistics[:, span]
            terms = compare(self, span, block)
            self.terms.append(terms)
            # On the CPU the input checks have already rejected such ids.
            impossible = self.impossible[span].any(-1, keepdim=True)
            block[FIELDS.divergence] = terms.divergence.masked_fill(impossible, torch.nan)[:, 0]
            block[FIELDS.student_mass] = terms.student_mass[:, 0]
            block[FIELDS.teacher_mass] = terms.teacher_mass[:, 0]
            if terms.teacher_log_prob is not None:
                block[FIELDS.teacher_log_prob] = terms.teacher_log_prob[:, 0]
            if terms.correction is not None:
                block[FIELDS.tail_correction] = terms.correction[:, 0]
        if self.rows.valid is not None:
            statistics.masked_fill_(~self.rows.valid, 0.0)

    def finish(self, statistics: Tensor, coefficients: Coefficients) -> Coefficients:
        """Fills `log_prob`, `constant` and `gradient`.

        Returns the coefficients, with the correction of the advantages added.
        """
        c_div, c_logp, c_ent = coefficients
        lse, entropy = statistics[FIELDS.student_lse][:, None], statistics[FIELDS.entropy][:, None]
        log_prob = torch.zeros_like(lse)
        log_p = torch.where(self.x > LOWEST, self.x / self.rows.temperature_of() - lse, LOWEST)
        if c_div is not None and self.rows.corrects_tail:
            correction = weighted(c_div, statistics[FIELDS.tail_correction][:, None])
            c_logp = correction if c_logp is None else c_logp + correction
        inner = torch.zeros_like(self.x)
        if c_logp is not None:
            log_prob = log_prob + c_logp
            inner = inner - c_logp
        if c_ent is not None:
            inner = inner - c_ent * (log_p + entropy)
        self.gradient = log_p.exp() * inner
        if c_div is not None:
            pull = torch.cat([terms.pull for terms in self.terms])
            tail_pull = torch.cat([terms.tail_pull for terms in self.terms])
            self.gradient += weighted(c_div, pull)
            log_prob = log_prob - weighted(c_div, tail_pull)
        self.log_prob, self.constant = log_prob, -log_prob
        if c_ent is not None:
            self.constant = self.constant + c_ent * (lse - entropy)
        return Coefficients(c_div, c_logp, c_ent)

    def write(self, out: Tensor, span: slice) -> None:
        """Overwrites the entries of the rows `out` `[r, V]` that lie on their supports."""
        overwrite(out, self.index[span], self.counts[span], self.gradient[span])


def overwrite(out: Tensor, index: Tensor, selected: Tensor, values: Tensor) -> None:
    """Writes the selected ones of the `[..., K]` values into `out`, at their index in its last
    dimension. The index of the others must be 0."""
    # The others repeat the first selected write or, where there is none, write entry 0 back.
    first = selected.to(torch.int8).argmax(-1, keepdim=True)
    has_selected = selected.gather(-1, first)
    index = torch.where(selected, index, index.gather(-1, first))
    fallback = torch.where(has_selected, values.gather(-1, first), out[..., :1])
    out.scatter_(-1, index, torch.where(selected, values, fallback))


def first_of_each(ids: Tensor) -> Tensor:
    """Bool `[r, K]`: ids that are not padding and did not occur before."""
    ordered, order = ids.sort(dim=-1, stable=True)
    repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.empty_like(repeated).scatter_(-1, order, ~repeated) & (ids >= 0)


def tail_of_teacher(log_q: Tensor, q: Tensor, resolution: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tail's mass 1 - sum q, raw and adjusted, and sum q; each `[r, 1]`.

    1 - q_max comes from expm1, so that a tail of 1e-12 is not lost. A tail smaller than the
    rounding error of the log-probabilities is replaced by the mass that this error may hide.
    """
    top, first = log_q.max(-1, keepdim=True)
    others = q.scatter(-1, first, 0.0).sum(-1, keepdim=True)
    spread = torch.where(q > 0, q * log_q.abs(), 0.0).sum(-1, keepdim=True)
    tail = -torch.expm1(top) - others
    adjusted = torch.where(tail <= spread * resolution, max(resolution, HIDDEN_TAIL), tail)
    return tail, adjusted, others + top.exp()


def compare(supports: Supports, span: slice, statistics: Tensor) -> SupportTerms:
    """Compares a block of rows, which are the `span` of all rows.

    `statistics` are those of the block; the student's normaliser and log p(y) are filled already.
    """
    rows, counts = supports.rows, supports.counts[span]
    assert rows.support is not None
    inv_t, total = 1.0 / rows.temperature_of(span), sum(rows.shares)
    # The lowest logit over the smallest temperature is finite in fp64, which not all devices have.
    dtype = torch.float64 if counts.device.type == "cpu" else torch.float32
    x, lse = supports.x[span].to(dtype), statistics[FIELDS.student_lse][:, None].to(dtype)
    log_p = torch.where(counts, x * inv_t - lse, -torch.inf)
    log_p_all = torch.cat([log_p, supports.outside[span].to(dtype).log() - lse], -1)
    # The mass is NaN where the normaliser is.
    student_mass = log_p.exp().sum(-1, keepdim=True) + 0.0 * lse
    included = torch.cat([counts, ~supports.full[span]], -1)
    if rows.tail == "renormalize":
        log_p_all = log_p_all - log_p.logsumexp(-1, keepdim=True)
        included[:, -1] = False
    log_p_all = torch.where(included, log_p_all, -torch.inf)
    is_token = token_log_p = None
    if rows.token_ids is not None:
        is_token = (rows.support[span] == rows.token_ids[span, None]) & counts
        token_log_p = statistics[FIELDS.log_prob][:, None]
    value = pull = tail_pull = teacher_mass = log_q_token = rho = 0.0
    for share, log_probs in zip(rows.shares, rows.teachers, strict=True):
        log_q = torch.where(counts, log_probs[span].to(dtype), -torch.inf)
        member = _compare_member(rows, log_q, log_p_all, included, lse)
        if is_token is not None:
            floor = -torch.inf if rows.teacher_floor is None else rows.teacher_floor
            on_support = torch.where(is_token, log_q.clamp(min=floor), 0.0).sum(-1, keepdim=True)
            log_q_token = log_q_token + share * on_support
        value = value + share * member.divergence
        pull = pull + share * member.pull
        tail_pull = tail_pull + share * member.tail_pull
        teacher_mass = teacher_mass + share / total * member.mass
        rho = rho + share * member.rho
    log_q_token, correction = _token(rows, span, is_token, log_q_token, token_log_p, rho)
    if rows.tail != "bucket":
        tail_pull = torch.zeros_like(lse)
    assert isinstance(value, Tensor)
    assert isinstance(pull, Tensor)
    assert isinstance(tail_pull, Tensor)
    assert isinstance(teacher_mass, Tensor)
    return SupportTerms(
        value.float(),
        None if log_q_token is None else log_q_token.float(),
        None if correction is None else correction.float(),
        student_mass.float(),
        teacher_mass.float(),
        pull.float(),
        tail_pull.float(),
    )


class _Member(NamedTuple):
    """The terms of one teacher, without its share: see `SupportTerms`.

    `mass` is its mass on the support; `rho` is log p - log q of the tail, NaN where the student
    forbids it.
    """

    divergence: Tensor
    pull: Tensor
    tail_pull: Tensor
    mass: Tensor
    rho: Tensor


def _compare_member(
    rows: Rows, log_q: Tensor, log_p: Tensor, included: Tensor, lse: Tensor
) -> _Member:
    """Compares log q `[r, K]` with log p `[r, K + 1]`, which has the tail last.

    `included` marks the categories that count.
    """
    family, floor = FAMILIES[rows.divergence], rows.teacher_floor
    raw_tail, tail_q, mass = tail_of_teacher(log_q, log_q.exp(), rows.resolution)
    raw_q = torch.cat([log_q.exp(), raw_tail], -1)
    log_q = torch.cat([log_q, tail_q.log()], -1)
    # Categories that both sides forbid do not count, and are not raised to the floor.
    possible = included & ((log_p > -torch.inf) | (log_q > -torch.inf))
    if floor is not None:
        log_q = torch.where(possible, log_q.clamp(min=floor), -torch.inf)
    if rows.tail == "renormalize":
        log_q = log_q - log_q[:, :-1].logsumexp(-1, keepdim=True)
        raw_q = torch.where(included, log_q.exp(), 0.0)
    p, q = log_p.exp(), torch.where(possible, log_q.exp(), 0.0)
    log_ratio = torch.where(possible, log_p - log_q, 0.0)
    rho = torch.where(p[:, -1:] > 0, log_ratio[:, -1:], torch.nan)
    entries = Entries(p, q, log_ratio, log_p, torch.where(possible, log_q, -torch.inf))
    # A side that is renormalised without mass on the support is NaN.
    finite = (mass + lse + (p + q).sum(-1, keepdim=True)).isfinite()
    lost = (raw_q - q).sum(-1, keepdim=True)
    value, slope_sum = _sums(rows, entries, lost, finite)
    slopes = p * entries.of_some(p, log_ratio) if family.has_u else torch.zeros_like(p)
    if family.has_v:
        slopes = slopes - q
    slopes = slopes - p * slope_sum
    # An empty tail has no entry that could have a slope.
    per_p = torch.where(p[:, -1:] >= SMALLEST_TAIL, slopes[:, -1:] / p[:, -1:], 0.0)
    return _Member(value, slopes[:, :-1], per_p, mass, rho)


def _sums(rows: Rows, entries: Entries, lost: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The value and the sum of slopes; leaves u and -v in the buffers, like `Form.sums`."""
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
    is_token: Tensor | None,
    log_q: Tensor | float,
    log_p: Tensor | None,
    rho: Tensor | float,
) -> tuple[Tensor | None, Tensor | None]:
    """log q(y), and the correction of the advantage."""
    if is_token is None or log_p is None:
        return None, None
    total = sum(rows.shares)
    outside = ~is_token.any(-1, keepdim=True)
    if rows.token_log_prob is None:
        elsewhere = torch.full_like(log_p, torch.nan)
    else:
        elsewhere = rows.token_log_prob[span, None]
    if rows.teacher_floor is not None:
        elsewhere = elsewhere.clamp(min=rows.teacher_floor)
    correction = None
    if rows.corrects_tail:
        # A tail that the student forbids has a rho of NaN, and no correction.
        corrected = outside & ~(elsewhere + rho).isnan()
        correction = torch.where(corrected, total * (log_p - elsewhere) - rho, 0.0)
    return torch.where(outside, elsewhere, log_q / total), correction
