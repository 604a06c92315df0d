"""`python -m bench aot`: compiles the shipped kernels for GPUs that are not here, reads the result.

For each shipped configuration: registers, spilled bytes and shared memory, as `cuobjdump` reports
them; and, counted from the machine code of the loop over rows, the bytes that an entry of the
vocabulary costs in loads and stores, their widths, and its exponentials and instructions.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel

from bench import standin
from hybrid_kernels import Divergence, available_divergences
from hybrid_kernels.kernels import config, resident, sweep, topk
from hybrid_kernels.kernels import rows as launchers
from hybrid_kernels.rows import Coefficients, Rows, Support

# The form, and of the sweeping one whether it measures and whether it writes.
MODES = {
    "resident": None,
    "sweeping": (True, True),
    "statistics": (True, False),
    "gradient": (False, True),
}
# That an entry needs: one for each side's sum, and what the gradient takes anew.
EXPONENTIALS = {
    "reverse_kl": 3,
    "forward_kl": 4,
    "jeffreys": 4,
    "jsd": 5,
    "skew_reverse_kl": 5,
    "skew_forward_kl": 6,
    "alpha": 8,
    "renyi": 9,
    "tv": 4,
}
TOPK_EXPONENTIALS = 2
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float32)


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
    launch: config.Sweep | config.Resident
    itemsize: int

    @property
    def entries(self) -> float:
        """Entries of the vocabulary that a thread holds."""
        launch = self.launch
        held = launch.block_v if isinstance(launch, config.Sweep) else launch.slice_v
        return max(1.0, held / (launch.num_warps * config.WARP))


def compile_rows(
    target: str,
    vocabulary: int,
    dtype: torch.dtype,
    divergence: str,
    mode: str,
    *,
    teacher_floor: float | None = None,
    policy_gradient: bool = True,
    mask: bool = True,
    distil: bool = True,
    small: bool = True,
    count: int = 8192,
    tuning: config.Tuning | None = None,
    teachers: int = 1,
    support: int = 0,
    tail: str = "bucket",
    gradient_dtype: torch.dtype | None = None,
) -> Compiled:
    """A row kernel as a call with these inputs would launch it.

    Args:
        target: a key of `standin.GPUS`.
        vocabulary: V; the rows are contiguous.
        dtype: of both logits, and of the gradient but for `gradient_dtype`.
        divergence: a name from `available_divergences()`.
        mode: a key of `MODES`.
        teacher_floor: as in `hybrid_loss`.
        policy_gradient: with token ids, advantages and an entropy bonus.
        mask: with masked rows.
        distil: with a teacher.
        small: with the branch that only rows of a small divergence take.
        count: rows; Triton makes a constant of a single one.
        teachers: how many there are.
        support: K of top-K teachers; 0 where they are full.
        tail: what stands for the rest of a support.
        tuning: of the row-resident form.
        gradient_dtype: as the linear op asks for, with 16-bit weights: fewer bits than the logits.
    """
    logits = meta(1, count, vocabulary, dtype=dtype)
    target_logits = meta(1, count, vocabulary, dtype=gradient_dtype or dtype)
    members = teachers if distil else 0
    name, parameter = Divergence(divergence).canonical()
    ids = meta(count, support, dtype=torch.int64)
    rows = Rows(
        logits,
        (meta(count, support) if support else logits,) * members,
        (1.0,) * members,
        Support(ids, meta(count), tail, 2.0**-24) if support else None,
        meta(count, dtype=torch.int64) if policy_gradient else None,
        meta(count, dtype=torch.bool) if mask else None,
        name,
        parameter,
        1.0,
        teacher_floor,
    )
    seen = launchers.empty_support(rows) if support else None
    own = meta(count) if policy_gradient else None
    coefficients = Coefficients(meta(1) if distil else None, own, own)
    statistics = rows.statistics()
    flags = MODES[mode]
    if flags is None:
        device = standin.GPUS[target].device
        sides = launchers.held(rows)
        launch = config.resident(vocabulary, dtype.itemsize, count, device, tuning, sides)
        assert launch is not None
        arguments = (
            *launchers.row_arguments(rows, seen, statistics, coefficients, target_logits),
            meta(1),
            meta(1, dtype=torch.int32),
            launch.groups,
        )
        constants = launchers.resident_constants(rows, target_logits, launch)
        kernel = resident.resident_kernel
    else:
        measure, write = flags
        launch = launchers.sweep_form(rows)
        gradient = target_logits if write else None
        arguments = launchers.row_arguments(
            rows, seen, statistics, coefficients if write else None, gradient
        )
        constants = launchers.sweep_constants(rows, gradient, launch, measure=measure)
        kernel = sweep.sweep_kernel
    constants["HAS_SMALL"] &= small
    written = gradient_dtype or dtype
    return _compile(kernel, arguments, constants, target, launch, written)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_marks(target: str, vocabulary: int, dtype: torch.dtype, support: int) -> Compiled:
    """The kernel that looks at top-K supports before the rows are read."""
    logits = meta(1, 8192, vocabulary, dtype=dtype)
    ids = meta(8192, support, dtype=torch.int64)
    known = Support(ids, None, "bucket", 2.0**-24)
    log_probs = (meta(8192, support),)
    rows = Rows(logits, log_probs, (1.0,), known, None, None, "reverse_kl", 0.0, 1.0, None)
    arguments = launchers.mark_arguments(rows, launchers.empty_support(rows))
    constants = launchers.mark_constants(rows, logits)
    launch = launchers.MARKS
    return _compile(topk.mark_kernel, arguments, constants, target, launch, dtype)


def compile_values(
    target: str,
    vocabulary: int,
    dtype: torch.dtype,
    divergence: str,
    *,
    teacher_floor: float | None = None,
    teachers: int = 1,
    count: int = 8192,
) -> Compiled:
    """The kernel for a part of the vocabulary, where both normalisers are needed first."""
    logits = meta(1, count, vocabulary, dtype=dtype)
    name, parameter = Divergence(divergence).canonical()
    rows = Rows(
        logits,
        (logits,) * teachers,
        (1.0,) * teachers,
        None,
        meta(count, dtype=torch.int64),
        meta(count, dtype=torch.bool),
        name,
        parameter,
        1.0,
        teacher_floor,
    )
    values = meta(1 + 2 * teachers, count)
    arguments = launchers.values_arguments(rows, rows.statistics(), values)
    launch = launchers.values_form(rows)
    constants = launchers.values_constants(rows, launch)
    return _compile(sweep.values_kernel, arguments, constants, target, launch, dtype)


def compile_scale(target: str, vocabulary: int, dtype: torch.dtype) -> Compiled:
    """The kernel that multiplies a finished gradient by the upstream one."""
    launch = config.sweep(vocabulary)
    gradient = torch.empty((1, 8192, vocabulary), dtype=dtype, device="meta")
    factor = torch.empty(1, device="meta")
    constants = {
        "V": vocabulary,
        "BLOCK_V": launch.block_v,
        "EDGES": launchers.has_edges([gradient]),
    }
    arguments = launchers.scale_arguments(gradient, factor)
    return _compile(sweep.scale_kernel, arguments, constants, target, launch, dtype)


def _compile(
    kernel: JITFunction,
    arguments: tuple,
    constants: dict,
    target: str,
    launch: config.Sweep | config.Resident,
    dtype: torch.dtype,
) -> Compiled:
    options = launch.options(hip=standin.GPUS[target].target.backend == "hip")
    with standin.driver_for(target):
        compiled = kernel.warmup(*arguments, grid=(1,), **constants, **options)
    return Compiled(compiled, launch, dtype.itemsize)


# -- the machine code ------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One line of machine code; `target` is the address that a branch goes to."""

    address: int
    name: str
    target: int | None
    predicated: bool


class Cost(NamedTuple):
    """What one entry of the vocabulary costs, counted from machine code.

    It is that of the cheapest way through one pass of the loop over rows on which every entry is
    stored: rows that are not masked, hold finite numbers and have no small divergence take it.

    Attributes:
        loaded: bytes in accesses of 128 bits.
        stored: bytes, likewise.
        narrow: narrower loads and stores of a thread in the whole pass.
        exponentials: of the special function unit (logarithms and reciprocals not counted).
        special: all instructions of that unit.
        instructions: all.
    """

    loaded: float
    stored: float
    narrow: int
    exponentials: float
    special: float
    instructions: float


def resources(compiled: Compiled) -> Resources:
    """Registers and memory of a kernel that was compiled for an NVIDIA GPU."""
    text = _cuobjdump(compiled, "-res-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"])


def machine_code(compiled: Compiled) -> list[Instruction]:
    """The instructions of a kernel that was compiled for an NVIDIA GPU."""
    line = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = []
    for address, predicate, name, rest in re.findall(line, _cuobjdump(compiled, "-sass")):
        goes = re.search(r"0x[0-9a-f]+", rest) if name.startswith("BRA") else None
        target = int(goes[0], 16) if goes else None
        found.append(Instruction(int(address, 16), name, target, bool(predicate) or "P" in rest))
    return found


def cost(compiled: Compiled, exponentials: int) -> Cost:
    """What an entry costs in the longest loop, which is the one over rows.

    Branches are taken to be independent, so that ways exist on paper which skip the sums and yet
    write the gradient: they are told by their exponentials. The rare ways load more.
    """
    code = machine_code(compiled)
    loops = [(i.address - i.target, i) for i in code if i.target and i.target < i.address]
    if loops:
        last = max(loops)[1]
        assert last.target is not None
        code = [i for i in code if last.target <= i.address <= last.address]
    stored = sum(_bits(i.name) // 8 for i in code if i.name == "STG.E.128") / compiled.entries
    wanted = min(stored, compiled.itemsize)
    paths = [_cost(path, compiled.entries) for path in _paths(code)]
    return min(
        (p for p in paths if p.exponentials >= exponentials and p.stored >= wanted),
        key=lambda p: (p.loaded, p.instructions),
    )


def _cost(names: Counter[str], entries: float) -> Cost:
    def moved(kind: str) -> float:
        wide = ((name, n) for name, n in names.items() if name.startswith(kind))
        return sum(_bits(name) // 8 * n for name, n in wide if _bits(name) >= 128) / entries

    accesses = {n: count for n, count in names.items() if n.startswith(("LDG", "STG"))}
    special = {n: count for n, count in names.items() if n.startswith("MUFU")}
    return Cost(
        loaded=moved("LDG"),
        stored=moved("STG"),
        narrow=sum(count for name, count in accesses.items() if _bits(name) < 128),
        exponentials=special.get("MUFU.EX2", 0) / entries,
        special=sum(special.values()) / entries,
        instructions=sum(names.values()) / entries,
    )


def _paths(code: list[Instruction]) -> list[Counter[str]]:
    """What is executed on the ways from the first instruction to the last, without inner loops.

    Ways that differ in nothing but their length count once, as the shortest.
    """
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    blocks: list[list[Instruction]] = []
    for index, instruction in enumerate(code):
        if instruction.address in starts or index == 0 or code[index - 1].target is not None:
            blocks.append([])
        blocks[-1].append(instruction)
    # From the last block to the first: for each, the distinct ways to the end.
    ways: dict[int, list[Counter[str]]] = {}
    for index in range(len(blocks) - 1, -1, -1):
        block = blocks[index]
        own = Counter(i.name for i in block)
        end = block[-1]
        following = []
        if index == len(blocks) - 1:
            following = [Counter[str]()]
        else:
            leaves = end.target is not None and not end.predicated
            if not leaves and not end.name.startswith(("EXIT", "RET")):
                following += ways[blocks[index + 1][0].address]
            if end.target is not None and end.target > end.address:
                following += ways.get(end.target, [])
        ways[block[0].address] = _shortest(own + way for way in following)
    return ways[code[0].address]


def _shortest(ways: Iterable[Counter[str]]) -> list[Counter[str]]:
    best: dict[tuple, Counter[str]] = {}
    for way in ways:
        key = tuple(way.get(name, 0) for name in ("MUFU.EX2", "LDG.E.128", "STG.E.128"))
        if key not in best or sum(way.values()) < sum(best[key].values()):
            best[key] = way
    return list(best.values())


def _bits(access: str) -> int:
    """The width of LDG.E.128, or of LDG.E.U16; 32 where the name has none."""
    widths = [int(part.lstrip("US")) for part in access.split(".") if part.lstrip("US").isdigit()]
    return widths[0] if widths else 32


def _cuobjdump(compiled: Compiled, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Prints one line for each shipped configuration of the row-resident form on sm_90.

    Returns the exit status: 1 if one does not compile.
    """
    print(f"Triton {triton.__version__}")
    print(
        "Row-resident form, sm_90: per thread, and per entry of the vocabulary in rows that are\n"
        "not masked, hold finite numbers and have no small divergence. Bytes are in accesses of\n"
        "128 bits; the floor is both models' entry read once and the gradient's written once."
    )
    print(
        "      V dtype    problem                    | splits  slice warps | registers spilled "
        "shared | bytes in  out  floor | exp2 special instructions"
    )
    failed = 0
    for name, case, exponentials, moved, options in _shipped():
        try:
            _report(name, case, exponentials, moved, **options)
        except Exception as error:  # of the compiler, which has many
            failed += 1
            _, vocabulary, dtype, *_ = case
            root = error
            while root.__cause__ is not None:
                root = root.__cause__
            print(f"{vocabulary:7} {str(dtype)[6:]:8} {name:26} | FAILED: {root!r}", flush=True)
    if failed:
        print(f"{failed} configurations do not compile.")
    return int(failed > 0)


def _shipped() -> Iterator[tuple[str, tuple, int, int, dict]]:
    """Name, configuration, exponentials, entries moved per entry, options of `compile_rows`."""
    for vocabulary, dtype, divergence in itertools.product(
        VOCABULARIES, DTYPES, available_divergences()
    ):
        case = ("sm_90", vocabulary, dtype, divergence, "resident")
        yield divergence, case, EXPONENTIALS[divergence], 3, {}
    # Of a support, what its K entries cost is part of what the others do.
    case = ("sm_90", 151936, torch.bfloat16, "reverse_kl", "resident")
    for size in (32, 128, 512, 1024):
        yield f"reverse_kl, top-{size}", case, TOPK_EXPONENTIALS, 2, {"support": size}
    for count in (2, 3):
        yield f"reverse_kl, {count} teachers", case, count + 2, 2 + count, {"teachers": count}


def _report(name: str, case: tuple, exponentials: int, moved: int, **options) -> None:
    used = resources(compile_rows(*case, **options))
    compiled = compile_rows(*case, mask=False, small=False, **options)
    each, launch = cost(compiled, exponentials), compiled.launch
    assert isinstance(launch, config.Resident)
    _, vocabulary, dtype, *_ = case
    print(
        f"{vocabulary:7} {str(dtype)[6:]:8} {name:26} | {launch.splits:6} "
        f"{launch.slice_v:6} {launch.num_warps:5} | {used.registers:9} {used.spilled:7} "
        f"{used.shared:6} | {each.loaded:8.2f} {each.stored:4.2f} {moved * dtype.itemsize:6} | "
        f"{each.exponentials:4.1f} {each.special:7.1f} {each.instructions:12.1f}",
        flush=True,
    )
