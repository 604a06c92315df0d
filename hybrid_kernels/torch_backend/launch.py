"""The launchers of the torch backend: statistics and gradients, block by block.

Apart from the gradient nothing of size `[N, V]` ever exists. It runs on any device.
"""

import torch
from torch import Tensor

from hybrid_kernels.rows import FIELDS, Coefficients, Rows, weighted
from hybrid_kernels.torch_backend.blocks import blocks
from hybrid_kernels.torch_backend.sweep import Sweep, block_elements
from hybrid_kernels.torch_backend.tokens import Tokens
from hybrid_kernels.torch_backend.topk import Supports


def row_statistics(rows: Rows, statistics: Tensor) -> None:
    supports = None if rows.support is None else Supports(rows, rows.student.shape[-1])
    for block in blocks(Sweep(rows, statistics, supports=supports)):
        block.measure()
    if rows.token_ids is not None:
        Tokens(rows).fill(statistics)
    if supports is not None:
        supports.compare(statistics)


def row_gradient(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    if rows.support is not None:
        # What a support's gradient reads costs as much to refill as the statistics to measure.
        hybrid_rows(rows, torch.empty_like(statistics), coefficients, gradient)
        return
    if coefficients.divergence is None:
        rows = rows._replace(teachers=(), shares=())
    coefficients = coefficients.columns(rows)
    tokens = None if rows.token_ids is None else Tokens(rows)
    sweep = Sweep(rows, statistics, coefficients, gradient, known=True, tokens=tokens)
    for block in blocks(sweep):
        block.recall()
        block.write_gradient()
    sweep.add_tokens()


def row_values(rows: Rows, statistics: Tensor, values: Tensor) -> None:
    """What these entries add to the divergences of rows whose normalisers `statistics` has.

    Fills `[1 + 2 M, N]`: log q(y), the weighted mean over the M members; and for each of them its
    part of the divergence and of the sum of slopes (of Renyi's: of S - 1, and of log S as a
    log-sum-exp), as they are before `settle`. Masked rows may hold anything.
    """
    for block in blocks(Sweep(rows, statistics, known=True)):
        block.write_values(values)
    if rows.token_ids is not None:
        measured = statistics.clone()
        Tokens(rows).fill(measured)
        values[0] = measured[FIELDS.teacher_log_prob]
    else:
        values[0] = 0.0


def hybrid_rows(
    rows: Rows, statistics: Tensor, coefficients: Coefficients, gradient: Tensor
) -> None:
    coefficients = coefficients.columns(rows)
    if rows.total == 0:
        return
    tokens = None if rows.token_ids is None else Tokens(rows)
    if rows.support is None:
        sweep = Sweep(rows, statistics, coefficients, gradient, tokens=tokens)
        for block in blocks(sweep):
            block.measure()
            block.write_gradient()
        if tokens is not None:
            tokens.fill(statistics)
    else:
        # All supports are compared at once: many small tensors for each block would take longer
        # than to read the logits again.
        supports = Supports(rows, rows.student.shape[-1])
        if gradient.dtype == torch.float32 and gradient.data_ptr() != rows.student.data_ptr():
            supports.exponentials = gradient  # which spares the second exp
        for block in blocks(Sweep(rows, statistics, supports=supports)):
            block.measure()
        if tokens is not None:
            tokens.fill(statistics)
        supports.compare(statistics)
        coefficients = supports.finish(statistics, coefficients)
        sweep = Sweep(rows, statistics, coefficients, gradient, supports, tokens=tokens)
        for block in blocks(sweep):
            block.write_support_gradient()
    sweep.add_tokens()


def scale_rows(gradient: Tensor, factor: Tensor) -> None:
    if gradient.device.type == "cpu" and bool((factor == 1).all()):
        return
    inner, size = gradient.shape[1:]
    step = max(1, block_elements() // size)
    if factor.numel() > 1:
        factor = factor.view(-1, inner, 1)
    for o, plane in enumerate(gradient):
        for start in range(0, inner, step):
            piece = plane[start : start + step]
            own = factor if factor.numel() == 1 else factor[o, start : start + step]
            # The product is taken in fp32 and rounded once, whatever the gradient's dtype.
            piece.copy_(weighted(own, piece.float()))
