"""The torch backend: the closed form in row blocks that stay in the processor's cache.

Beside the gradient, nothing of size `[N, V]` ever exists: a block of rows is read once from memory
and every intermediate lives in a few block-sized buffers. It runs on any device; on the CPU it also
looks at its results. A block in which they are not finite, or larger than ordinary numbers, is
computed a second time, guarded: with selects, and in double precision, where the lowest logit over
the smallest temperature is a number. So only the blocks that hold an edge case pay for it.

Both sides are referred to their own row maxima before anything is exponentiated or subtracted: with
x = z - max z and u = w - max w the log-ratio

    l_v = log p_v - log q_v = (x_v - u_v)/T + (log sum e^(u/T) - log sum e^(x/T))

carries no error from a constant offset between the models.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import (
    FIELDS,
    LEAST,
    LOWEST,
    MEMBER,
    MEMBER_FIELDS,
    SMALL_DIVERGENCE,
    STUDENT_FIELDS,
    Coefficients,
    Rows,
    weighted,
)
from hybrid_kernels.torch_backend.divergences import FORMS, Entries, row_dot, settle, tilt
from hybrid_kernels.torch_backend.topk import Supports

# The results of a block of ordinary numbers are smaller than that.
ORDINARY = 2.0**20

# Elements of a block, 640 KiB in fp32: its four buffers then share two L2 caches of 2 MiB.
BLOCK_ELEMENTS = 160 * 1024


def blocks(
    rows: Rows,
    statistics: Tensor,
    coefficients: Coefficients | None = None,
    gradient: Tensor | None = None,
    supports: Supports | None = None,
    known: bool = False,
) -> Iterator["_Block"]:
    """Blocks of consecutive rows, with the masked rows cleared; `known` statistics are only read.

    On the CPU masked rows are not even read. Elsewhere the mask stays on the device and is applied
    to each block after its arithmetic.
    """
    outer, inner, size = rows.student.shape
    on_cpu = rows.student.device.type == "cpu"
    step = max(1, min(BLOCK_ELEMENTS // size, inner))
    count = 5 if len(rows.teachers) > 1 and rows.support is None else 4
    shape = (count, step, size)
    buffers = torch.empty(shape, dtype=torch.float32, device=rows.student.device).unbind()
    for o in range(outer):
        runs = [(0, inner)]
        valid = None if rows.valid is None else rows.valid[o * inner : (o + 1) * inner]
        if valid is not None and on_cpu:
            runs = _runs(valid)
            if not known:
                statistics[:, o * inner : (o + 1) * inner][:, ~valid] = 0.0
            if gradient is not None:
                gradient[o][~valid] = 0
        for first, last in runs:
            for start in range(first, last, step):
                stop = min(start + step, last)
                block = (coefficients, gradient, buffers, supports, known, o, start, stop)
                yield _Block(rows, statistics, *block)
                if valid is not None and not on_cpu:
                    hidden = ~valid[start:stop]
                    if not known:
                        span = slice(o * inner + start, o * inner + stop)
                        statistics[:, span].masked_fill_(hidden, 0.0)
                    if gradient is not None:
                        gradient[o, start:stop].masked_fill_(hidden[:, None], 0.0)


def _runs(valid: Tensor) -> list[tuple[int, int]]:
    """The ranges of consecutive true entries."""
    flips = torch.nn.functional.pad(valid.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return list(zip(flips[::2], flips[1::2], strict=True))


class _Block:
    """A few consecutive rows: their logits, and four buffers in cache.

    `x` holds z - max z, `log_ratio` l and then u, `p` and `q` the probabilities, which `p_factor`
    and `q_factor` have still to normalise (`q` then -v). What there is one of per row is a column
    `[r, 1]`. With several teachers, which take their turns in these buffers, a fifth one sums up
    dD/dz.
    """

    def __init__(
        self,
        rows: Rows,
        statistics: Tensor,
        coefficients: Coefficients | None,
        gradient: Tensor | None,
        buffers: tuple[Tensor, ...],
        supports: Supports | None,
        known: bool,
        outer: int,
        start: int,
        stop: int,
    ) -> None:
        self.rows = rows
        self.form, self.family = FORMS[rows.divergence], FAMILIES[rows.divergence]
        offset = outer * rows.student.shape[1]
        self.range = slice(offset + start, offset + stop)
        self.statistics = statistics[:, self.range]
        self.coefficients = coefficients
        self.student = rows.student[outer, start:stop]
        self.teachers: list[Tensor] = []
        if rows.support is None:
            self.teachers = [teacher[outer, start:stop] for teacher in rows.teachers]
        self.gradient = None if gradient is None else gradient[outer, start:stop]
        self.ids = None
        if rows.token_ids is not None:
            # Ids on masked rows may be anything. One outside is of a token that is not here: its
            # log p is NaN, and it has no gradient of its own.
            ids = rows.token_ids[self.range].long()
            self.ids = ids.clamp(0, rows.student.shape[-1] - 1)[:, None]
            self.outside = (ids != self.ids[:, 0])[:, None]
        count = stop - start
        if count < buffers[0].shape[0]:
            buffers = tuple(buffer[:count] for buffer in buffers)
        self.x, self.log_ratio, self.p, self.q = buffers[:4]
        self.pull = buffers[4] if len(buffers) > 4 else None
        self.exponentials: Tensor | None = None  # kept for the gradient
        if supports is not None and supports.exponentials is not None:
            self.exponentials = self.p = supports.exponentials[outer, start:stop]
        self.p_factor: Tensor | None = None
        self.q_factor: Tensor | None = None
        keeps_x = rows.teacher_floor is not None or len(self.teachers) > 1
        keeps_x = keeps_x or self.family.tilted
        keeps_x = keeps_x or (coefficients and coefficients.entropy is not None)
        if not keeps_x:
            self.q = self.x  # one buffer less in cache
        self.on_cpu = rows.student.device.type == "cpu"
        self.inv_t = 1.0 / rows.temperature_of(self.range)
        self.at_one = rows.row_temperature is None and rows.temperature == 1.0
        self.guarded = False
        self.log_p = torch.full((), torch.nan)
        self.log_q: Tensor | None = None
        self.supports = supports
        self.known = known
        self.columns: dict[int, Tensor] = {}
        if known:
            self.columns = dict(enumerate(self.statistics[:, :, None].unbind()))
        self.token_log_q = torch.zeros(())

    def measure(self) -> None:
        """Fills the statistics, and the buffers that the gradient reads."""
        found = self._checked(self._fill)
        if self.ids is not None:
            for field in (FIELDS.log_prob, FIELDS.teacher_log_prob)[: 1 + len(self.teachers)]:
                found[:, field : field + 1].masked_fill_(self.outside, torch.nan)
        self.statistics.copy_(found.T)

    def recall(self) -> None:
        """Fills the buffers that the gradient reads, from statistics that are known."""
        self._checked(self._refill)

    def write_values(self, values: Tensor) -> None:
        """Writes what `row_values` tells."""
        found = self._checked(self._parts)[:, 1:]
        if self.ids is not None:
            found[:, :1].masked_fill_(self.outside, torch.nan)
        values[:, self.range] = found.T

    def _checked(self, fill: Callable[[], Tensor]) -> Tensor:
        """What `fill` returns, guarded where it is not ordinary."""
        # Where looking at a result would synchronise a device, every block counts as an edge case.
        self.guarded = not self.on_cpu
        found = fill()
        if self.on_cpu and not bool((found.abs() < ORDINARY).all()):
            self.guarded = True
            self._widen()
            found = fill()
        return found

    def _widen(self) -> None:
        """Replaces the buffers by ones in double precision."""
        count = 4 if self.pull is None else 5
        shape = (count, *self.student.shape)
        buffers = torch.empty(shape, dtype=torch.float64, device=self.student.device).unbind()
        self.x, self.log_ratio, self.p, self.q = buffers[:4]
        self.pull = None if self.pull is None else buffers[4]

    def _fill(self) -> Tensor:
        """Statistics `[r, STATISTICS]`."""
        top, lse, self.p_factor = self._exponentials(self.student, self.x, self.p)
        self._normalise_guarded(lse)
        zero = torch.zeros_like(lse)
        columns = self.columns = dict.fromkeys(range(self.statistics.shape[0]), zero)
        columns[FIELDS.student_max] = top
        columns[FIELDS.student_lse] = lse
        columns[FIELDS.logsumexp] = self._over_t(top) + lse
        columns[FIELDS.entropy] = lse - self._over_t(self._mean_x())
        if self.ids is not None:
            columns[FIELDS.log_prob] = self._over_t(self.x.gather(1, self.ids)) - lse
        if self.supports is not None:
            self._gather_support(self.supports)
        self.token_log_q = zero
        for member in range(len(self.teachers)):
            self._compare(member)
        if self.ids is not None and self.teachers:
            columns[FIELDS.teacher_log_prob] = self.token_log_q
        return torch.cat(tuple(columns.values()), 1)

    def _mean_x(self) -> Tensor:
        """The mean of x under p."""
        if self.p_factor is None:
            return row_dot(self.p, self.x.masked_fill(self.p == 0, 0.0))
        return row_dot(self.p, self.x).mul_(self.p_factor)

    def _recentre(self) -> Tensor:
        """x and p by the normalisers that are known; NaN where there is an infinite logit."""
        columns = self.columns
        known = columns[FIELDS.student_max], columns[FIELDS.student_lse]
        self.p_factor = self._exponentials(self.student, self.x, self.p, known)[2]
        self._normalise_guarded(known[1])
        return self._mean_x()

    def _refill(self) -> Tensor:
        """What tells whether all was ordinary, `[r, *]`."""
        found = [self._recentre()]
        for member in range(len(self.teachers)):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            found += self._sums(self._log_ratios(member))
            found.append(self.columns[first + MEMBER.slope_sum])
            self._tilt(self.columns[first + MEMBER.log_s])
            if self.pull is not None:
                self._add_pull(self.pull, member, found[-1])
        return torch.cat(found, 1)

    def _parts(self) -> Tensor:
        """The same, and then what `row_values` tells."""
        found, form = [self._recentre()], self.form
        self.token_log_q = torch.zeros_like(found[0])
        for member in range(len(self.teachers)):
            lost = self._log_ratios(member)
            value, slope_sum = self._sums(lost)
            if form.small_value is not None:
                self._normalise()
                value = form.small_value(self._entries()) + form.lost_sign * lost
            found += [value, slope_sum]
        found.insert(1, self.token_log_q)
        return torch.cat(found, 1)

    def _gather_support(self, supports: Supports) -> None:
        """Notes z - max z on a top-K support, and what is outside. Leaves p 0 on it."""
        index, kept = supports.index[self.range], supports.kept[self.range]
        supports.x[self.range] = self.x.gather(1, index)
        # Taken away from themselves they leave an exact 0, and what is not kept leaves all alone.
        on_support = torch.where(kept, self.p.gather(1, index), 0.0)
        self.p.scatter_add_(1, index, on_support.neg_())
        outside = self.p.sum(-1, keepdim=True)
        if self.guarded:
            outside = outside * self.columns[FIELDS.student_lse].exp()
            if self.exponentials is not None:
                torch.exp(self._over_t(self.x), out=self.exponentials)
        supports.outside[self.range] = outside

    def _compare(self, member: int) -> None:
        """A teacher's statistics, its share of the divergence and the sum of its slopes."""
        columns, form = self.columns, self.form
        share = self.rows.shares[member]
        first = STUDENT_FIELDS + member * MEMBER_FIELDS
        lost = self._log_ratios(member)
        value, slope_sum = self._sums(lost)
        if self.guarded or self.family.tilted:
            lse, teacher_lse = columns[FIELDS.student_lse], columns[first + MEMBER.teacher_lse]
            finite = lse.isfinite() & teacher_lse.isfinite()
            settled = settle(self.family, value, slope_sum, finite, self.rows.parameter)
            value, slope_sum, columns[first + MEMBER.log_s] = settled
            self._tilt(settled[-1])
        columns[first + MEMBER.slope_sum] = slope_sum
        if form.small_value is not None:
            small = value < SMALL_DIVERGENCE
            if self.guarded or bool(small.any()):
                self._normalise()
                refined = form.small_value(self._entries()) + form.lost_sign * lost
                value = torch.where(small, refined, value)
        if self.pull is None:
            columns[FIELDS.divergence] = value if share == 1.0 else share * value
        else:
            columns[FIELDS.divergence] = columns[FIELDS.divergence] + share * value
            self._add_pull(self.pull, member, slope_sum)

    def _log_ratios(self, member: int) -> Tensor | float:
        """Fills q and l of a member, and adds its log q(y). Measures its normalisers, if they are
        not known. Returns 1 - sum q, of a q raised to the floor."""
        columns, floor = self.columns, self.rows.teacher_floor
        q, log_ratio, teacher = self.q, self.log_ratio, self.teachers[member]
        first = STUDENT_FIELDS + member * MEMBER_FIELDS
        student_max, student_lse = columns[FIELDS.student_max], columns[FIELDS.student_lse]
        known = None
        if self.known:
            known = columns[first + MEMBER.teacher_max], columns[first + MEMBER.teacher_lse]
        top, teacher_lse, self.q_factor = self._exponentials(teacher, log_ratio, q, known)
        columns[first + MEMBER.teacher_max] = top
        columns[first + MEMBER.teacher_lse] = teacher_lse
        if self.ids is not None:
            log_q = self._over_t(log_ratio.gather(1, self.ids)) - teacher_lse
            log_q = log_q if floor is None else log_q.clamp_(min=floor)
            share = self.rows.shares[member] / sum(self.rows.shares)
            self.token_log_q = self.token_log_q + share * log_q
        if self.guarded:
            self.log_q = self._over_t(log_ratio) - teacher_lse
        self._subtract(teacher, student_max, top, teacher_lse - student_lse)
        if self.guarded or self.family.tilted or floor is not None:
            self.log_p = self._over_t(self.x) - student_lse
        lost = 0.0
        if self.guarded or floor is not None or not self.family.linear or self.pull is not None:
            self._normalise()
        if floor is not None:
            torch.minimum(log_ratio, self.log_p - floor, out=log_ratio)
            raised = (math.exp(floor) - q).clamp_(min=0.0)
            if self.log_q is not None:
                # Not under what both sides forbid.
                none = (self.student == -torch.inf) & (teacher == -torch.inf)
                raised.masked_fill_(none, 0.0)
                self.log_q = self.log_q.clamp_(min=floor).masked_fill_(none, -torch.inf)
            q.add_(raised)
            lost = -raised.sum(-1, keepdim=True)
        if self.log_q is not None:
            _keep_some(q, self.log_q)
            none = (self.log_p == -torch.inf) & (self.log_q == -torch.inf)
            log_ratio.masked_fill_(none, 0.0)
        return lost

    def _sums(self, lost: Tensor | float) -> tuple[Tensor, Tensor]:
        """`Form.compare` of these buffers."""
        value, slope_sum = self.form.compare(self._entries(), self.rows.parameter, lost)
        if self.p_factor is not None:
            value = slope_sum = value * self.p_factor
        return value, slope_sum

    def _tilt(self, log_s: Tensor) -> None:
        """`tilt` of these buffers, if their slopes have waited for it."""
        if self.family.tilted:
            tilt(self._entries(), self.rows.parameter, log_s)

    def _entries(self) -> Entries:
        return Entries(self.p, self.q, self.log_ratio, self.log_p, self.log_q)

    def _add_pull(self, pull: Tensor, member: int, slope_sum: Tensor) -> None:
        """Adds a member's dD/dz: its share of p (u - sum of slopes) + v."""
        if member == 0:
            pull.zero_()
        weight = self.rows.shares[member]
        u = self._of_some(self.log_ratio, weight > 1)
        if not self.family.has_u:
            u.zero_()
        pull.addcmul_(self.p, u.sub_(slope_sum).mul_(weight))
        if self.family.has_v:
            pull.sub_(self.q.mul_(weight))

    def _of_some(self, factor: Tensor, enlarged: bool = False) -> Tensor:
        """A factor of p; 0 where p is 0, if it may be infinite there, or become so."""
        return factor.masked_fill_(self.p == 0, 0.0) if self.guarded or enlarged else factor

    def _scale(self, factor: Tensor, weight: Tensor) -> Tensor:
        """A factor of p times a weight."""
        enlarged = self.on_cpu and bool((weight.abs() > 1).any())
        return self._of_some(factor, enlarged).mul_(weight)

    def _over_t(self, value: Tensor) -> Tensor:
        return value if self.at_one else value * self.inv_t

    def _normalise_guarded(self, student_lse: Tensor) -> None:
        if self.guarded and self.p_factor is not None:
            self.p.mul_(self.p_factor)
            self.p_factor = None
            _keep_some(self.p, self._over_t(self.x) - student_lse)

    def _normalise(self) -> None:
        if self.p_factor is not None:
            self.p.mul_(self.p_factor)
        if self.q_factor is not None:
            self.q.mul_(self.q_factor)
        self.p_factor = self.q_factor = None

    def _exponentials(
        self,
        logits: Tensor,
        centred: Tensor,
        out: Tensor,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fills z - max z and exp((z - max z)/T); returns max z, and the logarithm and reciprocal
        of the sum of the latter. `known` are the first two, of which these logits may be a part."""
        if logits.dtype == centred.dtype:
            top = logits.amax(-1, keepdim=True) if known is None else known[0]
            torch.sub(logits, top, out=centred)
        else:
            centred.copy_(logits)
            top = centred.amax(-1, keepdim=True) if known is None else known[0]
            centred.sub_(top)
        torch.exp(self._over_t(centred), out=out)
        if known is not None:
            return *known, known[1].neg().exp_()
        total = out.sum(-1, keepdim=True)
        return top, total.log(), total.reciprocal()

    def _subtract(
        self, teacher: Tensor, student_max: Tensor, teacher_max: Tensor, shift: Tensor
    ) -> None:
        """Fills ((z - max z) - (w - max w))/T + shift, the difference exact for models that agree.

        z - w is exact for close numbers, where z - max z and w - max w would each be rounded. So
        the difference of the maxima goes last, all but its integer part, which is taken off the
        larger side first: a large offset between the models must not cost digits either.
        """
        log_ratio, student = self.log_ratio, self.student
        if log_ratio.dtype == torch.float64:
            torch.sub(self.x, log_ratio, out=log_ratio).mul_(self.inv_t).add_(shift)
            return
        rest = student_max - teacher_max
        plain = student.dtype == teacher.dtype == torch.float32 and self.on_cpu
        if plain and bool((rest.abs() < 0.5).all()):
            torch.sub(student, teacher, out=log_ratio)
        else:
            coarse = rest.round()
            larger = student_max.abs() > teacher_max.abs()
            off_student = torch.where(larger, coarse, 0.0)
            off_teacher = torch.where(larger, 0.0, -coarse)
            log_ratio.copy_(teacher).sub_(off_teacher)
            torch.sub(student - off_student, log_ratio, out=log_ratio)
            rest = (student_max - off_student) - (teacher_max - off_teacher)
        if self.at_one:
            log_ratio.add_(shift - rest)
        else:
            log_ratio.sub_(rest).mul_(self.inv_t).add_(shift)

    def write_gradient(self) -> None:
        """dz = (1/T) (c_div (s - p sum s) + c_logp (1[v = y] - p) - c_ent p (log p + H))."""
        assert self.gradient is not None
        assert self.coefficients is not None
        c_div, c_logp, c_ent = (self._own(c) for c in self.coefficients)
        p, inner, family, columns = self.p, self.log_ratio, self.family, self.columns
        factor = 1.0 if self.p_factor is None else self.p_factor
        # One teacher's slopes are still in the buffers.
        alone = c_div is not None and self.pull is None
        constant = 0.0
        if c_div is not None and alone:
            slope_sum = columns[STUDENT_FIELDS + MEMBER.slope_sum]
            if self.guarded:
                # A weight of 0 leaves nothing of an infinite divergence.
                unweighted = c_div == 0
                slope_sum = torch.where(unweighted, 0.0, slope_sum)
                inner.masked_fill_(unweighted, 0.0)
                self.q.masked_fill_(unweighted, 0.0)
            if self.rows.shares[0] != 1.0:
                c_div = c_div * self.rows.shares[0]
            constant = constant - c_div * slope_sum
        if c_div is not None and alone and family.has_u:
            self._scale(inner, c_div * factor)
        else:
            inner.zero_()
        if c_logp is not None:
            constant = constant - c_logp
        if c_ent is not None:
            inner.sub_(self._scale(self.x, c_ent * factor * self.inv_t))
            constant = constant + c_ent * (columns[FIELDS.student_lse] - columns[FIELDS.entropy])
        inner.add_(constant * factor)
        out = self.gradient if self.gradient.dtype == inner.dtype else inner
        torch.mul(p, inner, out=out)
        if c_div is not None and alone and family.has_v:
            out.sub_(self.q.mul_(c_div))
        if c_div is not None and self.pull is not None:
            out.add_(weighted(c_div, self.pull))
        if c_logp is not None and self.ids is not None:
            own_term = torch.where(self.outside, 0.0, c_logp)
            out.scatter_add_(1, self.ids, own_term.to(out.dtype))
        if out is not self.gradient:
            self.gradient.copy_(out)

    def write_support_gradient(self) -> None:
        """As `write_gradient`, where a multiple of p is all that the divergence adds outside the
        support, and what it adds on it is known."""
        assert self.gradient is not None
        assert self.coefficients is not None
        assert self.supports is not None
        supports = self.supports
        _, c_logp, c_ent = (self._own(c) for c in self.coefficients)
        constant = supports.constant[self.range]
        lse = self.statistics[FIELDS.student_lse][:, None]
        x, out = self.x, self.p
        if supports.exponentials is None or c_ent is not None:
            torch.sub(self.student, self.statistics[FIELDS.student_max][:, None], out=x)
        if supports.exponentials is None:
            torch.exp(self._over_t(x), out=out)
        # exp(-lse) normalises p.
        factor = torch.exp(-lse)
        if c_ent is None:
            out.mul_(constant * factor)
        else:
            inner = x.clamp_(min=LOWEST).mul_(c_ent * factor * -self.inv_t).add_(constant * factor)
            out.mul_(inner)
        supports.write(out, self.range)
        if c_logp is not None and self.ids is not None:
            own_term = torch.where(self.outside, 0.0, c_logp)
            out.scatter_add_(1, self.ids, own_term.to(out.dtype))
        if out is not self.gradient:
            self.gradient.copy_(out)

    def _own(self, column: Tensor | None) -> Tensor | None:
        return None if column is None else column[self.range].to(self.p.dtype)


def _keep_some(probability: Tensor, log_probability: Tensor) -> None:
    """Leaves something of a probability that is 0 in its dtype, and not in double precision."""
    if probability.dtype != torch.float64:
        hidden = (probability == 0) & (log_probability > LEAST)
        probability.masked_fill_(hidden, 2.0**-149)
