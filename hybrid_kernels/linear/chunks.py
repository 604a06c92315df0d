"""From hidden states: chunks of rows, each a GEMM, the row kernels and the GEMMs backwards.

For a chunk of C rows with hidden states h and the weight W, the chunk's logits z = h W^T are
written into a buffer `[C, V]` that all chunks share, the teacher's into another; the row kernels
find the statistics and write dz over z; and with

    dh = dz W        dW += dz^T h

the chunk is done: four GEMMs in all, and no `[N, V]` tensor. With an upstream gradient for each
row, or advantages that depend on the statistics of several chunks, the logits are computed twice,
which makes six.

Logits of 16-bit hidden states are fp32, as they leave the accumulators of the GEMM: rounded to 16
bits first they would cost most digits of the gradient. A chunk's dz is rounded to the weight's
dtype once, as it enters the backward GEMMs; sums over chunks are fp32.

How many rows a chunk has follows from a memory budget, see `chunk_size`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hybrid_kernels import backends, ops
from hybrid_kernels.collectives import all_reduce
from hybrid_kernels.linear.gemm import through_softcap, write_logits
from hybrid_kernels.linear.heads import Head
from hybrid_kernels.linear.rows import LinearRows
from hybrid_kernels.rows import Coefficients, per_row

# Bytes that the buffers of a chunk may always take.
BUDGET = {"cpu": 64 << 20, "gpu": 2 << 30}
# They may also take this part of the two fp32 logits tensors that never exist.
SHARE = 1 / 16


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


class Chunks:
    """The rows of one call, the chunks they are cut into, and the buffers that chunks share."""

    def __init__(
        self,
        problem: LinearRows,
        *,
        gradient: bool,
        room: int = 0,
        logits: Sequence[Tensor] = (),
    ) -> None:
        """
        Args:
            problem: what to compute.
            gradient: whether buffers are for gradients, too.
            room: bytes of memory outside the budget that all buffers of a single chunk may take.
            logits: buffers that hold the logits of all rows, where they are kept from before.
        """
        rows, chunking = problem.rows, problem.chunking
        self.student, self.teachers = problem.student(), problem.members()
        weight = self.student.weights[0]
        self.total, self.vocabulary, self.device = rows.total, weight.shape[0], weight.device
        self.statistics = rows.statistics().zero_()
        self.rows, self.index = rows, None
        if rows.valid is not None and chunking.drop_masked:
            index = rows.valid.nonzero()[:, 0]
            self.index = index if len(index) < self.total else None
            self.rows = rows._replace(valid=None)
        elif rows.valid is not None:
            # Masked rows may hold anything, which a GEMM would spread.
            masked = ~rows.valid[:, None]
            hiddens = [states.masked_fill(masked, 0.0) for states in self.student.hiddens]
            self.student = self.student._replace(hiddens=hiddens)
        self.count = self.total if self.index is None else len(self.index)
        self.width = -(-self.vocabulary // 16) * 16  # rows begin at 16-byte boundaries
        logits_dtype = gradient_dtype = chunking.logits_dtype
        if weight.device.type != "cpu" and weight.element_size() < logits_dtype.itemsize:
            gradient_dtype = weight.dtype  # as the GEMMs want it
        # The student's logits, those of teachers given by hidden states and, where it can't be
        # written over the student's logits, the gradient.
        self.dtypes = [logits_dtype] * (1 + sum(isinstance(t, Head) for t in self.teachers))
        overwrites = gradient_dtype == logits_dtype and not self.student.softcap
        self.separate_gradient = gradient and not overwrites
        if self.separate_gradient:
            self.dtypes.append(gradient_dtype)
        self.kept_logits, self.buffers = logits, []
        self.grad_filter = chunking.grad_filter
        self.size = max(1, min(self._size(chunking.chunk_rows, room), self.count))

    def _size(self, given: int | None, room: int) -> int:
        """Rows of a chunk."""
        if self.kept_logits:
            return self.count
        if given is not None:
            return given
        size = chunk_size(self.count, self._row_bytes, self.vocabulary, self.device)
        size = self.count if self._fits(self.count, room) else size
        if self.rows.group:
            # Parts of the vocabulary need not be equal, and chunks meet in collectives.
            smallest = torch.tensor(size, device=self.device)
            all_reduce(smallest, self.rows.group, "MIN")
            size = int(smallest)
        return size

    @property
    def _row_bytes(self) -> int:
        return self.width * sum(dtype.itemsize for dtype in self.dtypes)

    def _fits(self, rows: int, room: int) -> bool:
        """Whether buffers for some rows, each at a 16-byte boundary, fit into so many bytes."""
        return self._row_bytes * rows + 16 * (len(self.dtypes) + 1) <= room

    def allocate(self, inside: Tensor | None = None) -> int:
        """Makes the buffers.

        Args:
            inside: a tensor whose memory they may lie in, from its end, if there is room.

        Returns:
            how many bytes at the beginning of `inside` the gradient's buffer leaves free, -1 if it
            lies elsewhere.
        """
        shape, free = (self.size, self.width), -1
        if self.kept_logits:
            missing = self.dtypes[len(self.kept_logits) :]
            made = [torch.empty(shape, dtype=d, device=self.device) for d in missing]
            self.buffers = [*self.kept_logits, *made]
        elif inside is None or not self._fits(self.size, inside.nbytes):
            self.buffers = [torch.empty(shape, dtype=d, device=self.device) for d in self.dtypes]
        else:
            memory = inside.view(-1).view(torch.uint8)
            self.buffers, end = [memory] * len(self.dtypes), memory.numel()
            # From the end: first the one that the gradient will be in, which is the last or the
            # student's logits.
            order = list(range(len(self.dtypes)))
            order = order[::-1] if self.separate_gradient else order[:1] + order[:0:-1]
            for i in order:
                size = self.size * self.width * self.dtypes[i].itemsize
                start = (end - size) // 16 * 16
                piece = memory[start : start + size]
                self.buffers[i], end = piece.view(self.dtypes[i]).view(shape), start
            free = self.buffers[order[0]].data_ptr() - memory.data_ptr()
        logits = self.buffers[0][None, :, : self.vocabulary]
        self.launchers = backends.launchers(self.rows._replace(student=logits))
        return free

    def __iter__(self) -> Iterator["Chunk"]:
        if not self.buffers:
            self.allocate()
        for start in range(0, self.count, self.size):
            stop = min(start + self.size, self.count)
            selection = slice(start, stop) if self.index is None else self.index[start:stop]
            yield Chunk(self, selection, stop - start)


class Chunk:
    """Some rows: their logits, in the buffers, and the problem they are for the row kernels.

    Attributes:
        selection: which of all rows.
        logits, gradient: `[C, V]`, the student's logits and the place of their gradient.
        rows: the problem.
    """

    def __init__(self, chunks: Chunks, selection: slice | Tensor, count: int) -> None:
        self.chunks, self.selection = chunks, selection
        buffers = [buffer[:count, : chunks.vocabulary] for buffer in chunks.buffers]
        self.logits = buffers[0]
        self.gradient = buffers[-1] if chunks.separate_gradient else self.logits
        filled, teachers = iter(buffers), []
        for side in (chunks.student, *chunks.teachers):
            if isinstance(side, Head):
                logits = next(filled)
                if not chunks.kept_logits:
                    write_logits(side, selection, logits)
                teachers.append(logits[None])
            elif side.ndim == 3:
                teachers.append(_logit_rows(side, selection))
            else:
                teachers.append(side[selection].contiguous())
        student, *teachers = teachers
        rows = chunks.rows
        self.rows = rows._replace(
            student=student,
            teachers=tuple(teachers),
            support=self._select(rows.support),
            token_log_prob=self._select(rows.token_log_prob),
            token_ids=self._select(rows.token_ids),
            valid=self._select(rows.valid),
            row_temperature=self._select(rows.row_temperature),
        )
        ops.check_values(self.rows)

    def _select(self, values: Tensor | None) -> Tensor | None:
        """The part of these rows of `[N, ...]` or `[R]`; one element stays one for all."""
        if values is None or values.numel() == 1:
            return values
        values = per_row(values, self.chunks.total) if values.ndim == 1 else values
        return values[self.selection].contiguous()

    def measure(self) -> None:
        """Fills the statistics of these rows."""
        statistics = self.rows.statistics()
        self.chunks.launchers.row_statistics(self.rows, statistics)
        self.chunks.statistics[:, self.selection] = statistics

    def differentiate(self, coefficients: Coefficients, statistics: Tensor | None) -> Tensor:
        """dz `[C, V]`, without the factor of the logit scale.

        Args:
            coefficients: of all rows.
            statistics: of all rows; None to have these rows measured.
        """
        launchers, target = self.chunks.launchers, self.gradient[None]
        selected = Coefficients(*(self._select(c) for c in coefficients))
        if statistics is None:
            measured = self.rows.statistics()
            launchers.hybrid_rows(self.rows, measured, selected, target)
            self.chunks.statistics[:, self.selection] = measured
        else:
            measured = statistics[:, self.selection].contiguous()
            launchers.row_gradient(self.rows, measured, selected, target)
        through_softcap(self.chunks.student, self.logits, self.gradient)
        return self.gradient


def _logit_rows(logits: Tensor, selection: slice | Tensor) -> Tensor:
    """Rows of `[O, I, V]` as `[1, C, V]`: a view where one row stride is enough, else a copy."""
    outer, inner, _ = logits.shape
    if outer == 1:
        return logits[:, selection]
    if isinstance(selection, slice):
        selection = torch.arange(selection.start, selection.stop, device=logits.device)
    return logits[selection // inner, selection % inner][None]
