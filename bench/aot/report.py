"""`python -m bench aot`: compiles the shipped kernels for GPUs that are not here, reads the result.

For each configuration of the row-resident kernel, as `machine_code.py` reads it: registers,
spilled bytes and shared memory; what an entry of the vocabulary costs in bytes and instructions;
and in what order a row's instructions come.

--beside PYTHON  the same under another Python, so that two releases of Triton lie side by side
--save PATH      the table and how it was made, in markdown
--json           a line for each configuration, for the Python that runs this beside itself
"""

import argparse
import itertools
import json
import multiprocessing
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs

from bench import standin
from bench.aot import machine_code
from bench.aot.machine_code import Compiled
from hybrid_kernels import Divergence
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.rows import Coefficients, Rows
from hybrid_kernels.triton_backend import launch, plan
from hybrid_kernels.triton_backend.launch import Launch

# The form, and of the sweeping one whether it measures and whether it writes.
MODES = {
    "resident": None,
    "sweeping": (True, True),
    "statistics": (True, False),
    "gradient": (False, True),
}
KINDS = tuple(name for name, family in FAMILIES.items() if family.resident)
# That an entry needs: one for each side's sum, and those that are computed again.
EXPONENTIALS = {"reverse_kl": 3, "forward_kl": 4, "jeffreys": 4, "jsd": 4}
MAIN_VOCABULARY = 151936
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float32)


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
    tuning: plan.Tuning | None = None,
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
    rows = Rows(
        logits,
        (meta(count, support) if support else logits,) * members,
        (1.0,) * members,
        meta(count, support, dtype=torch.int64) if support else None,
        meta(count) if support else None,
        meta(count, dtype=torch.int64) if policy_gradient else None,
        meta(count, dtype=torch.bool) if mask else None,
        divergence=name,
        parameter=parameter,
        teacher_floor=teacher_floor,
        tail=tail,
        resolution=2.0**-24,
    )
    own = meta(count) if policy_gradient else None
    coefficients = Coefficients(meta(1) if distil else None, own, own)
    seen = launch.empty_support(rows) if support else None
    flags = MODES[mode]
    if flags is None:
        own = standin.GPUS[target].device
        with (
            mock.patch.object(plan.Device, "of", return_value=own),
            mock.patch.object(plan, "tuned", return_value=tuning),
        ):
            form = launch.form(rows, target_logits, hip=False)
        assert isinstance(form, plan.Resident), f"{divergence}: swept"
        chosen = launch.resident_launch(rows, rows.statistics(), coefficients, target_logits, form)
    else:
        measure, write = flags
        chosen = launch.sweep_launch(
            rows,
            seen,
            rows.statistics(),
            coefficients if write else None,
            target_logits if write else None,
            measure=measure,
        )
    own_plan = chosen.plan._replace(small=chosen.plan.small and small)
    return _compile(chosen._replace(plan=own_plan), target, gradient_dtype or dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_marks(target: str, vocabulary: int, dtype: torch.dtype, support: int) -> Compiled:
    """The kernel that looks at top-K supports before the rows are read."""
    logits = meta(1, 8192, vocabulary, dtype=dtype)
    ids = meta(8192, support, dtype=torch.int64)
    rows = Rows(logits, (meta(8192, support),), (1.0,), ids, resolution=2.0**-24)
    return _compile(launch.mark_launch(rows, launch.empty_support(rows), logits), target, dtype)


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
        token_ids=meta(count, dtype=torch.int64),
        valid=meta(count, dtype=torch.bool),
        divergence=name,
        parameter=parameter,
        teacher_floor=teacher_floor,
    )
    values = meta(1 + 2 * teachers, count)
    return _compile(launch.values_launch(rows, rows.statistics(), values), target, dtype)


def compile_scale(target: str, vocabulary: int, dtype: torch.dtype) -> Compiled:
    """The kernel that multiplies a finished gradient by the upstream one."""
    gradient = meta(1, 8192, vocabulary, dtype=dtype)
    return _compile(launch.scale_launch(gradient, meta(1)), target, dtype)


def _compile(own: Launch, target: str, dtype: torch.dtype) -> Compiled:
    options = own.form.options(hip=standin.GPUS[target].target.backend == "hip")
    kernel: Any = own.kernel  # a method, to type checkers: JITFunction is a descriptor
    with standin.driver_for(target):
        compiled = kernel.warmup(*own.given, grid=(1,), **options)
    return Compiled(compiled, own.form, dtype.itemsize)


# -- the report ------------------------------------------------------------------------------------

MULTIPROCESSORS = 132  # of an H100
TITLE = """\
Of the row-resident kernel, on sm_90: per thread, and per entry of the vocabulary in rows that are
not masked, hold finite numbers and have no small divergence (spills are those of the whole). Bytes
are in accesses of 128 bits; the floor is each model's entry read once and the gradient's written
once; `f2f` are conversions one by one. Per row: `bar`, barriers where nobody has to be waited for;
`ahead`, loads of a later row that begin before a meeting; `early`, instructions that touch what
they load before it is over; `late`, loads between the meeting and the gradient."""
COLUMNS = (
    "     V type problem                    | Triton | splits slice warps | reg spill shared |   in"
    "  out floor | exp2 mufu f2f instr | bar ahead early late"
)


class Configuration(NamedTuple):
    """A line of the table.

    Attributes:
        name: of the problem.
        vocabulary: V.
        dtype: of logits and gradient.
        divergence: that of the kernel.
        options: of `compile_rows`.
    """

    name: str
    vocabulary: int
    dtype: torch.dtype
    divergence: str
    options: dict

    @property
    def one_sided(self) -> bool:
        return not self.options.get("distil", True)

    @property
    def exponentials(self) -> int:
        """That an entry needs."""
        return 2 if self.one_sided else EXPONENTIALS[self.divergence]

    def compile(self, **options) -> Compiled:
        """`options` leave out what rare rows need."""
        case = ("sm_90", self.vocabulary, self.dtype, self.divergence, "resident")
        return compile_rows(*case, **self.options, **options)


def configurations() -> Iterator[Configuration]:
    for vocabulary, dtype, divergence in itertools.product(VOCABULARIES, DTYPES, KINDS):
        if dtype == torch.bfloat16 or vocabulary == MAIN_VOCABULARY:
            yield Configuration(divergence, vocabulary, dtype, divergence, {})
    main = (MAIN_VOCABULARY, torch.bfloat16, "reverse_kl")
    yield Configuration("no teacher", *main, {"distil": False})
    yield Configuration("reverse_kl, floor", *main, {"teacher_floor": -20.0})
    for tuning in plan.CANDIDATES[1:]:
        name = f"reverse_kl, {tuning.tiles}x{tuning.num_warps}x{tuning.programs}"
        name += ", lag" * tuning.lag
        yield Configuration(name, *main, {"tuning": tuning})


def described(configuration: Configuration) -> dict:
    """What there is to say of one, or why it does not compile."""
    shipped = (configuration.name, configuration.vocabulary, str(configuration.dtype)[6:])
    line = dict(zip(("name", "vocabulary", "dtype"), shipped, strict=True))
    try:
        used = machine_code.resources(configuration.compile())
        compiled = configuration.compile(mask=False, small=False)
        cost = machine_code.cost(compiled, configuration.exponentials)
        order = machine_code.order(compiled, configuration.exponentials)
    except Exception as error:  # of the compiler, which has many
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        return {**line, "error": repr(root)}
    form = compiled.launch
    assert not isinstance(form, plan.Sweep)
    return {
        **line,
        "floor": (2 if configuration.one_sided else 3) * configuration.dtype.itemsize,
        "splits": form.splits,
        "slice_v": form.slice_v,
        "num_warps": form.num_warps,
        "spilled": used.spilled,
        **used._asdict(),
        **cost._asdict(),
        **order._asdict(),
    }


def report() -> Iterator[dict]:
    """First the compiler, then every configuration, in order, on two processes."""
    yield {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield from pool.map(described, configurations())


def _beside(python: Path) -> Iterator[dict]:
    """The report under another Python."""
    command = [python, "-m", "bench", "aot", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        yield from map(json.loads, other.stdout)


def _row(line: dict, version: str) -> str:
    """One of the table, and what it has no column for."""
    kind = {"bfloat16": "bf16", "float32": "fp32"}[line["dtype"]]
    name = f"{line['vocabulary']:6} {kind} {line['name']:26} | {version:6} |"
    if "error" in line:
        return f"{name} FAILED: {line['error']}"
    early = "-" if line["early"] is None else line["early"]
    return (
        f"{name} {line['splits']:6} {line['slice_v']:5} {line['num_warps']:5} | "
        f"{line['registers']:3} {line['spilled']:5} {line['shared']:6} | "
        f"{line['loaded']:4.1f} {line['stored']:4.1f} {line['floor']:5} | "
        f"{line['exponentials']:4.1f} {line['special']:4.1f} {line['converted']:3.1f} "
        f"{line['instructions']:5.1f} | "
        f"{line['barriers']:3} {line['ahead']:5} {early:>5} {line['late']:4}"
    )


def main(arguments: list[str]) -> int:
    """Prints a table. Returns the exit status: 1 if a configuration does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m bench aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--beside", type=Path, help="another Python")
    parser.add_argument("--save", type=Path, help="a file for the table")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.json:
        for line in report():
            print(json.dumps(line), flush=True)
        return 0
    reports = [report()] + ([_beside(options.beside)] if options.beside else [])
    versions = [next(each) for each in reports]
    table = [TITLE, "", COLUMNS]
    print("\n".join(table), flush=True)
    failed = 0
    # Each has processes of its own, which run while the other's line is waited for.
    for lines in zip(*reports, strict=True):
        for line, version in zip(lines, versions, strict=True):
            failed += "error" in line
            table.append(_row(line, version["triton"]))
            print(table[-1], flush=True)
    if failed:
        print(f"{failed} lines do not compile.")
    if options.save:
        _save(options.save, versions, table, arguments)
    return int(failed > 0)


def _save(path: Path, versions: list[dict], table: list[str], arguments: list[str]) -> None:
    git = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).parents[2]
    commit = subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip()
    compilers = ", ".join(f"Triton {v['triton']} with ptxas {v['ptxas']}" for v in versions)
    command = shlex.join(["python", "-m", "bench", "aot", *arguments])
    made = f"`{command}`, of commit {commit or 'unknown'}: {compilers}."
    path.write_text("\n".join(["# Compiled for sm_90", "", made, "", "```", *table, "```", ""]))
