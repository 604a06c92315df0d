"""The vocabulary over several ranks: a backend on each, and what has to be told between them.

Each rank of a process group has `[O, I, V_local]` logits of student and teachers, in the order of
the ranks, of any sizes. Everything per row is global and the same on all ranks: token ids, top-K
supports, coefficients, and the statistics that come out. A rank's gradient is that of its own
logits. To the launchers of a backend a shard is a vocabulary, in which a token sampled elsewhere
has the id -1.

With P_s and Q_s the masses of shard s and p_s, q_s the distributions within it, p = P_s p_s and the
statistics of rows follow from those of shards by the chain rule:

    H(p)      = sum_s P_s (H(p_s) - log P_s)
    KL(p||q)  = sum_s P_s (KL(p_s||q_s) + log P_s/Q_s)
    KL(q||p)  = sum_s Q_s (KL(q_s||p_s) - log P_s/Q_s)

So one sweep and one small collective are enough for these. Other divergences take a second sweep,
about the normalisers of whole rows (`row_values`), whose sums just add up. A top-K support is a
shard of its own: its entries are taken out of the others, which then tell the mass outside without
a difference of masses.

A shard may have no mass at all, as where the vocabulary is padded. All ranks compute the same
numbers from the same numbers, in float64.
"""

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed
from torch import Tensor

from hybrid_kernels import validate
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

# Logits that are copied at once where a support is taken out of them and no gradient has room.
_COPIED = 32 << 20

# Where the statistics of a support keep the logarithm of the student's mass outside it. (No teacher
# has logits there.)
_LOG_TAIL = STUDENT_FIELDS + MEMBER.teacher_lse


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group of a name, as torch's own collectives find it in compiled code."""
    # Not every build of torch has it.
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # pyright: ignore


class Sharded:
    """The launchers of a backend, over the ranks of a group: each call is one of all ranks.

    Collectives: the sizes of the shards, one integer each, where there are token ids or supports;
    for statistics one all-gather of theirs, and one more where they take a second sweep; for a
    support an all-reduce of its logits, `[N, K]`. A gradient needs no other.
    """

    def __init__(self, module: ModuleType, group: str, student: Tensor) -> None:
        self.module, self.group = module, resolve_group(group)
        self.size, self.device = student.shape[-1], student.device

    @functools.cached_property
    def ends(self) -> Tensor:
        """Where each shard ends, int64 `[S]`; on the device, so that nothing waits for them."""
        own = torch.full((1,), self.size, dtype=torch.int64, device=self.device)
        return self._gather(own)[:, 0].cumsum(0)

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
        statistics = statistics.clone()  # in which the comparison fills some fields anew
        supports = Supports(rows, self.total)
        z = self._support_logits(rows, supports)
        source = _copy(rows.student, gradient)
        self._take_out(source, supports)
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
        """The checks that need the size of the whole vocabulary: on the CPU, and in debug mode."""
        if self.device.type != "cpu" and not validate.debug():
            return
        if rows.token_ids is not None:
            validate.token_ids_in_range(rows.token_ids, rows.valid, int(self.total))
        if rows.support is not None:
            given = rows.support, rows.teachers[0], rows.valid
            validate.support_values(*given, int(self.total), rows.resolution)

    # -- between ranks ----------------------------------------------------------------------------

    def _gather(self, own: Tensor) -> Tensor:
        """The same tensor of all ranks, `[S, ...]`."""
        ranks = self.group.size()
        found = own.new_empty(ranks * own.numel())
        # (The second is its name before torch 2.13.)
        names = ("all_gather_single", "all_gather_into_tensor")
        gather = next(getattr(torch.distributed, n) for n in names if hasattr(torch.distributed, n))
        gather(found, own.reshape(-1), group=self.group)
        return found.view(ranks, *own.shape)

    def _inside(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which ids are among the entries of this shard, and their places there (else 0)."""
        places = ids - (self.ends[self.group.rank()] - self.size)
        inside = (places >= 0) & (places < self.size)
        return inside, torch.where(inside, places, 0)

    def _local(self, rows: Rows) -> Rows:
        """The rows as a problem of this shard alone: token ids that are elsewhere are -1."""
        if rows.token_ids is None:
            return rows
        inside, places = self._inside(rows.token_ids.long())
        return rows._replace(token_ids=torch.where(inside, places, -1))

    def _of_owner(self, parts: Tensor, ids: Tensor) -> Tensor:
        """Of `[S, N]` what the shard says that has the token; NaN where none has it."""
        shard = torch.searchsorted(self.ends, ids.long(), right=True)
        owned = (ids >= 0) & (shard < len(self.ends))
        found = parts.gather(0, torch.where(owned, shard, 0)[None])[0]
        return torch.where(owned, found, torch.nan)

    # -- full teachers ----------------------------------------------------------------------------

    def _measure(self, rows: Rows, statistics: Tensor) -> None:
        """Fills the statistics, which are those of the whole vocabulary."""
        local = self._local(rows)
        chained = not rows.teachers or _is_chained(rows)
        if not chained:
            # For the normalisers alone, by the shortest sweep that finds them all.
            probe = local._replace(divergence="reverse_kl", teacher_floor=None)
            self.module.row_statistics(probe, statistics)
        else:
            self.module.row_statistics(local, statistics)
        parts = self._gather(statistics)
        statistics.zero_()
        student = _Side(parts[:, FIELDS.student_max], parts[:, FIELDS.student_lse], rows)
        self._write_student(rows, statistics, parts, student)
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

    def _write_student(
        self, rows: Rows, statistics: Tensor, parts: Tensor, student: "_Side"
    ) -> None:
        """The fields that no teacher is needed for."""
        entropies = parts[:, FIELDS.entropy] - student.log_mass
        statistics[FIELDS.entropy] = student.mean(entropies)
        statistics[FIELDS.student_max] = student.top
        statistics[FIELDS.student_lse] = student.lse
        statistics[FIELDS.logsumexp] = _over_t(student.top, rows) + student.lse
        if rows.token_ids is not None:
            # (Of a shard without mass the student forbids every token.)
            log_prob = torch.where(student.empty, 0.0, parts[:, FIELDS.log_prob])
            log_prob = self._of_owner(log_prob + student.log_mass, rows.token_ids)
            statistics[FIELDS.log_prob] = log_prob

    def _chain(
        self,
        rows: Rows,
        statistics: Tensor,
        parts: Tensor,
        student: "_Side",
        teachers: list["_Side"],
    ) -> None:
        """Divergences and sums of slopes by the chain rule."""
        value, log_q = parts[:, FIELDS.divergence].double(), 0.0
        forbidden = torch.zeros_like(student.empty)
        of_student = FAMILIES[rows.divergence].student_d  # KL(p||q), else KL(q||p)
        for member, (share, teacher) in enumerate(zip(rows.shares, teachers, strict=True)):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            slope_sums = parts[:, first + MEMBER.slope_sum]
            log_ratio = student.log_mass - teacher.log_mass
            if of_student:
                value = value + share * log_ratio
                # The gradient takes l as d/T and what both normalisers, rounded, add to it. That
                # it sums to 0 where the models agree, the sum of slopes must have the same of it.
                local = parts[:, first + MEMBER.teacher_lse] - parts[:, FIELDS.student_lse]
                means = slope_sums.double() - local + student.above - teacher.above
                means = torch.where(teacher.empty, torch.inf, means)
                shift = statistics[first + MEMBER.teacher_lse] - statistics[FIELDS.student_lse]
                slope_sum = student.mean(means) + shift
            else:
                value = torch.where(student.empty, torch.inf, value - share * log_ratio)
                # (Also of shards of which the student forbids all.)
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
            log_q = self._of_owner(within + log_q, rows.token_ids)
            statistics[FIELDS.teacher_log_prob] = log_q

    def _sum_up(self, rows: Rows, local: Rows, statistics: Tensor) -> None:
        """Divergences and sums of slopes from those of the entries, all normalisers known."""
        family, members = FAMILIES[rows.divergence], len(rows.teachers)
        values = statistics.new_empty((1 + 2 * members, rows.total))
        self.module.row_values(local, statistics, values)
        parts = self._gather(values).double()
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
        """Fills the statistics; takes the support out of `source`, a copy of the logits if given.

        The logits may be that copy themselves.
        """
        supports = Supports(rows, self.total)
        z = self._support_logits(rows, supports)
        own = statistics.new_empty((statistics_size(0), rows.total))
        if source is not None:
            self._take_out(source, supports)
            self.module.row_statistics(self._outside(self._local(rows), source), own)
        else:
            for piece, span in _pieces(self._local(rows)):
                copied = piece.student.clone()
                self._take_out(copied, supports, span)
                found = own.new_empty((len(own), piece.total))
                self.module.row_statistics(self._outside(piece, copied), found)
                own[:, span] = found
        parts = self._gather(own)
        statistics.zero_()
        parts = torch.cat([parts.double(), _as_shard(z, supports.counts, rows, len(own))])
        student = _Side(parts[:, FIELDS.student_max], parts[:, FIELDS.student_lse], rows)
        self._write_student(rows, statistics, parts, student)
        log_tail = student.log_mass[:-1].logsumexp(0)
        statistics[_LOG_TAIL] = log_tail
        supports.outside = (log_tail + student.lse).exp().float()[:, None]
        supports.x = _centred(z, supports.counts, statistics)
        if rows.token_ids is not None:
            assert rows.support is not None
            found = (rows.support == rows.token_ids[:, None]) & supports.counts
            log_p = supports.x / rows.temperature_of() - statistics[FIELDS.student_lse][:, None]
            log_p = torch.where(found, log_p, 0.0).sum(-1)
            statistics[FIELDS.log_prob] = torch.where(
                found.any(-1), log_p, statistics[FIELDS.log_prob]
            )
        supports.compare(statistics)
        return supports

    def _support_logits(self, rows: Rows, supports: Supports) -> Tensor:
        """The student's logits on the support, fp32 `[N, K]`; 0 where an id does not count."""
        inside, places = self._inside(supports.index)
        outer, inner, _ = rows.student.shape
        z = rows.student.gather(-1, places.view(outer, inner, -1)).view(places.shape).float()
        z = torch.where(inside & supports.counts, z, 0.0)
        # One rank has each of them: nothing is rounded.
        torch.distributed.all_reduce(z, group=self.group)
        return z

    def _take_out(self, logits: Tensor, supports: Supports, span: slice = slice(None)) -> None:
        """Leaves -inf on the support of some rows `[O, I, V]`."""
        inside, places = self._inside(supports.index[span])
        shape = (*logits.shape[:2], -1)
        nothing = torch.full_like(places, -torch.inf, dtype=logits.dtype)
        inside = inside & supports.counts[span]
        places = torch.where(inside, places, 0)
        overwrite(logits, places.view(shape), inside.view(shape), nothing.view(shape))

    def _outside(self, rows: Rows, logits: Tensor) -> Rows:
        """The student alone, of logits without the support."""
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
        """The gradient, from logits without the support."""
        _, c_logp, c_ent = supports.finish(statistics, coefficients.columns(rows))
        log_prob = (supports.log_prob * rows.temperature_of())[:, 0]
        outside = Coefficients(None, log_prob, coefficients.entropy)
        problem = self._outside(rows, source)._replace(token_ids=None)
        own = statistics[: statistics_size(0)]
        self.module.row_gradient(problem, own, outside, gradient)
        index, kept, values = supports.index, supports.counts, supports.gradient
        if c_logp is not None and rows.token_ids is not None:
            assert rows.support is not None
            ids = rows.token_ids.long()[:, None]
            found = (rows.support == ids) & kept
            # One more entry, where the token is outside, as all are there but for its own term.
            log_p = statistics[FIELDS.log_prob][:, None]
            inner = -supports.log_prob
            if c_ent is not None:
                entropy = statistics[FIELDS.entropy][:, None]
                inner = inner - c_ent * (log_p.clamp(min=LOWEST) + entropy)
            index, kept = torch.cat([index, ids], -1), torch.cat([kept, ~found.any(-1, True)], -1)
            values = values + torch.where(found, c_logp, 0.0)
            values = torch.cat([values, log_p.exp() * inner + c_logp], -1)
        inside, places = self._inside(index)
        inside = inside & kept
        if rows.valid is not None:
            inside = inside & rows.valid[:, None]
        shape = (*gradient.shape[:2], -1)
        places = torch.where(inside, places, 0).view(shape)
        overwrite(gradient, places, inside.view(shape), values.to(gradient.dtype).view(shape))


class _Side:
    """One model's normalisers over all shards, float64.

    Attributes:
        empty: bool `[S, N]`, shards of -inf alone.
        top: `[N]`, max z.
        above: `[S, N]`, how far a shard's maximum is above it, over the temperature.
        lse: `[N]`, log sum exp((z - max z)/T); NaN where a shard's is unsound, or all are empty.
        log_mass: `[S, N]`, log P_s.
    """

    def __init__(self, top: Tensor, lse: Tensor, rows: Rows) -> None:
        # (Triton's maxima begin at the lowest number, which may be a logit, too.)
        self.empty = (top <= torch.finfo(torch.float32).min) & lse.isnan()
        top = torch.where(self.empty, -torch.inf, top.double())
        self.top = top.amax(0)
        self.above = torch.where(self.empty, 0.0, _over_t(top - self.top, rows))
        lse = torch.where(self.empty, -torch.inf, self.above + lse)
        total = lse.logsumexp(0)
        self.lse = torch.where(total == -torch.inf, torch.nan, total)
        self.log_mass = lse - self.lse

    def mean(self, values: Tensor) -> Tensor:
        """sum_s P_s x_s; shards without mass have no say."""
        # (NaN where the side is unsound, also if no shard is left to say so.)
        return weighted(self.log_mass.exp(), values).sum(0) + 0.0 * self.lse


def _over_t(values: Tensor, rows: Rows) -> Tensor:
    """`[..., N]` over the temperatures."""
    return (values[..., None] / rows.temperature_of())[..., 0]


def _is_chained(rows: Rows) -> bool:
    """Whether the chain rule gives the divergence: each member's has to be known by itself, or only
    their sum to be needed."""
    return rows.teacher_floor is None and len(rows.teachers) <= FAMILIES[rows.divergence].chained


def _copy(student: Tensor, gradient: Tensor) -> Tensor:
    """The student's logits where they may be overwritten: in the gradient, if it can hold them."""
    if gradient.dtype != student.dtype:
        return student.clone()
    if gradient.data_ptr() != student.data_ptr():
        gradient.copy_(student)
    return gradient


def _pieces(rows: Rows) -> Iterator[tuple[Rows, slice]]:
    """The rows in pieces that may be copied, and which they are."""
    outer, inner, size = rows.student.shape
    step = max(1, _COPIED // size)
    for o in range(outer):
        for start in range(0, inner, step):
            stop = min(start + step, inner)
            span = slice(o * inner + start, o * inner + stop)
            ids, valid, temperature = (
                None if values is None else per_row(values, rows.total)[span]
                for values in (rows.token_ids, rows.valid, rows.row_temperature)
            )
            student = rows.student[o : o + 1, start:stop]
            piece = rows._replace(
                student=student, token_ids=ids, valid=valid, row_temperature=temperature
            )
            yield piece, span


def _centred(z: Tensor, kept: Tensor, statistics: Tensor) -> Tensor:
    """z - max z on the support, 0 where an id does not count."""
    return torch.where(kept, z - statistics[FIELDS.student_max][:, None], 0.0)


def _as_shard(z: Tensor, kept: Tensor, rows: Rows, fields: int) -> Tensor:
    """The student's statistics of a support, as if it were a shard: float64 `[1, F, N]`."""
    z = torch.where(kept, z.double(), -torch.inf)
    top = z.amax(-1, keepdim=True)
    x = (z - top) / rows.temperature_of()
    e = x.exp()
    total = e.sum(-1, keepdim=True)
    own = z.new_zeros((1, fields, len(z)))
    own[0, FIELDS.student_max] = top[:, 0]
    own[0, FIELDS.student_lse] = total.log()[:, 0]
    mean = torch.where(e == 0, 0.0, e * x).sum(-1, keepdim=True) / total
    own[0, FIELDS.entropy] = (total.log() - mean)[:, 0]
    return own
