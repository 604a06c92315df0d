"""The torch backend's arithmetic: the closed form in blocks of rows that stay in cache.

A block of rows is read once from memory, and every intermediate lives in a few block-sized buffers.
On the CPU a block also looks at its results. If they are not finite, or larger than ordinary
numbers, it is computed a second time, guarded: with selects, and in double precision, in which the
lowest logit over the smallest temperature is a number. So only blocks with an edge case pay for it.

Both sides are referred to their own row maxima before anything is exponentiated or subtracted: with
x = z - max z and u = w - max w the log-ratio

    l_v = log p_v - log q_v = (x_v - u_v)/T + (log sum e^(u/T) - log sum e^(x/T))

carries no error from a constant offset between the models.

A value per row is a column `[r, 1]`. Long ordinary rows take a shorter way, see `ordinary.py`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybrid_kernels.rows import (
    FIELDS,
    LOWEST,
    MEMBER,
    MEMBER_FIELDS,
    SMALL_DIVERGENCE,
    STUDENT_FIELDS,
    weighted,
)
from hybrid_kernels.torch_backend.divergences import Entries, keep_some, row_dot, settle, tilt
from hybrid_kernels.torch_backend.ordinary import ORDINARY
from hybrid_kernels.torch_backend.sweep import Sweep
from hybrid_kernels.torch_backend.topk import Supports


def blocks(sweep: Sweep) -> Iterator["Block"]:
    """The blocks of a sweep, each of which is finished before the next one begins."""
    for place in sweep.places():
        yield Block(sweep, *place)


class Block:
    """A few consecutive rows: their logits, and four buffers in cache.

    `x` holds z - max z, `log_ratio` l and then u, `p` and `q` the probabilities, which `p_factor`
    and `q_factor` have still to normalise (`q` then -v). With several teachers, which take turns in
    these buffers, a fifth one, `pull`, sums up dD/dz. `columns` are the statistics by their number.
    """

    def __init__(self, sweep: Sweep, outer: int, start: int, stop: int) -> None:
        rows = sweep.rows
        offset = outer * rows.student.shape[1]
        self.sweep, self.rows, self.form, self.family = sweep, rows, sweep.form, sweep.family
        self.place = (outer, start)
        self.range = slice(offset + start, offset + stop)
        self.student = rows.student[outer, start:stop]
        self.teachers = [teacher[outer, start:stop] for teacher in sweep.teachers]
        self.gradient = None if sweep.gradient is None else sweep.gradient[outer, start:stop]
        self.p_factor: Tensor | None = None
        self.q_factor: Tensor | None = None
        self.inv_t = 1.0 / rows.temperature_of(self.range)
        self.guarded = False
        self.log_p = self.student.new_full((), torch.nan)
        self.log_q: Tensor | None = None
        self.columns: dict[int, Tensor] = {}
        if sweep.known:
            statistics = sweep.statistics[:, self.range]
            self.columns = dict(enumerate(statistics[:, :, None].unbind()))

    def _use_buffers(self) -> None:
        sweep, count = self.sweep, self.student.shape[0]
        buffers = sweep.buffers
        if count < buffers[0].shape[0]:
            buffers = tuple(buffer[:count] for buffer in buffers)
        self.x, self.log_ratio, self.p, self.q = buffers[:4]
        self.pull = buffers[4] if len(buffers) > 4 else None
        if not sweep.keeps_x:
            self.q = self.x  # one buffer less in cache
        self.exponentials: Tensor | None = None  # kept for the gradient
        if sweep.supports is not None and sweep.supports.exponentials is not None:
            outer, start = self.place
            self.exponentials = self.p = sweep.supports.exponentials[outer, start : start + count]

    # -- what launchers call ----------------------------------------------------------------------

    def measure(self) -> None:
        """Fills the statistics, and the buffers that the gradient reads."""
        statistics = self.sweep.statistics[:, self.range]
        self._checked(self._fill)
        zero = torch.zeros_like(self.columns[FIELDS.student_max])
        columns = [self.columns.get(field, zero) for field in range(len(statistics))]
        statistics.copy_(torch.cat(columns, 1).T)

    def recall(self) -> None:
        """Fills the buffers that the gradient reads, from statistics that are known."""
        self._checked(self._refill)

    def write_values(self, values: Tensor) -> None:
        """Writes each member's sums, as `launch.row_values` describes them."""
        columns = self._checked(self._parts)[1:]
        values[1:, self.range] = torch.cat(columns, 1).T.float()

    def _checked(self, fill: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `fill` returns, guarded where it is not ordinary."""
        self._use_buffers()
        # Where looking at a result would synchronise a device, every block counts as an edge case.
        self.guarded = not self.sweep.on_cpu
        results = fill()
        if not self.guarded and not bool((torch.cat(results, 1).abs() < ORDINARY).all()):
            self.guarded = True
            self._widen()
            results = fill()
        return results

    def _coefficients(self) -> list[Tensor | None]:
        assert self.sweep.coefficients is not None
        dtype = self.p.dtype
        return [None if c is None else c[self.range].to(dtype) for c in self.sweep.coefficients]

    def _widen(self) -> None:
        """Replaces the buffers by ones in double precision."""
        count = 4 if self.pull is None else 5
        shape = (count, *self.student.shape)
        buffers = torch.empty(shape, dtype=torch.float64, device=self.student.device).unbind()
        self.x, self.log_ratio, self.p, self.q = buffers[:4]
        self.pull = None if self.pull is None else buffers[4]

    # -- statistics -------------------------------------------------------------------------------

    def _fill(self) -> list[Tensor]:
        """The statistics, in `columns`, too."""
        top, lse, self.p_factor = self._exponentials(self.student, self.x, self.p)
        self._normalise_guarded(lse)
        columns = self.columns = {
            FIELDS.student_max: top,
            FIELDS.student_lse: lse,
            FIELDS.logsumexp: self._over_t(top) + lse,
            FIELDS.entropy: lse - self._over_t(self._mean_x()),
        }
        if self.sweep.supports is not None:
            self._gather_support(self.sweep.supports)
        for member in range(len(self.teachers)):
            self._compare(member)
        return list(columns.values())

    def _mean_x(self) -> Tensor:
        """The mean of x under p."""
        if self.p_factor is None:
            return row_dot(self.p, self.x.masked_fill(self.p == 0, 0.0))
        return row_dot(self.p, self.x).mul_(self.p_factor)

    def _recentre(self) -> Tensor:
        """Fills x and p by the normalisers that are known; NaN where there is an infinite logit."""
        columns = self.columns
        known = columns[FIELDS.student_max], columns[FIELDS.student_lse]
        self.p_factor = self._exponentials(self.student, self.x, self.p, known)[2]
        self._normalise_guarded(known[1])
        return self._mean_x()

    def _refill(self) -> list[Tensor]:
        """Columns that show whether everything was ordinary."""
        results = [self._recentre()]
        for member in range(len(self.teachers)):
            first = STUDENT_FIELDS + member * MEMBER_FIELDS
            slope_sum = self.columns[first + MEMBER.slope_sum]
            results += [*self._sums(self._log_ratios(member)), slope_sum]
            if self.family.tilted:
                log_s = self.columns[first + MEMBER.log_s]
                tilt(self._entries(), self.rows.parameter, log_s)
            if self.pull is not None:
                self._add_pull(self.pull, member, slope_sum)
        return results

    def _parts(self) -> list[Tensor]:
        """The mean of x, and then for each member what `write_values` writes."""
        results, form = [self._recentre()], self.form
        for member in range(len(self.teachers)):
            raised = self._log_ratios(member)
            value, slope_sum = self._sums(raised)
            if form.small_value is not None:
                self._normalise()
                value = form.small_value(self._entries()) + form.lost_sign * raised
            results += [value, slope_sum]
        return results

    def _gather_support(self, supports: Supports) -> None:
        """Notes z - max z on a top-K support, and the mass outside. Leaves p 0 on it."""
        index, counts = supports.index[self.range], supports.counts[self.range]
        supports.x[self.range] = self.x.gather(1, index)
        # Subtracted from themselves they leave an exact 0; ids that don't count change nothing.
        on_support = torch.where(counts, self.p.gather(1, index), 0.0)
        self.p.scatter_add_(1, index, on_support.neg_())
        outside = self.p.sum(-1, keepdim=True)
        if self.guarded:
            lse = self.columns[FIELDS.student_lse]
            outside = outside * lse.exp()
            if self.exponentials is not None:
                torch.exp(self._over_t(self.x), out=self.exponentials)
        supports.outside[self.range] = outside

    def _compare(self, member: int) -> None:
        """A teacher's statistics, its share of the divergence and the sum of its slopes."""
        columns, form = self.columns, self.form
        share = self.rows.shares[member]
        first = STUDENT_FIELDS + member * MEMBER_FIELDS
        raised = self._log_ratios(member)
        value, slope_sum = self._sums(raised)
        if self.guarded or self.family.tilted:
            lse, teacher_lse = columns[FIELDS.student_lse], columns[first + MEMBER.teacher_lse]
            finite = lse.isfinite() & teacher_lse.isfinite()
            settled = settle(self.family, value, slope_sum, finite, self.rows.parameter)
            value, slope_sum, columns[first + MEMBER.log_s] = settled
            if self.family.tilted:
                tilt(self._entries(), self.rows.parameter, settled[2])
        columns[first + MEMBER.slope_sum] = slope_sum
        if form.small_value is not None:
            small = value < SMALL_DIVERGENCE
            if self.guarded or bool(small.any()):
                self._normalise()
                precise = form.small_value(self._entries()) + form.lost_sign * raised
                value = torch.where(small, precise, value)
        value = value if share == 1.0 else share * value
        total = columns.get(FIELDS.divergence)
        columns[FIELDS.divergence] = value if total is None else total + value
        if self.pull is not None:
            self._add_pull(self.pull, member, slope_sum)

    def _log_ratios(self, member: int) -> Tensor | float:
        """Fills q and l of a member. Measures its normalisers, if they are not known.

        Returns 1 - sum q, which is below 0 where q was raised to the floor.
        """
        columns, floor = self.columns, self.rows.teacher_floor
        q, log_ratio, teacher = self.q, self.log_ratio, self.teachers[member]
        first = STUDENT_FIELDS + member * MEMBER_FIELDS
        student_max, student_lse = columns[FIELDS.student_max], columns[FIELDS.student_lse]
        known = None
        if self.sweep.known:
            known = columns[first + MEMBER.teacher_max], columns[first + MEMBER.teacher_lse]
        top, teacher_lse, self.q_factor = self._exponentials(teacher, log_ratio, q, known)
        columns[first + MEMBER.teacher_max] = top
        columns[first + MEMBER.teacher_lse] = teacher_lse
        if self.guarded:
            self.log_q = self._over_t(log_ratio) - teacher_lse
        self._subtract(teacher, student_max, top, teacher_lse - student_lse)
        if self.guarded or self.family.tilted or floor is not None:
            self.log_p = self._over_t(self.x) - student_lse
        mass = 0.0
        if self.guarded or floor is not None or not self.family.linear or self.pull is not None:
            self._normalise()
        if floor is not None:
            torch.minimum(log_ratio, self.log_p - floor, out=log_ratio)
            added = (math.exp(floor) - q).clamp_(min=0.0)
            if self.log_q is not None:
                # What both sides forbid is not raised.
                forbidden = (self.student == -torch.inf) & (teacher == -torch.inf)
                added.masked_fill_(forbidden, 0.0)
                self.log_q = self.log_q.clamp_(min=floor).masked_fill_(forbidden, -torch.inf)
            q.add_(added)
            mass = -added.sum(-1, keepdim=True)
        if self.log_q is not None:
            keep_some(q, self.log_q)
            forbidden = (self.log_p == -torch.inf) & (self.log_q == -torch.inf)
            log_ratio.masked_fill_(forbidden, 0.0)
        return mass

    def _sums(self, lost: Tensor | float) -> tuple[Tensor, Tensor]:
        """`Form.compare` of these buffers."""
        value, slope_sum = self.form.compare(self._entries(), self.rows.parameter, lost)
        if self.p_factor is not None:
            value = slope_sum = value * self.p_factor
        return value, slope_sum

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

    def _enlarges(self, weights: list[Tensor]) -> bool:
        """Whether a weighted sum of large numbers may be infinite, as far as looking is cheap."""
        total = sum(weight.abs() for weight in weights)
        return self.sweep.on_cpu and isinstance(total, Tensor) and bool((total > 1).any())

    def _over_t(self, value):
        return value if self.sweep.at_one else value * self.inv_t

    def _normalise_guarded(self, student_lse: Tensor) -> None:
        if self.guarded and self.p_factor is not None:
            self.p.mul_(self.p_factor)
            self.p_factor = None
            keep_some(self.p, self._over_t(self.x) - student_lse)

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
        """Fills z - max z and exp((z - max z)/T).

        Returns max z, and the logarithm and the reciprocal of the sum of the exponentials. `known`
        are the first two, where these logits are a part of a row.
        """
        copied = logits.dtype != centred.dtype
        if copied:
            logits = centred.copy_(logits)
        top = logits.amax(-1, keepdim=True) if known is None else known[0]
        torch.sub(logits, top, out=centred)
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
        the difference of the maxima goes last, all but its integer part, which is subtracted from
        the larger side first: a large offset between the models must not cost digits either.
        """
        log_ratio, student = self.log_ratio, self.student
        if log_ratio.dtype == torch.float64:
            torch.sub(self.x, log_ratio, out=log_ratio).mul_(self.inv_t).add_(shift)
            return
        rest = student_max - teacher_max
        plain = student.dtype == teacher.dtype == torch.float32 and self.sweep.on_cpu
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
        if self.sweep.at_one:
            log_ratio.add_(shift - rest)
        else:
            log_ratio.sub_(rest).mul_(self.inv_t).add_(shift)

    # -- gradients --------------------------------------------------------------------------------

    def write_gradient(self) -> None:
        """dz = (1/T) (c_div (s - p sum s) - c_logp p - c_ent p (log p + H)).

        All but the sampled token's own term, which `_finish` or `Sweep.add_tokens` adds.
        """
        assert self.gradient is not None
        c_div, c_logp, c_ent = self._coefficients()
        p, family, columns = self.p, self.family, self.columns
        factor = 1.0 if self.p_factor is None else self.p_factor
        # One teacher's slopes are still in the buffers.
        alone = None if self.pull is not None else c_div
        constant, inner = torch.zeros_like(columns[FIELDS.student_lse]), None
        if alone is not None:
            slope_sum = columns[STUDENT_FIELDS + MEMBER.slope_sum]
            if self.guarded:
                # A weight of 0 silences an infinite divergence.
                unweighted = alone == 0
                slope_sum = torch.where(unweighted, 0.0, slope_sum)
                self.log_ratio.masked_fill_(unweighted, 0.0)
                self.q.masked_fill_(unweighted, 0.0)
            alone = alone * self.rows.shares[0]
            constant = constant - alone * slope_sum
        if c_logp is not None:
            constant = constant - c_logp
        if c_ent is not None:
            constant = constant + c_ent * (columns[FIELDS.student_lse] - columns[FIELDS.entropy])
        constant = constant * factor
        summands = []
        if alone is not None and family.has_u:
            summands.append((self.log_ratio, alone * factor))
        if c_ent is not None:
            summands.append((self.x, -c_ent * factor * self.inv_t))
        enlarged = self._enlarges([weight for _, weight in summands])
        for values, weight in summands:
            product = self._of_some(values, enlarged).mul_(weight)
            inner = product.add_(constant) if inner is None else inner.add_(product)
        out = self.gradient if self.gradient.dtype == p.dtype else self.log_ratio
        torch.mul(p, constant if inner is None else inner, out=out)
        if alone is not None and family.has_v:
            out.sub_(self.q.mul_(alone))
        if c_div is not None and self.pull is not None:
            out.add_(weighted(c_div, self.pull))
        self._finish(out)

    def write_support_gradient(self) -> None:
        """As `write_gradient`, where outside the support the divergence adds a multiple of p, and
        on it the gradient is known."""
        supports = self.sweep.supports
        assert self.gradient is not None
        assert supports is not None
        self._use_buffers()
        c_ent = self._coefficients()[2]
        constant = supports.constant[self.range]
        statistics = self.sweep.statistics[:, self.range, None]
        x, out = self.x, self.p
        if supports.exponentials is None or c_ent is not None:
            torch.sub(self.student, statistics[FIELDS.student_max], out=x)
        if supports.exponentials is None:
            torch.exp(self._over_t(x), out=out)
        factor = torch.exp(-statistics[FIELDS.student_lse])  # normalises p
        if c_ent is None:
            out.mul_(constant * factor)
        else:
            inner = x.clamp_(min=LOWEST).mul_(c_ent * factor * -self.inv_t).add_(constant * factor)
            out.mul_(inner)
        supports.write(out, self.range)
        self._finish(out)

    def _finish(self, out: Tensor) -> None:
        """Moves the gradient to its place, if it is not there."""
        assert self.gradient is not None
        terms, tokens = self.sweep.token_terms, self.sweep.tokens
        if terms is not None and tokens is not None and self.sweep.adds_in_blocks:
            out.scatter_add_(1, tokens.ids[self.range], terms[self.range].to(out.dtype))
        if out.data_ptr() != self.gradient.data_ptr():
            self.gradient.copy_(out)
