"""The gradients of hidden states, weights and bias, from the logit gradients of all chunks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_kernels.collectives import all_reduce
from hybrid_kernels.linear import gemm
from hybrid_kernels.linear.chunks import Chunk, Chunks

# Entries of dz that are summed up at once on the CPU.
BLOCK_ELEMENTS = 160 * 1024


class Gradients:
    """The gradients of the student's tensors, summed over chunks.

    Attributes:
        hiddens, weights, bias: a tensor where one is wanted, else None.
        dropped, total: squares of the L2 norms of what the filter drops, and of everything.
    """

    def __init__(self, chunks: Chunks, wanted: Sequence[bool], unit: Tensor) -> None:
        """
        Args:
            chunks: the rows.
            wanted: for each tensor of `LinearRows.differentiable`, whether to compute its gradient.
            unit: scalar; columns whose mean |dz| is at most `grad_filter` times this are dropped.
        """
        student, self.several = chunks.student, chunks.count > chunks.size
        pairs = len(student.weights)
        self.chunks, self.bias = chunks, None
        self.bound = unit * chunks.grad_filter if chunks.grad_filter else None
        self.hiddens: list[Tensor | None] = [None] * pairs
        self.weights: list[Tensor | None] = [None] * pairs
        for i, (hidden, weight) in enumerate(zip(student.hiddens, student.weights, strict=True)):
            if wanted[i]:
                # Ranks that share the vocabulary add theirs up, in fp32.
                dtype = torch.float32 if chunks.rows.group else hidden.dtype
                self.hiddens[i] = torch.zeros_like(hidden, dtype=dtype)
            if wanted[pairs + i]:
                dtype = torch.float32 if self.several else weight.dtype
                self.weights[i] = torch.empty(weight.shape, dtype=dtype, device=chunks.device)
        if wanted[2 * pairs]:
            self.bias = torch.zeros(chunks.vocabulary, dtype=torch.float32, device=chunks.device)
        # With one chunk the weight's gradient is free memory until the last GEMM.
        shared = self.weights[0] if chunks.count and not self.several else None
        self.free = chunks.allocate(shared)
        self.is_first = True
        self.dropped = torch.zeros((), dtype=torch.float32, device=chunks.device)
        self.total = torch.zeros_like(self.dropped)

    def add(self, chunk: Chunk, gradient: Tensor) -> None:
        """The GEMMs of a chunk: dh = scale dz W, dW += scale dz^T h, db += scale sum dz."""
        columns = None if self.bound is None else self._columns(gradient, self.bound)
        if self.bias is not None:
            scale = self.chunks.student.logit_scale
            self.bias.add_(gradient.sum(0, dtype=torch.float32), alpha=scale)
        if columns is not None:
            gradient = gradient.index_select(1, columns)
        for i, target in enumerate(self.hiddens):
            if target is not None:
                self._add_hidden(target, i, chunk, gradient, columns)
        # The first weight last: its gradient may lie where this one does.
        for i, target in reversed(list(enumerate(self.weights))):
            if target is not None:
                self._add_weight(target, i, chunk, gradient, columns)
        self.is_first = False

    def _add_hidden(
        self, target: Tensor, i: int, chunk: Chunk, gradient: Tensor, columns: Tensor | None
    ) -> None:
        weight, scale = self.chunks.student.weights[i], self.chunks.student.logit_scale
        weight = weight if columns is None else weight.index_select(0, columns)
        parts, in_place = gemm.blocks(weight), isinstance(chunk.selection, slice)
        shape = (len(gradient), target.shape[1])
        result = target[chunk.selection] if in_place else target.new_empty(shape)
        if len(parts) > 1 and result.dtype != torch.float32:
            result, in_place = torch.empty_like(result, dtype=torch.float32), False
        for n, part in enumerate(parts):
            gemm.multiply(result, gradient[:, part], weight[part], scale, accumulate=n > 0)
        if not parts:
            result.zero_()
        if not in_place:
            target[chunk.selection] = result.to(target.dtype)

    def _add_weight(
        self, target: Tensor, i: int, chunk: Chunk, gradient: Tensor, columns: Tensor | None
    ) -> None:
        student = self.chunks.student
        hidden, scale = student.hiddens[i][chunk.selection], student.logit_scale
        if columns is not None:
            if self.is_first:
                target.zero_()
            rows = target.new_empty((len(columns), target.shape[1]))
            gemm.multiply(rows, gradient.t(), hidden, scale, accumulate=False)
            target.index_add_(0, columns, rows)
        elif i == 0 and self.free >= 0:
            # dz lies at the end of the same memory: the rows up to there first, the rest from a
            # copy of its columns.
            safe = self.free // (target.shape[1] * target.element_size())
            self._add_rows(target[:safe], gradient[:, :safe], hidden)
            self._add_rows(target[safe:], gradient[:, safe:].clone(), hidden)
        else:
            self._add_rows(target, gradient, hidden)

    def _add_rows(self, target: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """Adds scale dz^T h to some rows of dW."""
        scale, accumulate = self.chunks.student.logit_scale, not self.is_first
        for part in gemm.blocks(target):
            gemm.multiply(target[part], gradient[:, part].t(), hidden, scale, accumulate)

    def _columns(self, gradient: Tensor, bound: Tensor) -> Tensor | None:
        """The columns of a chunk's dz that the filter leaves; None for all."""
        sums, squares = _column_sums(gradient)
        stays = ~(sums <= bound * len(gradient))  # a NaN stays, too
        self.total += squares.sum()
        self.dropped += torch.where(stays, 0.0, squares).sum()
        columns = stays.nonzero()[:, 0]
        return None if len(columns) == len(stays) else columns

    def finish(self) -> tuple[Tensor, list[Tensor]]:
        """The share of the norm that was dropped, and the gradients that are wanted, each in the
        dtype of its tensor."""
        student, group = self.chunks.student, self.chunks.rows.group
        results = []
        for i, (gradient, hidden) in enumerate(zip(self.hiddens, student.hiddens, strict=True)):
            if gradient is not None:
                if group:
                    all_reduce(gradient, group)
                gradient = gradient.to(hidden.dtype)
                results.append(gradient if i else gradient[None])  # the student's are [1, N, D]
        for gradient, weight in zip(self.weights, student.weights, strict=True):
            if gradient is not None:
                if self.chunks.count == 0:
                    gradient.zero_()
                results.append(gradient.to(weight.dtype))
        if self.bias is not None and student.bias is not None:
            results.append(self.bias.to(student.bias.dtype))
        norms = torch.stack([self.dropped, self.total])
        if group and self.bound is not None:
            all_reduce(norms, group)
        share = torch.where(norms[1] > 0, norms[0] / norms[1], 0.0).sqrt()
        return share, results


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
