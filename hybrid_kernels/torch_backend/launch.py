"""The launchers of the torch backend: statistics and gradients, block by block.

Apart from the gradient nothing of size `[N, V]` ever exists. It runs on any device.
"""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from hybrid_kernels.rows import Coefficients, Rows, weighted
from hybrid_kernels.torch_backend.blocks import BLOCK_ELEMENTS, blocks
from hybrid_kernels.torch_backend.topk import Supports

HUGE_PAGE = 2 << 20  # bytes


def row_statistics(rows: Rows, statistics: Tensor) -> None:
    supports = None if rows.support is None else Supports(rows, rows.student.shape[-1])
    for block in blocks(rows, statistics, supports=supports):
        block.measure()
    if supports is not None:
        supports.compare(statistics)


def row_gradient(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    if rows.support is not None:
        # What a support's gradient reads costs as much to refill as the statistics to measure.
        hybrid_rows(rows, torch.empty_like(statistics), coefficients, gradient)
        return
    _prefer_huge_pages(gradient)
    if coefficients.divergence is None:
        rows = rows._replace(teachers=(), shares=())
    coefficients = coefficients.columns(rows)
    for block in blocks(rows, statistics, coefficients, gradient, known=True):
        block.recall()
        block.write_gradient()


def row_values(rows: Rows, statistics: Tensor, values: Tensor) -> None:
    """What these entries add to the divergences of rows whose normalisers `statistics` has.

    Fills `[1 + 2 M, N]`: log q(y), the weighted mean over the M members; and for each of them its
    part of the divergence and of the sum of slopes (of Renyi's: of S - 1, and of log S as a
    log-sum-exp), as they are before `settle`. Masked rows may hold anything.
    """
    for block in blocks(rows, statistics, known=True):
        block.write_values(values)


def hybrid_rows(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    _prefer_huge_pages(gradient)
    coefficients = coefficients.columns(rows)
    if rows.total == 0:
        return
    if rows.support is None:
        for block in blocks(rows, statistics, coefficients, gradient):
            block.measure()
            block.write_gradient()
        return
    # All supports are compared at once: many small tensors for each block would take longer than
    # to read the logits again.
    supports = Supports(rows, rows.student.shape[-1])
    if gradient.dtype == torch.float32 and gradient.data_ptr() != rows.student.data_ptr():
        supports.exponentials = gradient  # which spares the second exp
    for block in blocks(rows, statistics, supports=supports):
        block.measure()
    supports.compare(statistics)
    coefficients = supports.finish(statistics, coefficients)
    for block in blocks(rows, statistics, coefficients, gradient, supports):
        block.write_support_gradient()


def scale_rows(gradient: Tensor, factor: Tensor) -> None:
    if gradient.device.type == "cpu" and bool((factor == 1).all()):
        return
    inner, size = gradient.shape[1:]
    step = max(1, BLOCK_ELEMENTS // size)
    if factor.numel() > 1:
        factor = factor.view(-1, inner, 1)
    for o, plane in enumerate(gradient):
        for start in range(0, inner, step):
            piece = plane[start : start + step]
            own = factor if factor.numel() == 1 else factor[o, start : start + step]
            # The product is taken in fp32 and rounded once, whatever the gradient's dtype.
            piece.copy_(weighted(own, piece.float()))


def _prefer_huge_pages(gradient: Tensor) -> None:
    """Asks Linux to back a large new gradient by huge pages, as NumPy does for its arrays.

    Touching fresh memory in pages of 4 KiB takes a quarter of the whole op otherwise. A hint only:
    where it is not understood, nothing changes.
    """
    size = gradient.numel() * gradient.element_size()
    if sys.platform != "linux" or gradient.device.type != "cpu" or size < HUGE_PAGE:
        return
    start = -(-gradient.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (gradient.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_HUGEPAGE)
    )
