"""The row-resident kernel: statistics and gradient with every logit read once, 3 N V entries.

A row is cut into slices, one for each program of a *group*. A program loads its slice of both sides
once and keeps it in registers as loaded; it publishes the sums of its slice, meets its siblings
(`meeting.py`), merges all sums, and writes its slice of the gradient. Divergences that need both
normalisers first meet twice. Where a row fits into one program, nothing is published.

Of the guards of entries that are no ordinary numbers (`sums.py`) a slice needs none unless its sums
show that it has some. The slice is then read again, tile by tile, with the guards on.

The grid is persistent: groups take rows in turn, and it must be resident as a whole, because
siblings wait for each other (hence the cooperative launch). To hide the meeting, `Plan.prefetch`
starts the loads of a group's next row before the wait.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.entries import (
    add_values_and_slopes,
    small_value,
    values_and_slopes,
)
from hybrid_kernels.triton_backend.gradient import tile_gradient, weights_of
from hybrid_kernels.triton_backend.meeting import (
    group_of,
    meet_sums,
    meet_values,
    publish_sums,
    write_small,
)
from hybrid_kernels.triton_backend.memory import (
    clear_edges,
    clear_statistics,
    constants_of,
    load_edges,
    load_tile,
    locate,
    no_token,
    sampled_token,
    store_edges,
    store_tile,
    write_divergence,
)
from hybrid_kernels.triton_backend.reduce import agreed
from hybrid_kernels.triton_backend.row import conclude, finish_gradient
from hybrid_kernels.triton_backend.sums import (
    is_above_padding,
    is_ordinary,
    is_small,
    merge,
    no_sums,
    normalisers,
    sums_of,
    swept_divergences,
)


class Held(NamedTuple):
    """What a program holds of a row: the tiles of its slice, and a tile with the edges."""

    tiles: tl.tensor
    edges: tl.tensor


@triton.jit
def _start(where, i, P: tl.constexpr):
    """Where in the body a slice's tile begins."""
    return where.part * P.slice + i * P.block


@triton.jit
def _limit(where, body, P: tl.constexpr):
    """Where in the body a slice ends."""
    return tl.minimum((where.part + 1) * P.slice, body)


@triton.jit
def _load(where, is_read, P: tl.constexpr):
    """The tiles of a slice, as stored; nothing is loaded unless it `is_read`."""
    GUARDED: tl.constexpr = not P.one_sweep
    limit = _limit(where, tl.where(is_read, where.body, 0), P)
    tiles = ()
    TILES: tl.constexpr = P.tiles
    for i in tl.static_range(TILES):
        tiles = tiles + (load_tile(where, _start(where, i, P), limit, P, GUARDED),)
    return tiles


@triton.jit
def _store(where, i, gradient, P: tl.constexpr):
    store_tile(where, _start(where, i, P), _limit(where, where.body, P), gradient, P)


@triton.jit
def _guarded_sums(where, constants, P: tl.constexpr):
    """The sums of a slice that is not ordinary. A case so rare must not keep registers: it reads
    the slice again, tile by tile, in a loop that is not unrolled."""
    sums = no_sums(P)
    for i in range(P.tiles):
        tile = load_tile(where, _start(where, i, P), _limit(where, where.body, P), P)
        sums = merge(sums, sums_of((tile,), constants, P), constants.scale, P)
    return sums


@triton.jit
def _write_guarded_gradient(where, stats, weights, constants, P: tl.constexpr, D: tl.constexpr):
    """As `_guarded_sums`, for the gradient."""
    for i in range(P.tiles):
        tile = load_tile(where, _start(where, i, P), _limit(where, where.body, P), P)
        _store(where, i, tile_gradient(tile, stats, weights, constants, P, D), P)


@triton.jit
def _values_and_slopes(group, meetings, held, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """Divergence and sum of slopes of the row for each member, all normalisers known: the second
    meeting."""
    divergences = values_and_slopes(held.tiles, stats, constants, P, D)
    if P.edges:
        if group.part == 0:
            edges = values_and_slopes((held.edges,), stats, constants, P, D)
            divergences = add_values_and_slopes(divergences, edges, P)
    if P.splits > 1:
        divergences = meet_values(group, meetings, divergences[0], divergences[1], P)
    return divergences


@triton.jit
def _write_small_value(args, group, row, held, stats, constants, P: tl.constexpr, D: tl.constexpr):
    """A small divergence, summed a second time, over what the first sum has written."""
    value = small_value(held.tiles, stats, constants, P, D)
    if P.edges:
        if group.part == 0:
            value += small_value((held.edges,), stats, constants, P, D)
    if P.splits > 1:
        write_small(args, group, row, value, P)
    else:
        write_divergence(args, row, value)


@triton.jit
def _is_read(args, row):
    """Whether a row is to be read: it exists and is not masked."""
    is_read = row < args.count
    if args.valid is not None:
        is_read = tl.load(args.valid + row, mask=is_read, other=0).to(tl.int32) != 0
    return is_read


@triton.jit
def resident_kernel(args, P: tl.constexpr, D: tl.constexpr):
    """Statistics and gradient of the rows of a group."""
    # Only the sums of one sweep show that a slice is ordinary.
    GUARDED: tl.constexpr = not P.one_sweep
    group, row = group_of(args, P)
    meetings = tl.full((), 0, tl.int32)
    where = locate(args, row, group.part, P)
    is_read = _is_read(args, row)
    tiles = _load(where, is_read, P)
    while row < args.count:
        # What this program has to say of its slice, before it waits for anything.
        sums = no_sums(P)
        ordinary = group.part < 0
        token = no_token(P)
        edges = tiles[0]  # replaced where there are edges
        if P.edges:
            edges = load_edges(where, is_read & (group.part == 0), P)
        if is_read:
            constants = constants_of(args, row, P)
            token = sampled_token(args, where, P)
            sums = sums_of(tiles, constants, P, GUARDED)
            ordinary = group.part >= 0
            if not GUARDED:
                ordinary = agreed(is_ordinary(sums, constants, P))
                if not ordinary:
                    sums = _guarded_sums(where, constants, P)
            if P.edges:
                if group.part == 0:
                    sums = merge(sums, sums_of((edges,), constants, P), constants.scale, P)
            if P.splits > 1:
                publish_sums(group, meetings, sums, P)

        next_is_read = _is_read(args, row + args.groups)
        next_tiles = tiles
        if P.prefetch:
            next_where = locate(args, row + args.groups, group.part, P)
            next_tiles = _load(next_where, next_is_read, P)

        if is_read:
            constants = constants_of(args, row, P)
            held = Held(tiles, edges)
            if P.splits > 1:
                sums = meet_sums(group, meetings, sums, constants.scale, P)
                meetings += 1
            stats = normalisers(sums, constants, P)
            divergences = ((), ())
            if P.full > 0:
                if P.one_sweep:
                    divergences = swept_divergences(sums, stats, constants, P)
                else:
                    divergences = _values_and_slopes(group, meetings, held, stats, constants, P, D)
                    meetings += 1
            value, stats, token = conclude(args, where, token, stats, divergences, constants, P, D)
            if P.small:
                # (Padding that counts would spoil the sum: the first one stands then.)
                if agreed(is_small(value, constants) & is_above_padding(stats, constants, P)):
                    _write_small_value(args, group, row, held, stats, constants, P, D)
            weights = weights_of(args, where, token, stats, constants, P)
            if ordinary:
                for i in tl.static_range(len(tiles)):
                    gradient = tile_gradient(tiles[i], stats, weights, constants, P, D, GUARDED)
                    _store(where, i, gradient, P)
            else:
                _write_guarded_gradient(where, stats, weights, constants, P, D)
            if P.edges:
                if group.part == 0:
                    gradient = tile_gradient(edges, stats, weights, constants, P, D)
                    store_edges(where, gradient, P)
            finish_gradient(args, where, token, stats, weights, constants, P, D)
        else:
            for i in tl.static_range(len(tiles)):
                _store(where, i, tl.full((P.block,), 0.0, tl.float32), P)
            if group.part == 0:
                clear_statistics(args, row, P)
                if P.edges:
                    clear_edges(where, P)
        row += args.groups
        where = locate(args, row, group.part, P)
        is_read = next_is_read
        tiles = next_tiles
        if not P.prefetch:
            tiles = _load(where, is_read, P)
