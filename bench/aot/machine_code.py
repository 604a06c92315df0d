"""What a compiled kernel does, read off its machine code: registers, costs, and in what order.

ptxas assembles; `cuobjdump` lists what came of it. Of a resident kernel the loop over rows is read:
the cheapest way through it that stores every entry, which is what rows take that are not masked,
hold finite numbers and have no small divergence.

No test on a CPU can see the last of these: a prefetch whose values something touches before the
meeting is none, because the program waits for them there, and meets late.
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
from triton.compiler import CompiledKernel

from hybrid_kernels.triton_backend import plan

LEAVES = ("BRA", "EXIT", "RET", "BPT")
WIDE_LOAD = "LDG.E.128"
WIDE_STORE = "STG.E.128"
BARRIER = "BAR.SYNC"


class Resources(NamedTuple):
    """What `cuobjdump` says of a kernel: registers a thread, bytes of stack, local and shared."""

    registers: int
    stack: int
    local: int
    shared: int

    @property
    def spilled(self) -> int:
        return self.stack + self.local


class Compiled(NamedTuple):
    """A kernel, the launch that it was compiled for and the size of a gradient's entry."""

    kernel: CompiledKernel
    launch: plan.Sweep | plan.Resident
    itemsize: int

    @property
    def entries(self) -> float:
        """Entries of the vocabulary that a thread holds."""
        launch = self.launch
        held = launch.block_v if isinstance(launch, plan.Sweep) else launch.slice_v
        return max(1.0, held / (launch.num_warps * plan.WARP))


class Instruction(NamedTuple):
    """One line of machine code; `target` is the address that a branch goes to."""

    address: int
    name: str
    operands: str
    target: int | None
    predicated: bool

    @property
    def ends(self) -> bool:
        """Whether what follows it in memory does not follow in time."""
        return not self.predicated and self.name.split(".")[0] in LEAVES and not self.diverges

    @property
    def diverges(self) -> bool:
        """Whether it is a branch that only warps take whose threads have come apart."""
        return self.name == "BRA.DIV"

    @property
    def goes_back(self) -> bool:
        return self.target is not None and self.target < self.address

    @property
    def loads_past_l1(self) -> bool:
        return re.match(r"LDG?\..*\bSTRONG\.(GPU|SYS)", self.name) is not None

    def registers(self) -> set[int]:
        """Those that it reads or writes. (Of double precision there is nothing in our kernels.)"""
        parts = [p for p in self.operands.split(",") if not re.match(r"\s*!?U?P[T\d]", p)]
        touched: set[int] = set()
        for place, part in enumerate(parts):
            outer = place in (0, len(parts) - 1)
            touched.update(_registers(part, _width(self.name, outer)))
        return touched

    def loaded(self) -> set[int]:
        """Those that a load writes."""
        return set(_registers(self.operands.split(",")[0], _width(self.name, True)))


class Cost(NamedTuple):
    """What one entry of the vocabulary costs, counted from machine code on the cheapest way.

    Attributes:
        loaded: bytes in accesses of 128 bits, but for what siblings published.
        stored: bytes, likewise.
        narrow: narrower loads and stores of a thread in the whole pass.
        exponentials: of the special function unit (logarithms and reciprocals not counted).
        special: all instructions of that unit.
        converted: conversions one by one, which take as long. (Those of pairs do not.)
        instructions: all.
        barriers: of a program in the whole pass, where nobody has to be waited for.
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
    """In what order a row's instructions come, on the way of the thread that arrives.

    Attributes:
        ahead: wide loads of a later row that are begun before a meeting is waited for.
        early: instructions that touch what these load before the wait is over: 0 where the
            prefetch is one. None without a prefetch.
        late: loads that are begun between the wait and the gradient's first store, and are not of
            what siblings published: each is a journey to memory while nothing else is done.
    """

    ahead: int
    early: int | None
    late: int


# -- the listing -----------------------------------------------------------------------------------


def resources(compiled: Compiled) -> Resources:
    """Registers and memory of a kernel that was compiled for an NVIDIA GPU."""
    text = _cuobjdump(compiled, "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"])


@functools.lru_cache(maxsize=1)  # a kernel is asked for its cost, then for its order
def instructions(compiled: Compiled) -> list[Instruction]:
    """Those of a kernel that was compiled for an NVIDIA GPU."""
    return parse(_cuobjdump(compiled, "-sass"))


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by `cuobjdump -sass`."""
    line = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = []
    for address, predicate, name, rest in re.findall(line, listing):
        goes = re.search(r"0x[0-9a-f]+", rest) if name.startswith("BRA") else None
        target = int(goes[0], 16) if goes else None
        predicated = bool(predicate) or (target is not None and "P" in rest)
        found.append(Instruction(int(address, 16), name, rest, target, predicated))
    return found


def _cuobjdump(compiled: Compiled, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _bits(access: str) -> int:
    """The width of LDG.E.128, or of LDG.E.U16; 32 where the name has none."""
    widths = [int(part.lstrip("US")) for part in access.split(".") if part.lstrip("US").isdigit()]
    return widths[0] if widths else 32


def _width(name: str, outer: bool) -> int:
    """Registers of an operand outside of brackets; `outer` for the first and the last of them."""
    if name.startswith(("LD", "ST")):
        return max(1, _bits(name) // 32)
    # IMAD.WIDE R4, R7, R8, R10 multiplies two registers, and adds and writes two pairs.
    return 2 if outer and (".WIDE" in name or name == "CS2R") else 1


def _registers(operand: str, width: int) -> Iterator[int]:
    """Of R5, -R5.reuse, |R5|, R5.H0_H0, R5.64, [R5.64+UR4+0x10]; a bracket holds an address."""
    within = "[" in operand
    for number, pair in re.findall(r"(?<!\w)R(\d+)(\.64)?", operand):
        count = 2 if pair else 1 if within else width
        yield from range(int(number), int(number) + count)


# -- the loop over rows, and the ways through it ---------------------------------------------------


class Way(NamedTuple):
    """A way from a block to the end of the loop. Ways share their ends.

    Attributes:
        names: how many instructions of a name it has.
        reads: how often it reads what they published.
        block: where it begins.
        rest: how it goes on.
    """

    names: Counter[str]
    reads: int
    block: list[Instruction]
    rest: "Way | None"

    def sequence(self) -> list[Instruction]:
        found: list[Instruction] = []
        way: Way | None = self
        while way is not None:
            found += way.block
            way = way.rest
        return found


def row_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop, which is the one over rows; all of the code where there is none."""
    code = _without_detours(code)
    backward = [i for i in code if i.goes_back]
    if not backward:
        return code
    last = max(backward, key=lambda i: i.address - (i.target or 0))
    return [i for i in code if (last.target or 0) <= i.address <= last.address]


def _without_detours(code: list[Instruction]) -> list[Instruction]:
    """Without what only warps run whose threads have come apart. It lies behind everything else,
    and its way back looks like that of a loop."""
    found: list[Instruction] = []
    wanted: set[int] = set()
    follows = True
    for i in code:
        follows = follows or i.address in wanted
        if follows:
            found.append(i)
            if i.target is not None and not i.diverges:
                wanted.add(i.target)
            follows = not i.ends
    return found


def waits(loop: list[Instruction]) -> list[range]:
    """The addresses of each inner loop that looks whether siblings have arrived."""
    bodies = {
        i.target: range(i.target, i.address + 1)
        for i in loop
        if i.target is not None and loop[0].address < i.target < i.address
    }
    polls = [i.address for i in loop if i.loads_past_l1]
    return [body for body in bodies.values() if any(address in body for address in polls)]


def ways(loop: list[Instruction]) -> list[Way]:
    """The ways from the first instruction to the last, without inner loops.

    Of ways that differ in nothing but their length there is only the shortest. (Lanes for which
    there is no sibling may jump over a read; those that read are wanted.)
    """
    found: dict[int, list[Way]] = {}
    behind: list[Way] | None = None
    for block in reversed(_blocks(loop)):
        end = block[-1]
        rests: list[Way | None] = []
        if behind is None:
            rests = [None]
        elif not end.ends:
            rests += behind
        if end.target is not None and end.target > end.address and not end.diverges:
            rests += found.get(end.target, [])
        names = Counter(i.name for i in block)
        reads = sum(i.loads_past_l1 for i in block)
        behind = found[block[0].address] = _shortest(
            Way(names, reads, block, None)
            if rest is None
            else Way(names + rest.names, reads + rest.reads, block, rest)
            for rest in rests
        )
    assert behind is not None
    return behind


def _blocks(loop: list[Instruction]) -> list[list[Instruction]]:
    """Cut where branches go to and come from."""
    starts = {i.target for i in loop}
    blocks: list[list[Instruction]] = [[]]
    for i in loop:
        if blocks[-1] and (i.address in starts or blocks[-1][-1].target is not None):
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _shortest(ways: Iterable[Way]) -> list[Way]:
    best: dict[tuple, Way] = {}
    for way in ways:
        kind = tuple(way.names[name] for name in ("MUFU.EX2", WIDE_LOAD, WIDE_STORE))
        if kind not in best or _rank(way) < _rank(best[kind]):
            best[kind] = way
    return list(best.values())


def _rank(way: Way) -> tuple[int, int]:
    return -way.reads, way.names.total()


def _row_loop_of(compiled: Compiled) -> list[Instruction]:
    return row_loop(instructions(compiled))


def _full(
    loop: list[Instruction], exponentials: int, entries: float, itemsize: int
) -> list[tuple[Way, Cost]]:
    """The ways on which all sums are taken and every entry is stored, with what they cost.

    Branches are taken to be independent, so that ways exist on paper which skip the sums and yet
    write the gradient: they are told by their exponentials. The rare ways load more.
    """
    stored = 16 * sum(i.name == WIDE_STORE for i in loop) / entries
    wanted = min(stored, itemsize)
    priced = ((way, _cost(way.names, entries)) for way in ways(loop))
    return [(w, c) for w, c in priced if c.exponentials >= exponentials and c.stored >= wanted]


# -- what it costs ---------------------------------------------------------------------------------


def cost(compiled: Compiled, exponentials: int) -> Cost:
    """What an entry costs that needs so many exponentials."""
    full = _full(_row_loop_of(compiled), exponentials, compiled.entries, compiled.itemsize)
    return min((c for _, c in full), key=lambda c: (c.loaded, c.instructions))


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


# -- in what order ---------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """Where on a way a program publishes last, begins to wait, and no longer waits."""

    published: int
    wait: int
    met: int


def order(compiled: Compiled, exponentials: int) -> Order:
    """In what order the instructions of a row come, which has exponentials as for `cost`."""
    loop = _row_loop_of(compiled)
    return order_of(loop, exponentials, compiled.entries, compiled.itemsize)


def order_of(
    loop: list[Instruction], exponentials: int, entries: float = 1.0, itemsize: int = 2
) -> Order:
    """`order`, of a loop of which a thread holds so many entries of so many bytes."""
    full = _full(loop, exponentials, entries, itemsize)
    chosen, _ = min(full, key=lambda f: (f[1].loaded, f[1].instructions))
    way = chosen.sequence()
    found = _meetings(loop, way)
    ahead, touching = _prefetched(way, found)
    return Order(
        ahead=ahead,
        early=len(touching) if ahead else None,
        late=_late(way, found[-1].met) if found else 0,
    )


def _meetings(loop: list[Instruction], way: list[Instruction]) -> list[Meeting]:
    found: list[Meeting] = []
    for body in waits(loop):
        places = [k for k, i in enumerate(way) if i.address in body]
        if not places:
            continue
        start, wait = found[-1].met if found else 0, places[0]
        published = max((k for k in range(start, wait) if _stores(way[k])), default=-1)
        found.append(Meeting(published, wait, places[-1] + 1))
    return found


def _stores(instruction: Instruction) -> bool:
    return instruction.name.startswith("STG")


def _prefetched(way: list[Instruction], meetings: list[Meeting]) -> tuple[int, set[int]]:
    """How many loads are ahead of the meeting after them, and where on the way something touches
    what they load before that meeting is over."""
    ahead, touching = 0, set[int]()
    for place, load in enumerate(way):
        meeting = next((m for m in meetings if m.wait > place), None)
        if load.name != WIDE_LOAD or meeting is None:
            continue
        loaded = load.loaded()
        touched = [k for k in range(place + 1, meeting.met) if way[k].registers() & loaded]
        # What is used in what is published is this row's: the sums are made of it.
        if not touched or touched[0] > meeting.published:
            ahead += 1
            touching.update(touched)
    return ahead, touching


def _late(way: list[Instruction], met: int) -> int:
    """The gradient may lie at the beginning of the loop, before the meeting."""
    before_gradient = takewhile(lambda i: i.name != WIDE_STORE, way[met:] + way[:met])
    return sum(i.name.startswith("LDG") and not i.loads_past_l1 for i in before_gradient)
