"""From hidden states: chunks of rows, each a GEMM, the row kernels and the GEMMs backwards.

For a chunk of C rows with hidden states h and the weight W, the chunk's logits z = h W^T are
written into a buffer `[C, V]` that all chunks share, the teacher's into another; the row kernels
find the statistics and write dz over z; and with

    dh = dz W        dW += dz^T h

the chunk is done: four GEMMs in all, and no `[N, V]` tensor. (With an upstream gradient for each
row, or advantages that depend on the statistics of several chunks, the logits are computed twice:
six.)

Logits of 16-bit hidden states are fp32, as they leave the accumulators of the GEMM: rounded to 16
bits first they would cost most digits of the gradient. A chunk's dz is rounded to the weight's
dtype once, as it enters the backward GEMMs; sums over chunks are fp32.

How many rows a chunk has follows from a memory budget, see `chunk_size`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels import ops
from hybrid_kernels.heads import Head
from hybrid_kernels.rows import Coefficients, Rows, per_row

# Bytes that the buffers of a chunk may take in any case.
BUDGET = {"cpu": 64 << 20, "gpu": 2 << 30}
# ... and of the two fp32 logits tensors that never exist, this part.
SHARE = 1 / 16
# Rows of a weight that are multiplied at once on the CPU. The GEMM's own copy of them then stays in
# cache, and 16-bit weights become fp32 piece by piece.
BLOCK_V = 2048
# Entries of dz that are summed up at once there.
BLOCK_ELEMENTS = 160 * 1024


# The fields of `Hidden` as the operators declare them.
HIDDEN = (
    "Tensor[] hiddens, Tensor[] weights, Tensor? bias, Tensor?[] teacher_weights, "
    "Tensor?[] teacher_biases, float[] logit_scales, float[] softcaps, int chunk_rows, "
    "ScalarType logits_dtype, bool drop_masked"
)


class Hidden(NamedTuple):
    """What makes logits of hidden states. All else of the problem is in its `Rows`: there the
    student is its hidden states `[1, N, D]`, and a teacher may be hidden states `[N, D]`, too.

    Attributes:
        hiddens, weights, bias: the student's, as in `heads.Head`.
        teacher_weights, teacher_biases: a member's; None where it is not given by hidden states.
        logit_scales, softcaps: of the student, then of each member.
        chunk_rows: rows of a chunk; 0 to have them chosen.
        logits_dtype: of the logits.
        drop_masked: whether masked rows are left out before the GEMMs, which synchronises.
    """

    hiddens: Sequence[Tensor]
    weights: Sequence[Tensor]
    bias: Tensor | None
    teacher_weights: Sequence[Tensor | None]
    teacher_biases: Sequence[Tensor | None]
    logit_scales: Sequence[float]
    softcaps: Sequence[float]
    chunk_rows: int
    logits_dtype: torch.dtype
    drop_masked: bool

    @classmethod
    def split(cls, arguments: Sequence) -> tuple["Hidden", Rows]:
        """The arguments of an operator."""
        count = len(cls._fields)
        hidden = cls(*arguments[:count])
        return hidden, hidden.rows(*arguments[count:])

    def rows(self, *fields) -> Rows:
        """The rows, of all their fields but the student."""
        return Rows.of(self.hiddens[0][None], *fields)

    # Not a property: the compiler of torch 2.10 finds none in a NamedTuple.
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return (*self.hiddens, *self.weights, self.bias)

    @property
    def student(self) -> Head:
        return Head(self.hiddens, self.weights, self.bias, self.logit_scales[0], self.softcaps[0])

    def members(self, teachers: Sequence[Tensor]) -> list[Tensor | Head]:
        """The teachers, as heads where they are given by hidden states."""
        found: list[Tensor | Head] = []
        for i, (teacher, weight) in enumerate(zip(teachers, self.teacher_weights, strict=True)):
            if weight is None:
                found.append(teacher)
            else:
                scaling = self.logit_scales[i + 1], self.softcaps[i + 1]
                found.append(Head([teacher], [weight], self.teacher_biases[i], *scaling))
        return found


def chunk_size(rows: int, row_bytes: int, vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: as many as fit into the budget, in chunks of equal size.

        budget = max(64 MiB on a CPU, 2 GiB on a GPU; (8 N V bytes) / 16)

    Args:
        rows: N.
        row_bytes: what a row takes in all buffers: V times the sizes of a logit of each side given
            by hidden states, and of a gradient where it needs a buffer of its own.
        vocabulary: V.
        device: where the buffers are.
    """
    least = BUDGET["cpu" if device.type == "cpu" else "gpu"]
    budget = max(least, int(8 * rows * vocabulary * SHARE))
    most = max(1, min(budget // row_bytes, rows))
    if device.type != "cpu" and most >= 512:
        most -= most % 128  # whole tiles of the GEMMs
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


# -- GEMMs ----------------------------------------------------------------------------------------


def _fused(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies 16-bit numbers into an fp32 sum that is not rounded."""
    if a.dtype == b.dtype == out.dtype:
        return a.dtype == torch.float32 or a.device.type != "cpu"
    fp32 = a.dtype == b.dtype and out.dtype == torch.float32
    return fp32 and a.is_cuda and torch.version.hip is None


def _gemm(out: Tensor, a: Tensor, b: Tensor, scale: float, accumulate: bool) -> None:
    """out = scale a b, plus what is there where it is to accumulate; sums in fp32."""
    options = {"beta": int(accumulate), "alpha": scale}
    if not _fused(out, a, b):
        if out.dtype == torch.float32:
            torch.addmm(out, a.float(), b.float(), **options, out=out)
        else:
            start = out.float() if accumulate else out.new_zeros(out.shape, dtype=torch.float32)
            out.copy_(start.addmm_(a.float(), b.float(), alpha=scale))
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, **options, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, **options, out=out)


def _blocks(weight: Tensor, always: bool) -> list[slice]:
    """Pieces of the vocabulary for one GEMM each: the whole where nothing is gained."""
    size = weight.shape[0]
    whole = weight.device.type != "cpu" or (weight.dtype == torch.float32 and not always)
    step = max(size, 1) if whole else BLOCK_V
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def write_logits(side: Head, selection: slice | Tensor, out: Tensor) -> None:
    """The logits of some rows into `out`, `[C, V]`."""
    scale = side.logit_scale / side.softcap if side.softcap else side.logit_scale
    for i, (hidden, weight) in enumerate(zip(side.hiddens, side.weights, strict=True)):
        own = hidden[selection]
        for part in _blocks(weight, always=True):
            _gemm(out[:, part], own, weight[part].t(), scale, accumulate=i > 0)
    if side.bias is not None:
        out.add_(side.bias, alpha=scale)
    if side.softcap:
        out.tanh_().mul_(side.softcap)


def _through_softcap(side: Head, logits: Tensor, gradient: Tensor) -> None:
    """dz times 1 - (z / softcap)^2; the logits are lost."""
    if side.softcap:
        gradient.mul_(logits.div_(side.softcap).square_().neg_().add_(1))


# -- one call ---------------------------------------------------------------------------------


class Problem:
    """The rows of one call, and the chunks that they are cut into."""

    def __init__(
        self,
        hidden: Hidden,
        rows: Rows,
        *,
        gradient: bool,
        room: int = 0,
        kept: Sequence[Tensor] = (),
    ) -> None:
        """
        Args (those that say nothing by their names):
            gradient: whether buffers are for gradients, too.
            room: bytes of memory, besides the budget, that all buffers of a single chunk may take.
            kept: buffers with the logits of all rows, where these are known.
        """
        self.student, self.teachers = hidden.student, hidden.members(rows.teachers)
        self.rows, valid = rows, rows.valid
        first = hidden.weights[0]
        self.total, self.vocabulary = rows.total, first.shape[0]
        self.device = first.device
        self.statistics = rows.statistics().zero_()
        # What is selected of all rows: None where it is all of them.
        self.index: Tensor | None = None
        if valid is not None and hidden.drop_masked:
            index = valid.nonzero()[:, 0]
            if len(index) < self.total:
                self.index = index
            self.rows = rows._replace(valid=None)
        elif valid is not None:
            # Masked rows may hold anything, which a GEMM would spread.
            masked = (~valid)[:, None]
            states = [one.masked_fill(masked, 0.0) for one in hidden.hiddens]
            self.student = self.student._replace(hiddens=states)
        self.count = self.total if self.index is None else len(self.index)
        self.logits_dtype = hidden.logits_dtype
        self.gradient_dtype = self.logits_dtype
        if first.device.type != "cpu" and first.element_size() < self.logits_dtype.itemsize:
            self.gradient_dtype = first.dtype  # as the GEMMs want it
        self.apart = bool(self.student.softcap) or self.gradient_dtype != self.logits_dtype
        self.apart = self.apart and gradient
        self.width = -(-self.vocabulary // 16) * 16  # rows begin at 16-byte boundaries
        self.linear = 1 + sum(isinstance(teacher, Head) for teacher in self.teachers)
        sizes = [self.logits_dtype.itemsize] * self.linear
        sizes += [self.gradient_dtype.itemsize] * self.apart
        self.row_bytes = self.width * sum(sizes)
        self.size = hidden.chunk_rows or chunk_size(
            self.count, self.row_bytes, self.vocabulary, self.device
        )
        if not hidden.chunk_rows:
            if self._fits(self.count, room):
                self.size = self.count
            if rows.group:
                # Parts of the vocabulary need not be equal, and chunks meet in collectives.
                smallest = torch.tensor(self.size, device=self.device)
                _all_reduce(smallest, rows.group, "MIN")
                self.size = int(smallest)
        if kept:
            self.size = self.count
        self.size = max(1, min(self.size, self.count))
        self.kept, self.buffers = kept, []

    def allocate(self, inside: Tensor | None = None) -> int:
        """Makes the buffers; `inside` the memory of a tensor, from its end, where that has room.

        Returns how many bytes at its beginning the gradient's buffer leaves free, -1 if it lies
        elsewhere.
        """
        dtypes = [self.logits_dtype] * self.linear
        if self.apart:
            dtypes.append(self.gradient_dtype)
        shape = (self.size, self.width)
        free = -1
        if self.kept:
            more = dtypes[len(self.kept) :]
            self.buffers = [*self.kept, *(self.kept[0].new_empty(shape, dtype=d) for d in more)]
        elif inside is None or not self._fits(self.size, inside.numel() * inside.element_size()):
            self.buffers = [torch.empty(shape, dtype=d, device=self.device) for d in dtypes]
        else:
            memory = inside.view(-1).view(torch.uint8)
            # The one that ends up with the gradient goes last.
            order = list(range(len(dtypes)))
            order = order if self.apart else order[1:] + order[:1]
            self.buffers, end = [memory] * len(dtypes), memory.numel()
            for i in reversed(order):
                start = end - self.size * self.width * dtypes[i].itemsize
                start -= start % 16
                piece = memory[start : start + self.size * self.width * dtypes[i].itemsize]
                self.buffers[i], end = piece.view(dtypes[i]).view(shape), start
            last = self.buffers[order[-1]]
            free = last.data_ptr() - memory.data_ptr()
        logits = self.buffers[0][None, :, : self.vocabulary]
        self.launchers = ops.implementation(self.rows._replace(student=logits))
        return free

    def _fits(self, rows: int, room: int) -> bool:
        """Whether buffers for some rows, each at a 16-byte boundary, fit into so many bytes."""
        return self.row_bytes * rows + 16 * (self.linear + 1) <= room

    def chunks(self) -> Iterator["Chunk"]:
        if not self.buffers:
            self.allocate()
        for start in range(0, self.count, self.size):
            stop = min(start + self.size, self.count)
            own = slice(start, stop) if self.index is None else self.index[start:stop]
            yield Chunk(self, own, stop - start)


class Chunk:
    """Some rows: their logits in the buffers, and the problem that they are for the row kernels."""

    def __init__(self, problem: Problem, selection: slice | Tensor, count: int) -> None:
        self.problem, self.selection = problem, selection
        self.buffers = [buffer[:count, : problem.vocabulary] for buffer in problem.buffers]
        self.logits = self.buffers[0]
        self.gradient = self.buffers[-1] if problem.apart else self.logits
        if not problem.kept:
            write_logits(problem.student, selection, self.logits)
        teachers, linear = [], iter(self.buffers[1:])
        for teacher in problem.teachers:
            if isinstance(teacher, Head):
                own = next(linear)
                if not problem.kept:
                    write_logits(teacher, selection, own)
                teachers.append(own[None])
            elif teacher.ndim == 3:
                teachers.append(_logit_rows(teacher, selection))
            else:
                teachers.append(teacher[selection].contiguous())
        rows = problem.rows
        self.rows = rows._replace(
            student=self.logits[None],
            teachers=tuple(teachers),
            support=self.own(rows.support),
            token_log_prob=self.own(rows.token_log_prob),
            token_ids=self.own(rows.token_ids),
            valid=self.own(rows.valid),
            row_temperature=self.own(rows.row_temperature),
        )
        ops.check_values(self.rows)

    def own(self, values: Tensor | None) -> Tensor | None:
        """The part of these rows of `[N, ...]` or `[R]`; one element stays one for all."""
        if values is None or values.numel() == 1:
            return values
        values = per_row(values, self.problem.total) if values.ndim == 1 else values
        return values[self.selection].contiguous()

    def measure(self) -> None:
        """Fills the statistics of these rows."""
        found = self.rows.statistics()
        self.problem.launchers.row_statistics(self.rows, found)
        self.problem.statistics[:, self.selection] = found

    def differentiate(self, coefficients: Coefficients, known: Tensor | None) -> Tensor:
        """dz `[C, V]`, all but the factor of the logit scale; statistics where none are `known`."""
        run, target = self.problem.launchers, self.gradient[None]
        own = Coefficients(*(self.own(c) for c in coefficients))
        if known is None:
            found = self.rows.statistics()
            run.hybrid_rows(self.rows, found, own, target)
            self.problem.statistics[:, self.selection] = found
        else:
            run.row_gradient(self.rows, known[:, self.selection].contiguous(), own, target)
        _through_softcap(self.problem.student, self.logits, self.gradient)
        return self.gradient


def _logit_rows(logits: Tensor, selection: slice | Tensor) -> Tensor:
    """Rows of `[O, I, V]` as `[1, C, V]`: a view where one row stride is enough, else a copy."""
    outer, inner, _ = logits.shape
    if outer == 1:
        return logits[:, selection]
    if isinstance(selection, slice):
        selection = torch.arange(selection.start, selection.stop, device=logits.device)
    return logits[selection // inner, selection % inner][None]


# -- gradients of one call --------------------------------------------------------------------


class Gradients:
    """The gradients of the student's tensors, summed over chunks.

    Attributes:
        hiddens, weights, bias: a tensor where one is wanted, else None.
        dropped, whole: squares of the L2 norms of what the filter drops, and of all.
    """

    def __init__(
        self,
        problem: Problem,
        wanted: Sequence[bool],
        bound: Tensor | None,
    ) -> None:
        student, several = problem.student, problem.count > problem.size
        pairs = len(student.weights)
        self.problem, self.bound = problem, bound
        self.hiddens: list[Tensor | None] = [None] * pairs
        self.weights: list[Tensor | None] = [None] * pairs
        self.bias = None
        for i in range(pairs):
            if wanted[i]:
                # (The ranks that share the vocabulary add theirs up.)
                dtype = torch.float32 if problem.rows.group else student.hiddens[i].dtype
                self.hiddens[i] = torch.zeros_like(student.hiddens[i], dtype=dtype)
            if wanted[pairs + i]:
                dtype = torch.float32 if several else student.weights[i].dtype
                self.weights[i] = torch.empty(
                    student.weights[i].shape, dtype=dtype, device=problem.device
                )
        if wanted[2 * pairs]:
            self.bias = torch.zeros(problem.vocabulary, dtype=torch.float32, device=problem.device)
        # With one chunk the weight's gradient is free memory until the last GEMM.
        shared = self.weights[0] if problem.count and not several else None
        self.free = problem.allocate(shared)
        self.first = True
        self.dropped = torch.zeros((), dtype=torch.float32, device=problem.device)
        self.whole = torch.zeros_like(self.dropped)

    def add(self, chunk: Chunk, gradient: Tensor) -> None:
        """The GEMMs of a chunk: dh = scale dz W, dW += scale dz^T h, db += scale sum dz."""
        kept = self._filtered(gradient) if self.bound is not None else None
        if self.bias is not None:
            self.bias.add_(
                gradient.sum(0, dtype=torch.float32), alpha=self.problem.student.logit_scale
            )
        if kept is not None:
            gradient = gradient.index_select(1, kept)
        pairs = range(len(self.hiddens))
        for i in pairs:
            if self.hiddens[i] is not None:
                self._add_hidden(i, chunk, gradient, kept)
        # The first weight last: its gradient may be where this one is.
        for i in reversed(pairs):
            if self.weights[i] is not None:
                self._add_weight(i, chunk, gradient, kept)
        self.first = False

    def _add_hidden(self, i: int, chunk: Chunk, gradient: Tensor, kept: Tensor | None) -> None:
        target, scale = self.hiddens[i], self.problem.student.logit_scale
        assert target is not None
        weight = self.problem.student.weights[i]
        weight = weight if kept is None else weight.index_select(0, kept)
        parts = _blocks(weight, always=False)
        whole = isinstance(chunk.selection, slice)
        own = target[chunk.selection] if whole else target.new_empty(len(gradient), target.shape[1])
        if len(parts) > 1 and own.dtype != torch.float32:
            own = torch.empty_like(own, dtype=torch.float32)
        for n, part in enumerate(parts):
            _gemm(own, gradient[:, part], weight[part], scale, accumulate=n > 0)
        if not parts:
            own.zero_()
        if own.data_ptr() != target.data_ptr() or not whole or own.dtype != target.dtype:
            target[chunk.selection] = own.to(target.dtype)

    def _add_weight(self, i: int, chunk: Chunk, gradient: Tensor, kept: Tensor | None) -> None:
        target, scale = self.weights[i], self.problem.student.logit_scale
        assert target is not None
        hidden = self.problem.student.hiddens[i][chunk.selection]
        if kept is not None:
            rows = torch.empty((len(kept), target.shape[1]), dtype=target.dtype, device=kept.device)
            if self.first:
                target.zero_()
            _gemm(rows, gradient.t(), hidden, scale, accumulate=False)
            target.index_add_(0, kept, rows)
            return
        if i == 0 and self.free >= 0:
            self._add_over_itself(target, gradient, hidden)
            return
        for part in _blocks(self.problem.student.weights[i], always=False):
            own = gradient[:, part].t()
            _gemm(target[part], own, hidden, scale, accumulate=not self.first)

    def _add_over_itself(self, target: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """dW where dz lies at the end of the same memory: up to there first, the rest from a copy
        of its columns."""
        scale = self.problem.student.logit_scale
        safe = self.free // (target.shape[1] * target.element_size())
        parts = _blocks(target[:safe], always=False)
        for part in parts:
            _gemm(target[part], gradient[:, part].t(), hidden, scale, accumulate=False)
        rest = gradient[:, safe:].clone()
        for part in _blocks(target[safe:], always=False):
            own = rest[:, part].t()
            _gemm(target[safe:][part], own, hidden, scale, accumulate=False)

    def _filtered(self, gradient: Tensor) -> Tensor | None:
        """The columns of a chunk's dz that are kept; None for all."""
        assert self.bound is not None
        sums, squares = _column_sums(gradient)
        keep = ~(sums <= self.bound * len(gradient))  # (and not a NaN)
        self.whole += squares.sum()
        self.dropped += torch.where(keep, 0.0, squares).sum()
        kept = keep.nonzero()[:, 0]
        return None if len(kept) == len(keep) else kept

    def finish(self) -> tuple[Tensor, list[Tensor]]:
        """The share of the norm that was dropped, and the gradients that are wanted, each in the
        dtype of its tensor."""
        student, group = self.problem.student, self.problem.rows.group
        if self.problem.count == 0:
            for gradient in self.weights:
                if gradient is not None:
                    gradient.zero_()
        found = []
        for gradient, tensor in zip(self.hiddens, student.hiddens, strict=True):
            if gradient is not None:
                if group:
                    _all_reduce(gradient, group)
                found.append(gradient.to(tensor.dtype))
        for gradient, tensor in zip(self.weights, student.weights, strict=True):
            if gradient is not None:
                found.append(gradient.to(tensor.dtype))
        if self.bias is not None and student.bias is not None:
            found.append(self.bias.to(student.bias.dtype))
        norms = torch.stack([self.dropped, self.whole])
        if group and self.bound is not None:
            _all_reduce(norms, group)
        share = torch.where(norms[1] > 0, norms[0] / norms[1], 0.0).sqrt()
        return share, found


def _column_sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """sum |dz| and sum dz^2 of each column, fp32 `[V]`."""
    if gradient.device.type != "cpu":
        norms = (torch.linalg.vector_norm(gradient, n, dim=0, dtype=torch.float32) for n in (1, 2))
        sums, roots = norms
        return sums, roots.square_()
    # A sum over columns as torch has it reads rows far apart; these stay in cache.
    sums, squares = gradient.new_zeros((2, gradient.shape[1]), dtype=torch.float32).unbind()
    for rows in gradient.split(max(4, BLOCK_ELEMENTS // max(gradient.shape[1], 1))):
        magnitudes = rows.float().abs()
        sums += magnitudes.sum(0)
        squares += magnitudes.square_().sum(0)
    return sums, squares


def _all_reduce(tensor: Tensor, group: str, kind: str = "SUM") -> None:
    from torch.distributed import ReduceOp, all_reduce, distributed_c10d

    resolve = distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    operation = getattr(ReduceOp, kind)
    all_reduce(tensor, operation, group=resolve(group))  # pyright: ignore[reportArgumentType]
