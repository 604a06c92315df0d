"""The sweeping kernel: one program per row, the vocabulary in tiles, in up to three sweeps.

It measures a row's statistics, writes its gradient, or does both. It reads the logits once for the
statistics (twice if the divergence needs both normalisers first, or is so small that it is summed a
second time) and once for the gradient. This is the form for statistics alone, for gradients whose
coefficients depend on the statistics, and for every problem or row that `resident.py` can't do.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_backend import topk
from hybrid_kernels.triton_backend.divergences import no_slopes
from hybrid_kernels.triton_backend.entries import (
    add_values_and_slopes,
    small_value,
    teacher_log_prob,
    values_and_slopes,
)
from hybrid_kernels.triton_backend.gradient import tile_gradient, weights_of
from hybrid_kernels.triton_backend.memory import (
    clear_edges,
    clear_statistics,
    constants_of,
    is_valid,
    load_edges,
    load_tile,
    locate,
    number_of,
    read_statistics,
    sampled_token,
    store_edges,
    store_tile,
    write_divergence,
)
from hybrid_kernels.triton_backend.reduce import agreed
from hybrid_kernels.triton_backend.row import conclude, finish_gradient
from hybrid_kernels.triton_backend.sums import (
    is_ordinary,
    is_small,
    merge,
    no_sums,
    normalisers,
    sums_of,
    swept_divergences,
)


@triton.jit
def _load(where, start, P: tl.constexpr, GUARDED: tl.constexpr = True):
    return load_tile(where, start, where.body, P, GUARDED)


@triton.jit
def _load_edges(where, P: tl.constexpr):
    return load_edges(where, where.body >= 0, P)


@triton.jit
def _sums(where, constants, P: tl.constexpr, GUARDED: tl.constexpr):
    sums = no_sums(P)
    if P.edges:
        sums = sums_of(_load_edges(where, P), constants, P)
    for start in range(0, P.vocabulary, P.block):
        tile = _load(where, start, P, GUARDED)
        sums = merge(sums, sums_of(tile, constants, P, GUARDED), constants.scale, P)
    return sums


@triton.jit
def _first_sweep(where, constants, P: tl.constexpr):
    sums = _sums(where, constants, P, False)
    if not agreed(is_ordinary(sums, constants, P)):
        sums = _sums(where, constants, P, True)
    return sums


@triton.jit
def _turned(passed, P: tl.constexpr):
    """Where the tiles of a backward sweep start. Every other sweep goes backwards, because the
    tiles read last are still in the L2 cache."""
    LAST: tl.constexpr = (P.vocabulary - 1) // P.block * P.block
    return LAST - passed


@triton.jit
def _second_sweep(
    where, stats, constants, P: tl.constexpr, D: tl.constexpr, SMALL: tl.constexpr = False
):
    """Each member's divergence and sum of slopes, once all normalisers are known."""
    values = ()
    slopes = ()
    for _ in tl.static_range(len(stats)):
        values = values + (tl.full((), 0.0, tl.float32),)
        slopes = slopes + (no_slopes(P),)
    if P.edges:
        values, slopes = values_and_slopes(_load_edges(where, P), stats, constants, P, D, SMALL)
    for passed in range(0, P.vocabulary, P.block):
        start = _turned(passed, P)
        tile = values_and_slopes(_load(where, start, P), stats, constants, P, D, SMALL)
        values, slopes = add_values_and_slopes((values, slopes), tile, P)
    return values, slopes


@triton.jit
def _small_sweep(where, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """A divergence that is too small to be a difference of large sums."""
    value = tl.full((), 0.0, tl.float32)
    if P.edges:
        value = small_value(_load_edges(where, P), stats, constants, P, D)
    for start in range(0, P.vocabulary, P.block):
        value += small_value(_load(where, start, P), stats, constants, P, D)
    return value


@triton.jit
def _gradient_sweep(where, stats, coefficients, constants, P: tl.constexpr, D: tl.constexpr):
    if P.edges:
        edges = _load_edges(where, P)
        store_edges(where, tile_gradient(edges, stats, coefficients, constants, P, D), P)
    for passed in range(0, P.vocabulary, P.block):
        start = _turned(passed, P) if P.one_sweep else passed
        tile = _load(where, start, P)
        gradient = tile_gradient(tile, stats, coefficients, constants, P, D)
        store_tile(where, start, where.body, gradient, P)


@triton.jit
def sweep_kernel(args, P: tl.constexpr, D: tl.constexpr):
    """Measures or reads the statistics of one row, and writes its gradient if there is one."""
    row = tl.program_id(0)
    if args.declined is not None:
        if tl.load(args.declined + row) == 0:
            return
    where = locate(args, row, tl.full((), 0, tl.int32), P)
    if is_valid(args, row):
        constants = constants_of(args, row, P)
        token = sampled_token(args, where, P)
        if P.write and not P.measure:
            # Without a reduction, nothing else keeps the gradient's first store behind these loads.
            tl.debug_barrier()
        if P.measure:
            if args.declined is not None:
                sums = _sums(where, constants, P, True)
            else:
                sums = _first_sweep(where, constants, P)
            stats = normalisers(sums, constants, P)
            divergences = ((), ())
            if P.full > 0:
                if P.one_sweep:
                    divergences = swept_divergences(sums, stats, constants, P)
                else:
                    divergences = _second_sweep(where, stats, constants, P, D)
            value, stats, token = conclude(args, where, token, stats, divergences, constants, P, D)
            if P.small:
                if agreed(is_small(value, constants)):
                    write_divergence(args, row, _small_sweep(where, stats, constants, P, D))
        else:
            stats = read_statistics(args, row, P)
            if P.k > 0:
                token = topk.recall(args, where, token, P)
        if P.write:
            coefficients = weights_of(args, where, token, stats, constants, P)
            _gradient_sweep(where, stats, coefficients, constants, P, D)
            finish_gradient(args, where, token, stats, coefficients, constants, P, D)
    else:
        if P.measure:
            clear_statistics(args, row, P)
        if P.write:
            for start in range(0, P.vocabulary, P.block):
                store_tile(where, start, where.body, tl.full((P.block,), 0.0, tl.float32), P)
            if P.edges:
                clear_edges(where, P)


@triton.jit
def values_kernel(args, P: tl.constexpr, D: tl.constexpr):
    """What part of a row's entries adds to its divergence, given the statistics of the whole row:
    the second sweep alone."""
    row = tl.program_id(0)
    where = locate(args, row, tl.full((), 0, tl.int32), P)
    if is_valid(args, row):
        constants = constants_of(args, row, P)
        stats = read_statistics(args, row, P)
        values, slopes = _second_sweep(where, stats, constants, P, D, P.small)
        log_q = tl.full((), 0.0, tl.float32)
        if args.token_ids is not None:
            log_q = teacher_log_prob(sampled_token(args, where, P).ws, stats, constants, P)
        count = tl.cast(args.count, tl.int64)
        tl.store(args.row_values + row, log_q)
        for i in tl.static_range(len(stats)):
            tl.store(args.row_values + row + (2 * i + 1) * count, values[i])
            tl.store(args.row_values + row + (2 * i + 2) * count, slopes[i])


@triton.jit
def scale_kernel(args, P: tl.constexpr):
    """Multiplies a row by its factor. For 0 and 1 no entry is read, so 0 also clears infinities."""
    row = tl.program_id(0)
    factor = number_of(args.factor, row)
    if factor != 1.0:
        where = locate(args, row, tl.full((), 0, tl.int32), P)
        is_read = factor != 0.0
        limit = tl.where(is_read, where.body, 0)
        for start in range(0, P.vocabulary, P.block):
            z, _ = load_tile(where, start, limit, P, False)
            store_tile(where, start, where.body, z.to(tl.float32) * factor, P)
        if P.edges:
            z, _ = load_edges(where, is_read, P)
            store_edges(where, tl.where(is_read, z.to(tl.float32) * factor, 0.0), P)
