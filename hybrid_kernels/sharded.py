"""The vocabulary split over several ranks: a backend on each, and the communication between them.

Each rank of a process group holds a shard `[O, I, V_local]` of the logits of student and teachers,
in the order of the ranks; sizes may differ. Everything per row is global and the same on all ranks:
token ids, top-K supports, coefficients and the resulting statistics. A rank computes the gradient
of its own logits. The launchers of a backend see a shard as a whole vocabulary, in which a token
sampled elsewhere has the id -1.

With P_s and Q_s the masses of shard s and p_s, q_s the distributions within it, p = P_s p_s, and
the statistics of rows follow from the statistics of shards by the chain rule:

    H(p)      = sum_s P_s (H(p_s) - log P_s)
    KL(p||q)  = sum_s P_s (KL(p_s||q_s) + log P_s/Q_s)
    KL(q||p)  = sum_s Q_s (KL(q_s||p_s) - log P_s/Q_s)

So one sweep and one small collective are enough for these. Other divergences need a second sweep
(`row_values`), given the normalisers of whole rows; its sums add up over the shards. A top-K
support is treated as one more shard: its entries are removed from the other shards, whose masses
then add up to the mass outside, without a subtraction.

A shard may have no mass, for example if the vocabulary is padded. All ranks do the same arithmetic
on the same numbers, in float64.
"""

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed
from torch import Tensor

from hybrid_kernels import checks, validate
from hybrid_kernels.collectives import gather, resolve_group
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import (
    FIELDS,
    LOWEST,
    MEMBER,
    MEMBER_FIELDS,
    STUDENT_FIELDS,
    Coefficients,
    Rows,
    per_row,
    statistics_size,
    weighted,
)
from hybrid_kernels.torch_backend.divergences import settle
from hybrid_kernels.torch_backend.topk import Supports, overwrite

# How many logits are copied at once to remove a support, without a gradient to hold the copy.
_COPIED = 32 << 20

# With a support, the field for the logarithm of the student's mass outside it; a top-K teacher does
# not use the field otherwise.
_LOG_TAIL = STUDENT_FIELDS + MEMBER.teacher_lse


class _Side:
    """The normalisers of the student or of one teacher over all shards, float64.

    Attributes:
        empty: bool `[S, N]`, whether a shard holds only -inf.
        top: `[N]`, max z.
        above: `[S, N]`, a shard's maximum minus `top`, over the temperature.
        lse: `[N]`, log sum exp((z - max z)/T); NaN where a shard's is, or where all are empty.
        log_mass: `[S, N]`, log P_s.
    """

    def __init__(self, top: Tensor, lse: Tensor, rows: Rows) -> None:
        # Triton's maxima start at the lowest number, which may also be a logit; lse then is finite.
        self.empty = (top <= torch.finfo(torch.float32).min) & lse.isnan()
        top = torch.where(self.empty, -torch.inf, top.double())
        self.top = top.amax(0)
        self.above = torch.where(self.empty, 0.0, _over_t(top - self.top, rows))
        lse = torch.where(self.empty, -torch.inf, self.above + lse)
        total = lse.logsumexp(0)
        self.lse = torch.where(total == -torch.inf, torch.nan, total)
        self.log_mass = lse - self.lse

    def mean(self, values: Tensor) -> Tensor:
        """sum_s P_s x_s over the shards with mass; NaN where `lse` is."""
        return weighted(self.log_mass.exp(), values).sum(0) + 0.0 * self.lse


def _over_t(values: Tensor, rows: Rows) -> Tensor:
    """`[..., N]` over the temperatures."""
    return (values[..., None] / rows.temperature_of())[..., 0]


class Sharded:
    """The launchers of a backend over the ranks of a group, which all have to make each call.

    Collectives: token ids and supports need an all-gather of the shards' sizes, one integer each;
    statistics an all-gather of the shards' statistics, and another for a second sweep; a support an
    all-reduce of its logits, `[N, K]`. A gradient needs no others.
    """

    def __init__(self, module: ModuleType, group: str, student: Tensor) -> None:
        self.module, self.group = module, resolve_group(group)
        self.size, self.device = student.shape[-1], student.device

    @functools.cached_property
    def ends(self) -> Tensor:
        """Where each shard ends, int64 `[S]`; on the device, to avoid a synchronisation."""
        size = torch.full((1,), self.size, dtype=torch.int64, device=self.device)
        return gather(size, self.group)[:, 0].cumsum(0)

    @property
    def total(self) -> Tensor:
        """The size of the vocabulary."""
        return self.ends[-1]

    def row_statistics(self, rows: Rows, statistics: Tensor) -> None:
        if rows.total == 0:
            return
        self._check(rows)
        if rows.support is None:
            self._measure(rows, statistics)
        else:
            self._measure_support(rows, statistics, None)

    def row_gradient(
        self, rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
    ) -> None:
        if rows.total == 0:
            return
        if rows.support is None:
            self.module.row_gradient(self._local(rows), statistics, coefficients, gradient)
            return
        statistics = statistics.clone()  # because `supports.compare` writes some fields again
        supports = Supports(rows, self.total)
        z = self._support_logits(rows, supports)
        source = _copy(rows.student, gradient)
        self._remove(source, supports)
        log_tail = statistics[_LOG_TAIL] + statistics[FIELDS.student_lse]
        supports.outside = log_tail.exp()[:, None]
        supports.x = _centred(z, supports.counts, statistics)
        supports.compare(statistics)
        self._write_support(rows, supports, statistics, coefficients, source, gradient)

    def hybrid_rows(
        self, rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
    ) -> None:
        if rows.total == 0:
            return
        self._check(rows)
        if rows.support is None:
            self._measure(rows, statistics)
            self.module.row_gradient(self._local(rows), statistics, coefficients, gradient)
        else:
            source = _copy(rows.student, gradient)
            supports = self._measure_support(rows, statistics, source)
            self._write_support(rows, supports, statistics, coefficients, source, gradient)

    def scale_rows(self, gradient: Tensor, factor: Tensor) -> None:
        self.module.scale_rows(gradient, factor)

    def _check(self, rows: Rows) -> None:
        """Checks values against the size of the whole vocabulary, on the CPU or in debug mode."""
        if self.device.type != "cpu" and not checks.debug():
            return
        if rows.token_ids is not None:
            validate.token_ids_in_range(rows.token_ids, rows.valid, int(self.total))
        if rows.support is not None:
            validate.support_values(
                rows.support, rows.teachers[0], rows.valid, int(self.total), rows.resolution
            )

    # -- between ranks ----------------------------------------------------------------------------

    def _inside(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids belong to this shard, and their places in it (0 for the others)."""
        places = ids - (self.ends[self.group.rank()] - self.size)
        inside = (places >= 0) & (places < self.size)
        return inside, torch.where(inside, places, 0)

    def _local(self, rows: Rows) -> Rows:
        """The rows as seen by this shard: token ids of other shards are -1."""
        if rows.token_ids is None:
            return rows
        inside, places = self._inside(rows.token_ids.long())
        return rows._replace(token_ids=torch.where(inside, places, -1))

    def _of_owner(self, parts: Tensor, ids: Tensor) -> Tensor:
        """Selects from `[S, N]` the value of the shard that has the token; NaN if there is none."""
        shard = torch.searchsorted(self.ends, ids.long(), right=True)
        owned = (ids >= 0) & (shard < len(self.ends))
        values = parts.gather(0, torch.where(owned, shard, 0)[None])[0]
        return torch.where(owned, values, torch.nan)

    # -- full teachers ----------------------------------------------------------------------------

    def _measure(self, rows: Rows, statistics: Tensor) -> None:
        """Fills the statistics of the whole vocabulary for full teachers."""
        local = self._local(rows)
        chained = not rows.teachers or _is_chained(rows)
        first_sweep = local
        if not chained:
            # Only the normalisers are needed, which the cheapest sweep gives.
            first_sweep = local._replace(divergence="reverse_kl", teacher_floor=None)
        self.module.row_statistics(first_sweep, statistics)
        parts = gather(statistics, self.group)
        statistics.zero_()
        student = self._write_student(rows, statistics, parts)
        teachers = []
        for member in range(len(rows.teachers)):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            top, lse = parts[:, first + MEMBER.teacher_max], parts[:, first + MEMBER.teacher_lse]
            teachers.append(_Side(top, lse, rows))
            statistics[first + MEMBER.teacher_max] = teachers[-1].top
            statistics[first + MEMBER.teacher_lse] = teachers[-1].lse
        if rows.teachers and chained:
            self._chain(rows, statistics, parts, student, teachers)
        elif rows.teachers:
            self._sum_up(rows, local, statistics)
        if rows.valid is not None:
            statistics.masked_fill_(~rows.valid, 0.0)

    def _write_student(self, rows: Rows, statistics: Tensor, parts: Tensor) -> _Side:
        """Fills the fields that do not depend on a teacher; returns the student's normalisers."""
        student = _Side(parts[:, FIELDS.student_max], parts[:, FIELDS.student_lse], rows)
        statistics[FIELDS.entropy] = student.mean(parts[:, FIELDS.entropy] - student.log_mass)
        statistics[FIELDS.student_max] = student.top
        statistics[FIELDS.student_lse] = student.lse
        statistics[FIELDS.logsumexp] = _over_t(student.top, rows) + student.lse
        if rows.token_ids is not None:
            # In an empty shard `log_mass` alone, -inf, is log p of every token.
            within = torch.where(student.empty, 0.0, parts[:, FIELDS.log_prob])
            log_prob = within + student.log_mass
            statistics[FIELDS.log_prob] = self._of_owner(log_prob, rows.token_ids)
        return student

    def _chain(
        self, rows: Rows, statistics: Tensor, parts: Tensor, student: _Side, teachers: list[_Side]
    ) -> None:
        """Fills divergences and sums of slopes by the chain rule."""
        value, log_q = parts[:, FIELDS.divergence].double(), 0.0
        forbidden = torch.zeros_like(student.empty)
        of_student = FAMILIES[rows.divergence].student_d  # KL(p||q), else KL(q||p)
        for member, (share, teacher) in enumerate(zip(rows.shares, teachers, strict=True)):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            slope_sums = parts[:, first + MEMBER.slope_sum]
            log_ratio = student.log_mass - teacher.log_mass
            if of_student:
                value = value + share * log_ratio
                # The gradient computes l from d/T and the rounded normalisers. Where the models
                # agree, it sums to 0 only if the sum of slopes has the same rounding errors.
                local = parts[:, first + MEMBER.teacher_lse] - parts[:, FIELDS.student_lse]
                means = slope_sums.double() - local + student.above - teacher.above
                means = torch.where(teacher.empty, torch.inf, means)
                shift = statistics[first + MEMBER.teacher_lse] - statistics[FIELDS.student_lse]
                slope_sum = student.mean(means) + shift
            else:
                value = torch.where(student.empty, torch.inf, value - share * log_ratio)
                # The slopes of a shard sum to -1 even if the student forbids all of it.
                slope_sums = torch.where(student.empty, -1.0, slope_sums)
                slope_sum = teacher.mean(slope_sums) + 0.0 * student.lse
            statistics[first + MEMBER.slope_sum] = slope_sum
            forbidden = forbidden | teacher.empty
            log_q = log_q + share / sum(rows.shares) * teacher.log_mass
        if of_student:
            value = student.mean(torch.where(forbidden, torch.inf, value))
            value = value + 0.0 * sum(teacher.lse for teacher in teachers)
        else:
            value = teachers[0].mean(value) + 0.0 * student.lse
        statistics[FIELDS.divergence] = value
        if rows.token_ids is not None:
            within = torch.where(forbidden, 0.0, parts[:, FIELDS.teacher_log_prob])
            statistics[FIELDS.teacher_log_prob] = self._of_owner(within + log_q, rows.token_ids)

    def _sum_up(self, rows: Rows, local: Rows, statistics: Tensor) -> None:
        """Fills divergences and sums of slopes by a second sweep, given all normalisers."""
        family, members = FAMILIES[rows.divergence], len(rows.teachers)
        values = statistics.new_empty((1 + 2 * members, rows.total))
        self.module.row_values(local, statistics, values)
        parts = gather(values, self.group).double()
        total = torch.zeros_like(parts[0, 0])
        for member, share in enumerate(rows.shares):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            value, slope_sum = parts[:, 1 + 2 * member].sum(0), parts[:, 2 + 2 * member]
            slope_sum = slope_sum.logsumexp(0) if family.tilted else slope_sum.sum(0)
            lse = statistics[first + MEMBER.teacher_lse] + statistics[FIELDS.student_lse]
            settled = settle(family, value, slope_sum, lse.isfinite(), rows.parameter)
            statistics[first + MEMBER.slope_sum] = settled[1]
            statistics[first + MEMBER.log_s] = settled[2]
            total = total + share * settled[0]
        statistics[FIELDS.divergence] = total
        if rows.token_ids is not None:
            statistics[FIELDS.teacher_log_prob] = self._of_owner(parts[:, 0], rows.token_ids)

    # -- top-K teachers ---------------------------------------------------------------------------

    def _measure_support(self, rows: Rows, statistics: Tensor, source: Tensor | None) -> Supports:
        """Fills the statistics for top-K teachers.

        Removes the support from `source`, if given: a copy of the logits, or the logits themselves.
        """
        supports = Supports(rows, self.total)
        z = self._support_logits(rows, supports)
        local = self._local(rows)
        outside = statistics.new_empty((statistics_size(0), rows.total))
        if source is not None:
            self._remove(source, supports)
            self.module.row_statistics(self._student_only(local, source), outside)
        else:
            for piece, span in _pieces(local):
                logits = piece.student.clone()
                self._remove(logits, supports, span)
                piece_outside = outside.new_empty((len(outside), piece.total))
                self.module.row_statistics(self._student_only(piece, logits), piece_outside)
                outside[:, span] = piece_outside
        parts = gather(outside, self.group).double()
        statistics.zero_()
        parts = torch.cat([parts, _as_shard(z, supports.counts, rows, len(outside))])
        student = self._write_student(rows, statistics, parts)
        log_tail = student.log_mass[:-1].logsumexp(0)
        statistics[_LOG_TAIL] = log_tail
        supports.outside = (log_tail + student.lse).exp().float()[:, None]
        supports.x = _centred(z, supports.counts, statistics)
        if rows.token_ids is not None:
            assert rows.support is not None
            is_token = (rows.support == rows.token_ids[:, None]) & supports.counts
            log_p = supports.x / rows.temperature_of() - statistics[FIELDS.student_lse][:, None]
            log_p = torch.where(is_token, log_p, 0.0).sum(-1)
            log_prob = statistics[FIELDS.log_prob]
            statistics[FIELDS.log_prob] = torch.where(is_token.any(-1), log_p, log_prob)
        supports.compare(statistics)
        return supports

    def _support_logits(self, rows: Rows, supports: Supports) -> Tensor:
        """The student's logits on the support, fp32 `[N, K]`; 0 where an id does not count."""
        inside, places = self._inside(supports.index)
        outer, inner, _ = rows.student.shape
        z = rows.student.gather(-1, places.view(outer, inner, -1)).view(places.shape).float()
        z = torch.where(inside & supports.counts, z, 0.0)
        # Each logit is 0 on all ranks but one, so the sum is exact.
        torch.distributed.all_reduce(z, group=self.group)
        return z

    def _remove(self, logits: Tensor, supports: Supports, span: slice = slice(None)) -> None:
        """Writes -inf over the supports of the rows in `span`, whose logits are `[O, I, V]`."""
        values = torch.full_like(supports.index[span], -torch.inf, dtype=logits.dtype)
        self._overwrite(logits, supports.index[span], supports.counts[span], values)

    def _overwrite(self, out: Tensor, ids: Tensor, selected: Tensor, values: Tensor) -> None:
        """Writes the selected `[N, K]` values into the entries of `out` that this shard has."""
        inside, places = self._inside(ids)
        inside = inside & selected
        places = torch.where(inside, places, 0)
        shape = (*out.shape[:2], -1)
        overwrite(out, places.view(shape), inside.view(shape), values.view(shape))

    def _student_only(self, rows: Rows, logits: Tensor) -> Rows:
        """The rows without teachers, with logits from which the support was removed."""
        return rows._replace(student=logits, teachers=(), shares=(), support=None)

    def _write_support(
        self,
        rows: Rows,
        supports: Supports,
        statistics: Tensor,
        coefficients: Coefficients,
        source: Tensor,
        gradient: Tensor,
    ) -> None:
        """Writes the gradient, from the logits `source` without the support."""
        _, c_logp, c_ent = supports.finish(statistics, coefficients.columns(rows))
        log_prob = (supports.log_prob * rows.temperature_of())[:, 0]
        outside = Coefficients(None, log_prob, coefficients.entropy)
        student_rows = self._student_only(rows, source)._replace(token_ids=None)
        student_statistics = statistics[: statistics_size(0)]
        self.module.row_gradient(student_rows, student_statistics, outside, gradient)
        index, counts, values = supports.index, supports.counts, supports.gradient
        if c_logp is not None and rows.token_ids is not None:
            assert rows.support is not None
            ids = rows.token_ids.long()[:, None]
            is_token = (rows.support == ids) & counts
            # A token outside the support becomes one more entry: the gradient of the other entries
            # outside, plus the term of 1[v = y].
            log_p = statistics[FIELDS.log_prob][:, None]
            inner = -supports.log_prob
            if c_ent is not None:
                entropy = statistics[FIELDS.entropy][:, None]
                inner = inner - c_ent * (log_p.clamp(min=LOWEST) + entropy)
            index = torch.cat([index, ids], -1)
            counts = torch.cat([counts, ~is_token.any(-1, True)], -1)
            values = values + torch.where(is_token, c_logp, 0.0)
            values = torch.cat([values, log_p.exp() * inner + c_logp], -1)
        if rows.valid is not None:
            counts = counts & rows.valid[:, None]
        self._overwrite(gradient, index, counts, values.to(gradient.dtype))


def _is_chained(rows: Rows) -> bool:
    """Whether the chain rule gives the divergence: without a floor, for few enough teachers."""
    return rows.teacher_floor is None and len(rows.teachers) <= FAMILIES[rows.divergence].chained


def _copy(student: Tensor, gradient: Tensor) -> Tensor:
    """The student's logits where they may be overwritten: in the gradient, if dtypes match."""
    if gradient.dtype != student.dtype:
        return student.clone()
    if gradient.data_ptr() != student.data_ptr():
        gradient.copy_(student)
    return gradient


def _pieces(rows: Rows) -> Iterator[tuple[Rows, slice]]:
    """The rows in pieces small enough to copy, and the span of each."""
    outer, inner, size = rows.student.shape
    step = max(1, _COPIED // size)
    for o in range(outer):
        for start in range(0, inner, step):
            stop = min(start + step, inner)
            span = slice(o * inner + start, o * inner + stop)
            piece = {
                name: per_row(values, rows.total)[span]
                for name in ("token_ids", "valid", "row_temperature")
                if (values := getattr(rows, name)) is not None
            }
            yield rows._replace(student=rows.student[o : o + 1, start:stop], **piece), span


def _centred(z: Tensor, counts: Tensor, statistics: Tensor) -> Tensor:
    """z - max z on the support, 0 where an id does not count."""
    return torch.where(counts, z - statistics[FIELDS.student_max][:, None], 0.0)


def _as_shard(z: Tensor, counts: Tensor, rows: Rows, fields: int) -> Tensor:
    """The student's statistics of a support, as if it were a shard: float64 `[1, F, N]`."""
    z = torch.where(counts, z.double(), -torch.inf)
    top = z.amax(-1, keepdim=True)
    x = (z - top) / rows.temperature_of()
    e = x.exp()
    total = e.sum(-1, keepdim=True)
    mean = torch.where(e == 0, 0.0, e * x).sum(-1, keepdim=True) / total
    statistics = z.new_zeros((1, fields, len(z)))
    statistics[0, FIELDS.student_max] = top[:, 0]
    statistics[0, FIELDS.student_lse] = total.log()[:, 0]
    statistics[0, FIELDS.entropy] = (total.log() - mean)[:, 0]
    return statistics
