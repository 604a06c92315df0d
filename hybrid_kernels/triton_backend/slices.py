"""The slices of rows that a program of the row-resident form keeps in registers: which they are,
how they are loaded and stored, and how masked rows are skipped.

The slices of all rows are dealt to the programs in turn, so that every program has work, however
many share a row. The program with the last slice of a row is its *lead*. A slice consists of tiles
of words (`packed.py`); the lead's slice also has the row's edges (`memory.py`), in a separate tile
with one entry for each thread.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hybrid_kernels.triton_backend.memory import (
    body_of,
    clear_statistics,
    edge_lanes,
    locate,
)
from hybrid_kernels.triton_backend.packed import (
    packed,
    pad_of,
    per_word,
    unpacked,
    word_of,
    words_at,
)
from hybrid_kernels.triton_backend.plan import WARP
from hybrid_kernels.triton_backend.reduce import INTERPRETED

_WARP = tl.constexpr(WARP)


class Turn(NamedTuple):
    """A slice of a program: its row, and its index in the row."""

    row: tl.tensor
    part: tl.tensor


class Slice(NamedTuple):
    """What a program holds of a row: tiles of words and, for the lead, the edges."""

    zs: tl.tensor
    ws: tl.tensor
    z_edge: tl.tensor
    w_edge: tl.tensor


@triton.jit
def first_turn(P: tl.constexpr):
    """A program's first slice."""
    return Turn(tl.program_id(0) // P.splits, tl.program_id(0) % P.splits)


@triton.jit
def _next(turn, P: tl.constexpr):
    """A program's next slice."""
    row = turn.row + tl.num_programs(0) // P.splits
    part = turn.part + tl.num_programs(0) % P.splits
    is_over = part >= P.splits
    return Turn(row + is_over.to(tl.int32), tl.where(is_over, part - P.splits, part))


@triton.jit
def places(i, P: tl.constexpr):
    """The places of a tile's words in its slice."""
    warp = tl.arange(0, P.warps)[:, None]
    return (i * P.warps + warp) * P.width + tl.arange(0, P.width)[None, :]


@triton.jit
def edge_places(P: tl.constexpr):
    """Edge lanes, one for each thread: other shapes Triton would move between threads."""
    return tl.arange(0, P.warps * _WARP)


@triton.jit
def limit_of(where, PER_WORD: tl.constexpr, P: tl.constexpr):
    """How many words a slice has."""
    words = tl.minimum(where.body - where.part * P.slice, P.slice) // PER_WORD
    # The compiler can't see this by itself.
    return tl.multiple_of(words, 8 // PER_WORD)


@triton.jit
def is_lead_of(turn, P: tl.constexpr):
    """Whether a program does what is done once per row. It has the last slice, the shortest.
    `turn` may also be a `Place`."""
    return turn.part == P.splits - 1


@triton.jit
def _load_side(row_ptr, where, is_read, is_lead, P: tl.constexpr):
    TYPE: tl.constexpr = row_ptr.dtype.element_ty
    PAD: tl.constexpr = word_of(P.pad, TYPE)
    PER_WORD: tl.constexpr = per_word(TYPE)
    ptr = words_at(body_of(row_ptr, where.head, P) + where.part * P.slice)
    limit = tl.where(is_read, limit_of(where, PER_WORD, P), 0)
    words = ()
    TILES: tl.constexpr = P.tiles
    for i in tl.static_range(TILES):
        within = places(i, P)
        if (i + 1) * P.warps * P.width * PER_WORD <= P.least:
            # Every slice fills this tile, and a mask would cost instructions.
            tile = tl.load(ptr + within)
        else:
            tile = tl.load(ptr + within, mask=within < limit, other=PAD)
        words = words + (tile,)
    edge = words[0]
    if P.edges:
        offsets, inside = edge_lanes(where, edge_places(P), P)
        inside = inside & (offsets < tl.where(is_read & is_lead, P.vocabulary, 0))
        NUMBER: tl.constexpr = pad_of(P.pad, TYPE)
        edge = tl.load(row_ptr + offsets, mask=inside, other=NUMBER)
    return words, edge


@triton.constexpr_function
def piece_of(P):
    """How many words `load_again` reads: one for each thread, more in the interpreter, which pays
    per step."""
    return P.warps * (P.width if INTERPRETED.value else WARP)


@triton.jit
def load_again(row_ptr, where, i, P: tl.constexpr):
    """The entries of a piece of a slice."""
    TYPE: tl.constexpr = row_ptr.dtype.element_ty
    PAD: tl.constexpr = word_of(P.pad, TYPE)
    ptr = words_at(body_of(row_ptr, where.head, P) + where.part * P.slice)
    SIZE: tl.constexpr = piece_of(P)
    within = i * SIZE + tl.arange(0, SIZE)
    inside = within < limit_of(where, per_word(TYPE), P)
    return unpacked(tl.load(ptr + within, mask=inside, other=PAD), TYPE)


@triton.jit
def load_slice(args, turn, P: tl.constexpr):
    """The slice; padding if there is no such row."""
    # Beyond the last row any row will do, as the result is not used.
    is_read = turn.row < args.count
    where = locate(args, tl.where(is_read, turn.row, 0), turn.part, P)
    is_lead = is_lead_of(turn, P)
    zs, z_edge = _load_side(where.student, where, is_read, is_lead, P)
    ws = zs
    w_edge = z_edge
    if P.full > 0:
        ws, w_edge = _load_side(where.teachers[0], where, is_read, is_lead, P)
    return Slice(zs, ws, z_edge, w_edge)


@triton.jit
def edges_of(held):
    """The edges of both sides in fp32. Call it late: it waits for their loads."""
    return held.z_edge.to(tl.float32), held.w_edge.to(tl.float32)


@triton.jit
def store_words(ptr, i, limit, entries, P: tl.constexpr):
    """Stores a tile of the gradient: one or two entries for each word of the student's logits."""
    TYPE: tl.constexpr = ptr.dtype.element_ty
    within = places(i, P)
    if len(entries) == per_word(TYPE):
        tl.store(words_at(ptr) + within, packed(entries, TYPE), mask=within < limit)
    else:
        ptr = tl.multiple_of(ptr, 16)
        tl.store(ptr + within, entries[0].to(TYPE), mask=within < limit)


@triton.jit
def _clear(args, turn, P: tl.constexpr):
    """Zeros a slice of a masked row's gradient and, as the lead, its statistics and edges."""
    where = locate(args, turn.row, turn.part, P)
    TYPE: tl.constexpr = where.gradient.dtype.element_ty
    zero = tl.full((P.warps, P.width), 0.0, tl.float32)
    entries = (zero,)
    PER_WORD: tl.constexpr = per_word(where.student.dtype.element_ty)
    if PER_WORD == 2:
        entries = (zero, zero)
    ptr = body_of(where.gradient, where.head, P) + where.part * P.slice
    limit = limit_of(where, PER_WORD, P)
    TILES: tl.constexpr = P.tiles
    for i in tl.static_range(TILES):
        store_words(ptr, i, limit, entries, P)
    if is_lead_of(turn, P):
        clear_statistics(args, turn.row, P)
        tl.store(args.declined + turn.row, 0)
        if P.edges:
            offsets, inside = edge_lanes(where, edge_places(P), P)
            zeros = tl.full((P.warps * _WARP,), 0.0, tl.float32)
            tl.store(where.gradient + offsets, zeros.to(TYPE), mask=inside)


@triton.jit
def following(args, turn, P: tl.constexpr):
    """A program's next slice, and the result of `counts_of` for it."""
    turn = _next(turn, P)
    return turn, counts_of(args, turn)


@triton.jit
def counts_of(args, turn):
    """1 for rows that are not masked and rows beyond the last one, otherwise 0."""
    if args.valid is not None:
        return tl.load(args.valid + turn.row, mask=turn.row < args.count, other=1).to(tl.int32)
    else:
        return 1


@triton.jit
def counting(args, turn, counts, P: tl.constexpr):
    """A program's first slice from `turn` on whose row is not masked; clears those before it.
    `counts` is the result of `counts_of` for `turn`."""
    if args.valid is not None:
        while counts == 0:
            _clear(args, turn, P)
            turn = _next(turn, P)
            counts = counts_of(args, turn)
    return turn
