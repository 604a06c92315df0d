"""What a compiled kernel does, read from its machine code: registers, costs, order of instructions.

ptxas assembles; `cuobjdump` lists the result. In a row-resident kernel the loop over rows is read,
along the cheapest path that stores every entry. Rows take it that are not masked, hold finite
numbers and have no small divergence.

The order decides whether a prefetch is one: the program waits for its values where an instruction
first touches them, and if that is before a meeting, it meets late. No test on a CPU can see this.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NamedTuple

from triton import knobs

from bench.aot.compile import Compiled

JUMPS = ("BRA", "EXIT", "RET", "BPT")
WIDE_LOAD = "LDG.E.128"
WIDE_STORE = "STG.E.128"
BARRIER = "BAR.SYNC"


class Resources(NamedTuple):
    """Registers of a thread, and bytes of stack, local and shared memory."""

    registers: int
    stack: int
    local: int
    shared: int

    @property
    def spilled(self) -> int:
        return self.stack + self.local


class Instruction(NamedTuple):
    """One line of machine code; `target` is the address that a branch goes to."""

    address: int
    name: str
    operands: str
    target: int | None
    predicated: bool

    @property
    def ends(self) -> bool:
        """Whether control never passes to the next instruction in memory."""
        return not self.predicated and self.name.split(".")[0] in JUMPS and not self.diverges

    @property
    def diverges(self) -> bool:
        """Whether it is a branch for warps whose threads have diverged."""
        return self.name == "BRA.DIV"

    @property
    def goes_back(self) -> bool:
        return self.target is not None and self.target < self.address

    @property
    def loads_past_l1(self) -> bool:
        """Whether it loads what programs on other multiprocessors publish."""
        return re.match(r"LDG?\..*\bSTRONG\.(GPU|SYS)", self.name) is not None

    def registers(self) -> set[int]:
        """The registers that it reads or writes, unless it computes in double precision."""
        parts = [p for p in self.operands.split(",") if not re.match(r"\s*!?U?P[T\d]", p)]
        touched: set[int] = set()
        for position, part in enumerate(parts):
            outer = position in (0, len(parts) - 1)
            touched.update(_registers(part, _width(self.name, outer)))
        return touched

    def loaded(self) -> set[int]:
        """The registers that it writes, if it is a load."""
        return set(_registers(self.operands.split(",")[0], _width(self.name, True)))


class Cost(NamedTuple):
    """What one entry of the vocabulary costs on the cheapest path through a row.

    Attributes:
        loaded: bytes in accesses of 128 bits, except from what siblings publish.
        stored: bytes in accesses of 128 bits.
        narrow: narrower loads and stores of a thread, per row.
        exponentials: of the special function unit, without logarithms and reciprocals.
        special: all instructions of that unit.
        converted: conversions of single numbers, which take as long as those; pairs do not count.
        instructions: all.
        barriers: of a program per row, if no other program has to be waited for.
    """

    loaded: float
    stored: float
    narrow: int
    exponentials: float
    special: float
    converted: float
    instructions: float
    barriers: int


class Order(NamedTuple):
    """The order of a row's instructions, on the path of the thread that publishes.

    Attributes:
        ahead: wide loads of a later row that begin before a meeting.
        early: instructions that touch the loaded values before that meeting is over; a prefetch
            that works has none. None without a prefetch.
        late: loads that begin between the meeting and the gradient's first store, except from what
            siblings publish. The program waits for each of them and does nothing else.
    """

    ahead: int
    early: int | None
    late: int


# -- the listing -----------------------------------------------------------------------------------


def resources(compiled: Compiled) -> Resources:
    """Registers and memory of a kernel that was compiled for an NVIDIA GPU."""
    text = _cuobjdump(compiled, "-res-usage")
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"])


@functools.lru_cache(maxsize=1)  # callers ask for the cost of a kernel, then for its order
def instructions(compiled: Compiled) -> list[Instruction]:
    """The machine code of a kernel that was compiled for an NVIDIA GPU."""
    return parse(_cuobjdump(compiled, "-sass"))


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by `cuobjdump -sass`."""
    line = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    code = []
    for address, predicate, name, rest in re.findall(line, listing):
        goes = re.search(r"0x[0-9a-f]+", rest) if name.startswith("BRA") else None
        target = int(goes[0], 16) if goes else None
        predicated = bool(predicate) or (target is not None and "P" in rest)
        code.append(Instruction(int(address, 16), name, rest, target, predicated))
    return code


def _cuobjdump(compiled: Compiled, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bits(access: str) -> int:
    """The width of LDG.E.128 or LDG.E.U16; 32 where the name has none."""
    widths = [int(part.lstrip("US")) for part in access.split(".") if part.lstrip("US").isdigit()]
    return widths[0] if widths else 32


def _width(name: str, outer: bool) -> int:
    """How many registers an operand outside brackets has; `outer` if it is the first or last."""
    if name.startswith(("LD", "ST")):
        return max(1, _bits(name) // 32)
    # IMAD.WIDE R4, R7, R8, R10 multiplies two registers, adds a pair and writes a pair.
    return 2 if outer and (".WIDE" in name or name == "CS2R") else 1


def _registers(operand: str, width: int) -> Iterator[int]:
    """The registers of R5, -R5.reuse, |R5|, R5.H0_H0, R5.64, [R5.64+UR4+0x10].

    In brackets is an address, whose size does not depend on `width`.
    """
    address = "[" in operand
    for number, pair in re.findall(r"(?<!\w)R(\d+)(\.64)?", operand):
        count = 2 if pair else 1 if address else width
        yield from range(int(number), int(number) + count)


# -- the loop over rows, and the paths through it --------------------------------------------------


class Path(NamedTuple):
    """A path from a block of instructions to the end of the loop. Paths share their ends.

    Attributes:
        names: how many instructions it has of each name.
        reads: how often it reads what siblings publish.
        block: its first block.
        rest: the path after that block.
    """

    names: Counter[str]
    reads: int
    block: list[Instruction]
    rest: "Path | None"

    def sequence(self) -> list[Instruction]:
        sequence: list[Instruction] = []
        path: Path | None = self
        while path is not None:
            sequence += path.block
            path = path.rest
        return sequence


def row_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop over rows, which is the longest; all of the code if it has no loop."""
    code = _without_detours(code)
    backward = [i for i in code if i.goes_back]
    if not backward:
        return code
    last = max(backward, key=lambda i: i.address - (i.target or 0))
    return [i for i in code if (last.target or 0) <= i.address <= last.address]


def _without_detours(code: list[Instruction]) -> list[Instruction]:
    """Drops what only warps with diverged threads run.

    It lies behind all other code, so that its branch back would look like a loop.
    """
    reachable: list[Instruction] = []
    targets: set[int] = set()
    follows = True
    for i in code:
        follows = follows or i.address in targets
        if follows:
            reachable.append(i)
            if i.target is not None and not i.diverges:
                targets.add(i.target)
            follows = not i.ends
    return reachable


def waits(loop: list[Instruction]) -> list[range]:
    """The addresses of each inner loop that polls whether siblings have published."""
    bodies = {
        i.target: range(i.target, i.address + 1)
        for i in loop
        if i.target is not None and loop[0].address < i.target < i.address
    }
    polls = [i.address for i in loop if i.loads_past_l1]
    return [body for body in bodies.values() if any(address in body for address in polls)]


def paths(loop: list[Instruction]) -> list[Path]:
    """The paths from the first instruction to the last, each inner loop passed once.

    Of paths with equal numbers of exponentials, wide loads and wide stores only one is kept: the
    one that reads most of what siblings publish (lanes without a sibling skip reads), then the
    shortest.
    """
    starting_at: dict[int, list[Path]] = {}
    behind: list[Path] | None = None
    for block in reversed(_blocks(loop)):
        end = block[-1]
        rests: list[Path | None] = []
        if behind is None:
            rests = [None]
        elif not end.ends:
            rests += behind
        if end.target is not None and end.target > end.address and not end.diverges:
            rests += starting_at.get(end.target, [])
        names = Counter(i.name for i in block)
        reads = sum(i.loads_past_l1 for i in block)
        behind = starting_at[block[0].address] = _shortest(
            Path(names, reads, block, None)
            if rest is None
            else Path(names + rest.names, reads + rest.reads, block, rest)
            for rest in rests
        )
    assert behind is not None
    return behind


def _blocks(loop: list[Instruction]) -> list[list[Instruction]]:
    """The loop, split after each branch and before each target of one."""
    targets = {i.target for i in loop}
    blocks: list[list[Instruction]] = [[]]
    for i in loop:
        if blocks[-1] and (i.address in targets or blocks[-1][-1].target is not None):
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _shortest(paths: Iterable[Path]) -> list[Path]:
    best: dict[tuple, Path] = {}
    for path in paths:
        kind = tuple(path.names[name] for name in ("MUFU.EX2", WIDE_LOAD, WIDE_STORE))
        if kind not in best or _rank(path) < _rank(best[kind]):
            best[kind] = path
    return list(best.values())


def _rank(path: Path) -> tuple[int, int]:
    return -path.reads, path.names.total()


def _cheapest(
    loop: list[Instruction], exponentials: int, entries: float, itemsize: int
) -> tuple[Path, Cost]:
    """The path of ordinary rows: the cheapest that takes all sums and stores every entry.

    Branches are treated as independent, so some paths skip the sums and still write the gradient.
    They have too few exponentials. The paths of rare rows load more.
    """
    stored = 16 * sum(i.name == WIDE_STORE for i in loop) / entries
    complete = [
        (path, cost)
        for path in paths(loop)
        if (cost := _cost(path.names, entries)).exponentials >= exponentials
        and cost.stored >= min(stored, itemsize)
    ]
    return min(complete, key=lambda choice: (choice[1].loaded, choice[1].instructions))


# -- costs -----------------------------------------------------------------------------------------


def cost(compiled: Compiled) -> Cost:
    exponentials = compiled.configuration.exponentials
    loop = row_loop(instructions(compiled))
    return _cheapest(loop, exponentials, compiled.entries, compiled.itemsize)[1]


def _cost(names: Counter[str], entries: float) -> Cost:
    def count(kind: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(kind))

    accesses = {name: n for name, n in names.items() if name.startswith(("LDG", "STG"))}
    return Cost(
        loaded=16 * names[WIDE_LOAD] / entries,
        stored=16 * names[WIDE_STORE] / entries,
        narrow=sum(n for name, n in accesses.items() if _bits(name) < 128),
        exponentials=names["MUFU.EX2"] / entries,
        special=count("MUFU") / entries,
        converted=count("F2F.") / entries,
        instructions=names.total() / entries,
        barriers=count(BARRIER),
    )


# -- order -----------------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """Positions on a path: the last store that publishes, the first poll, the end of the wait."""

    published: int
    wait: int
    met: int


def order(compiled: Compiled) -> Order:
    exponentials = compiled.configuration.exponentials
    loop = row_loop(instructions(compiled))
    return order_of(loop, exponentials, compiled.entries, compiled.itemsize)


def order_of(
    loop: list[Instruction], exponentials: int, entries: float = 1.0, itemsize: int = 2
) -> Order:
    """The order in a loop whose threads hold `entries` each; `itemsize` is a gradient entry's."""
    path = _cheapest(loop, exponentials, entries, itemsize)[0].sequence()
    meetings = _meetings(loop, path)
    ahead, touching = _prefetched(path, meetings)
    return Order(
        ahead=ahead,
        early=len(touching) if ahead else None,
        late=_late(path, meetings[-1].met) if meetings else 0,
    )


def _meetings(loop: list[Instruction], path: list[Instruction]) -> list[Meeting]:
    meetings: list[Meeting] = []
    for body in waits(loop):
        polls = [k for k, i in enumerate(path) if i.address in body]
        if not polls:
            continue
        start, wait = meetings[-1].met if meetings else 0, polls[0]
        stores = (k for k in range(start, wait) if path[k].name.startswith("STG"))
        meetings.append(Meeting(max(stores, default=-1), wait, polls[-1] + 1))
    return meetings


def _prefetched(path: list[Instruction], meetings: list[Meeting]) -> tuple[int, set[int]]:
    """How many loads are ahead of the next meeting, and where on the path an instruction touches
    the loaded values before that meeting is over."""
    ahead, touching = 0, set[int]()
    for position, load in enumerate(path):
        meeting = next((m for m in meetings if m.wait > position), None)
        if load.name != WIDE_LOAD or meeting is None:
            continue
        loaded = load.loaded()
        touched = [k for k in range(position + 1, meeting.met) if path[k].registers() & loaded]
        # What is touched before the sums are published is part of them, so it is this row's.
        if not touched or touched[0] > meeting.published:
            ahead += 1
            touching.update(touched)
    return ahead, touching


def _late(path: list[Instruction], met: int) -> int:
    """The gradient may lie at the beginning of the loop, before the meeting."""
    before_gradient = takewhile(lambda i: i.name != WIDE_STORE, path[met:] + path[:met])
    return sum(i.name.startswith("LDG") and not i.loads_past_l1 for i in before_gradient)
