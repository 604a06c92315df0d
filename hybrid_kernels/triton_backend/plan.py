"""What is decided before a kernel runs: its static parameters, and how its work is cut.

A kernel receives everything static in one `Plan`. All tuning is here, too. A *form* is a way to run
the row kernels:

- "row-resident" (`resident.py`): statistics and gradient in one launch, 3 N V entries moved;
- "sweeping" (`sweep.py`): tile by tile, for statistics alone, for a gradient from known statistics
  (callable `advantages`, the backward of `token_terms`), and for what the first form can't do.

`python -m hybrid_kernels tune` measures once what a GPU runs fastest, and writes a small file.
Nothing is timed at import or in a user's call.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton import knobs

# Whether kernels run on the CPU, one program after another. Triton decides this at import.
INTERPRETED = bool(knobs.runtime.interpret)

WARP = 32

# The sweeping form: how many entries a program holds in registers at once, and how many a thread.
# tests/test_ahead_of_time.py forbids spills.
MAX_BLOCK_V = 4096
MAX_BLOCK_V_TWO_SWEEPS = 2048
PER_THREAD = 16
PER_THREAD_TWO_SWEEPS = 8

# Left to itself, ptxas spills a few scalars to fit a third program of 80 registers on an SM.
MAX_REGISTERS = 128

# The interpreter pays per operation, not per entry, and runs one program after another, so there a
# program processes whole rows. Tests that run programs side by side cut rows into slices.
INTERPRETED_BLOCK_V = 65536
INTERPRETED_SLICE = 2**31
INTERPRETED_WARPS = 1
INTERPRETED_PROGRAMS = 2
INTERPRETED_LAG = True

# An ordinary number (`sums.py`), below all others in nearly all rows.
PAD = -(2.0**90)

# Slices are cut at multiples of this many entries, so that they move in 128-bit pieces.
SLICE_MULTIPLE = 8
# Words of 32 bits that a warp of the row-resident form loads at once: 16 bytes a thread. Triton
# gives each warp a row of a tile this wide; other widths it moves through shared memory.
WIDTH = 4 * WARP
# The latency of a slice, in tiles; see `_cut`.
LATENCY = 5
# The most programs a multiprocessor may hold at once.
MAX_PROGRAMS = 16


class Plan(NamedTuple):
    """Everything static in a kernel except its divergence's function (`divergences.py`).

    It is one constexpr parameter. Values that follow from other fields are fields, too, because a
    kernel can use neither methods nor properties of a NamedTuple.

    Attributes:
        vocabulary: V.
        edges: whether rows are split at 16-byte boundaries (`memory.py`).
        pad: the value of unguarded lanes outside a row (`sums.py`).
        members: how many teachers there are.
        full: how many teachers are known by their logits; all or none.
        sums: how many `Sums` a sweep computes.
        k: the number of ids of a top-K support; 0 without one.
        block_k: the next power of 2 of k.
        tail: what stands for the vocabulary outside a support: "bucket", "renormalize" or "mask".
        corrects: whether tokens sampled outside a support correct its gradient.
        floor: whether there is a teacher floor.
        row_temperature: whether temperatures differ by row.
        one_sweep: whether one sweep finds all statistics: for one-sweep divergences without a
            floor, and without full teachers.
        small: whether a small divergence is summed a second time; only with full teachers.
        kl_family: whether the divergence is a one-sweep one, whose function has SMALL terms.
        student_d, teacher_d: which sums a sweep over full teachers needs for the divergence.
        has_v, tilted: properties of the divergence, see `hybrid_kernels/divergences.py`.
        pulls: how many full teachers the gradient has a coefficient for; all or none.
        log_prob, entropy: whether the gradient has these coefficients.
        measure: whether statistics are measured; otherwise they are read.
        write: whether a gradient is written.
        block: entries of a tile of the sweeping form.
        warps: warps of a program of the row-resident form.
        width: words of a tile that a warp holds (`packed.py`).
        tiles: how many tiles a program holds.
        slice: the most entries of a row that a program has.
        least, most: the fewest entries of a slice, and the most of all slices together.
        splits: how many programs share a row.
        lanes: the next power of 2 of splits.
        meetings: how often these programs meet.
        lag: whether a program publishes the sums of its next slice before it waits for the row of
            this one.
        exact: whether sums use differences of the logits themselves, because rounding would destroy
            those of close models in fp32.
        fine: whether the gradient uses such differences.
    """

    vocabulary: int
    edges: bool = False
    pad: float = 0.0
    members: int = 0
    full: int = 0
    sums: int = 1
    k: int = 0
    block_k: int = 1
    tail: str = ""
    corrects: bool = False
    floor: bool = False
    row_temperature: bool = False
    one_sweep: bool = True
    small: bool = False
    kl_family: bool = False
    student_d: bool = False
    teacher_d: bool = False
    has_v: bool = False
    tilted: bool = False
    pulls: int = 0
    log_prob: bool = False
    entropy: bool = False
    measure: bool = False
    write: bool = False
    block: int = 1
    warps: int = 1
    width: int = 1
    tiles: int = 1
    slice: int = 1
    least: int = 0
    most: int = 2**31 - 1
    splits: int = 1
    lanes: int = 1
    meetings: int = 1
    lag: bool = False
    exact: bool = False
    fine: bool = False


class Device(NamedTuple):
    """What a launch needs to know about a GPU."""

    name: str
    multiprocessors: int
    registers: int = 65536  # of one multiprocessor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Device":
        return _device(tensor.device.index) if tensor.is_cuda else cls("interpreter", 1)


@functools.cache
def _device(index: int | None) -> Device:
    properties = torch.cuda.get_device_properties(index)
    registers = getattr(properties, "regs_per_multiprocessor", 65536)
    return Device(properties.name, properties.multi_processor_count, registers)


class Tuning(NamedTuple):
    """The free choices of the row-resident form.

    Attributes:
        tiles: the most tiles of a row that a program holds.
        num_warps: warps of a program; short rows need fewer.
        programs: how many programs a multiprocessor holds at once.
        lag: whether a program publishes the sums of its next slice before it waits for the row of
            this one.
    """

    tiles: int
    num_warps: int
    programs: int
    lag: bool


# For logits of 2 and 4 bytes: what an H100 ran fastest with a prototype of this form
# (bench/results).
DEFAULT_TUNING = {2: Tuning(8, 4, 2, True), 4: Tuning(8, 4, 2, True)}

# What `python -m hybrid_kernels tune` tries.
CANDIDATES = [
    Tuning(8, 4, 2, True),
    Tuning(7, 4, 2, True),
    Tuning(8, 4, 2, False),
    Tuning(12, 4, 2, False),
    Tuning(5, 4, 3, True),
    Tuning(4, 4, 3, True),
    Tuning(8, 8, 1, True),
]


class Sweep(NamedTuple):
    """Compile-time constants of the sweeping form: one program per row."""

    block_v: int
    num_warps: int

    def options(self, hip: bool = torch.version.hip is not None) -> dict[str, int | bool]:
        """Compiler options."""
        return _options(self.num_warps, MAX_REGISTERS, hip)

    def describe(self) -> str:
        return f"sweeping, one program a row, tiles of {self.block_v:,}"


class Resident(NamedTuple):
    """Compile-time constants and grid of the row-resident form.

    `splits` programs share a row in slices of `slice_v` entries, and each holds its slice as
    `tiles` tiles of `num_warps * width` words. There are `programs` in all.
    """

    tiles: int
    width: int
    slice_v: int
    splits: int
    programs: int
    num_warps: int
    registers: int
    meetings: int
    lag: bool

    @property
    def in_flight(self) -> float:
        """How many rows are processed at once."""
        return self.programs / self.splits

    def room(self, itemsize: int) -> int:
        """How many entries of a row fit into a program."""
        return self.tiles * self.num_warps * self.width * max(1, 4 // itemsize)

    def options(self, hip: bool = torch.version.hip is not None) -> dict[str, int | bool]:
        """Compiler options; programs that wait for each other must all be resident."""
        options = _options(self.num_warps, self.registers, hip)
        return {**options, "launch_cooperative_grid": True} if self.splits > 1 else options

    def describe(self) -> str:
        return (
            f"row-resident, {self.splits} program(s) a row, slices of {self.slice_v:,}, "
            f"{self.in_flight:.3g} rows in flight"
        )


def _options(num_warps: int, registers: int, hip: bool) -> dict[str, int | bool]:
    # Always contract to fused multiply-add, regardless of Triton's default.
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    return options if hip else {**options, "maxnreg": registers}


def sweep(vocabulary: int, one_sweep: bool = True) -> Sweep:
    """One program per row, sweeping tiles of `block_v` entries."""
    largest = MAX_BLOCK_V if one_sweep else MAX_BLOCK_V_TWO_SWEEPS
    per_thread = PER_THREAD if one_sweep else PER_THREAD_TWO_SWEEPS
    if INTERPRETED:
        largest = INTERPRETED_BLOCK_V
    block_v = min(triton.next_power_of_2(vocabulary), largest)
    num_warps = min(8, max(1, block_v // (per_thread * WARP)))
    return Sweep(block_v, num_warps)


def resident(
    vocabulary: int,
    itemsize: int,
    rows: int,
    device: Device,
    tuning: Tuning | None = None,
    meetings: int = 1,
    narrow: bool = False,
    edges: bool = False,
) -> Resident | None:
    """How many programs share a row, and how many there are; None if a row needs more than the
    device holds at once.

    Args:
        vocabulary: V.
        itemsize: bytes of a logit.
        rows: N.
        device: where it will run.
        tuning: the form's choices; by default from the tuning file, else `DEFAULT_TUNING`.
        meetings: how often the programs of a row meet. With two meetings nothing lags.
        narrow: whether the gradient has fewer bytes than the logits.
        edges: whether rows are split at 16-byte boundaries. The remainder of a row after full
            slices then belongs to the edges, if it fits.
    """
    per_word = max(1, 4 // itemsize)
    if INTERPRETED:
        return _interpreted(vocabulary, per_word, rows, meetings, edges)
    tuning = tuning or tuned(device.name, itemsize) or DEFAULT_TUNING[itemsize]
    num_warps, width, tiles = tuning.num_warps, WIDTH, tuning.tiles
    if meetings == 2:
        # Two numbers are kept for each entry.
        tiles = max(1, tiles * 7 // 8)
    if narrow:
        # Then a thread stores 16 bytes, too.
        width, tiles = 2 * width, max(1, tiles // 2)
    # Short rows get smaller programs, and more of them.
    while num_warps > 1 and vocabulary <= num_warps * width * per_word // 2:
        num_warps //= 2
    on_each = min(MAX_PROGRAMS, tuning.programs * tuning.num_warps // num_warps)
    capacity = device.multiprocessors * on_each
    tile = num_warps * width * per_word
    tiles, splits = _cut(vocabulary - _room(num_warps, edges), tile, tiles)
    slice_v = min(_slice(vocabulary, splits), tiles * tile)
    registers = min(255, device.registers // (on_each * num_warps * WARP) // 8 * 8)
    if capacity < splits:
        return None
    lag = tuning.lag and splits > 1 and meetings == 1
    programs = min(capacity, rows * splits)
    return Resident(tiles, width, slice_v, splits, programs, num_warps, registers, meetings, lag)


def _interpreted(vocabulary: int, per_word: int, rows: int, meetings: int, edges: bool) -> Resident:
    warps, longest = INTERPRETED_WARPS, INTERPRETED_SLICE
    splits = max(1, -(-(vocabulary - _room(warps, edges)) // longest))
    slice_v = min(_slice(vocabulary, splits), longest)
    words = -(-slice_v // (per_word * warps))
    width = min(triton.next_power_of_2(words), INTERPRETED_BLOCK_V)
    lag = INTERPRETED_LAG and splits > 1 and meetings == 1
    programs = min(max(splits, INTERPRETED_PROGRAMS), rows * splits)
    return Resident(-(-words // width), width, slice_v, splits, programs, warps, 0, meetings, lag)


def _room(num_warps: int, edges: bool) -> int:
    """How many entries of a row fit into the edges, one for each thread."""
    return num_warps * WARP - 2 * SLICE_MULTIPLE if edges else 0


def _cut(vocabulary: int, tile: int, most: int) -> tuple[int, int]:
    """How many tiles a slice has, at most `most`, and how many slices there are.

    A slice takes about as long as `LATENCY` tiles and its own. Lanes without an entry cost
    instructions, but no bytes.
    """

    def splits(tiles: int) -> int:
        return -(-vocabulary // (tiles * tile))

    def rate(tiles: int) -> float:
        fill = vocabulary / (splits(tiles) * tiles * tile)
        return math.sqrt(fill) / splits(tiles) / (LATENCY + tiles)

    if vocabulary <= most * tile:
        return max(1, -(-vocabulary // tile)), 1
    tiles = max(range(most, most // 2, -1), key=rate)
    return tiles, splits(tiles)


def _slice(vocabulary: int, splits: int) -> int:
    """The length of equal slices."""
    return _round_up(-(-vocabulary // splits), SLICE_MULTIPLE)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# -- the tuning file ------------------------------------------------------------------------------


def tuning_file() -> Path:
    """`$HYBRID_KERNELS_TUNING`, else `hybrid_kernels/tuning.json` in the user's cache folder."""
    if path := os.environ.get("HYBRID_KERNELS_TUNING"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hybrid_kernels" / "tuning.json"


@functools.cache
def tuned(device_name: str, itemsize: int) -> Tuning | None:
    """The tuning file's entry for a device, or None.

    Raises:
        ValueError: the file exists, but is not a valid tuning file.
    """
    path = tuning_file()
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text()).get(device_name, {}).get(str(itemsize))
        return None if entry is None else Tuning(**entry)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"tuning file {path}: {error}; delete it, or write it again with "
            "python -m hybrid_kernels tune"
        ) from error


def write_tuning(device_name: str, itemsize: int, tuning: Tuning) -> Path:
    """Adds a device's best choices to the tuning file."""
    path = tuning_file()
    content = json.loads(path.read_text()) if path.is_file() else {}
    content.setdefault(device_name, {})[str(itemsize)] = tuning._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    tuned.cache_clear()
    return path
