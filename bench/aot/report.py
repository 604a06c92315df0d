"""`python -m bench aot`: what the compiler makes of the row-resident kernel, for a GPU elsewhere.

A line for each configuration, read from its machine code: registers, spilled bytes and shared
memory; what an entry of the vocabulary costs in bytes and instructions; and the order in which the
instructions of a row come.

--beside PYTHON  adds the lines of another Python, to compare two releases of Triton
--save PATH      writes the table and how it was made, in Markdown
--json           prints a JSON object for each configuration, as `--beside` reads them
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

import torch
import triton
from triton import knobs

from bench.aot import machine_code
from bench.aot.compile import MAIN_VOCABULARY, Configuration, compile_rows
from hybrid_kernels.divergences import FAMILIES
from hybrid_kernels.triton_backend import plan

KINDS = tuple(name for name, family in FAMILIES.items() if family.resident)
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float32)

TITLE = """\
The row-resident kernel, compiled for sm_90. Registers of a thread, spilled bytes and shared memory
are those of the whole kernel. The rest is counted for rows that are not masked, hold finite numbers
and have no small divergence. Per entry of the vocabulary: bytes loaded and stored in accesses of
128 bits, and their floor, where each model's entry is read once and the gradient's written once;
exponentials; instructions of the special function unit; single conversions (`f2f`); all
instructions. Per row: `bar`, barriers if no program has to be waited for; `ahead`, loads of a later
row that begin before a meeting; `early`, instructions that touch the loaded values before that
meeting is over; `late`, loads between the meeting and the gradient."""
COLUMNS = (
    "     V type problem                    | Triton | splits slice warps | reg spill shared |   in"
    "  out floor | exp2 mufu f2f instr | bar ahead early late"
)


def configurations() -> Iterator[tuple[str, Configuration]]:
    """The lines of the table, each by the name of its problem."""
    for vocabulary, dtype, divergence in itertools.product(VOCABULARIES, DTYPES, KINDS):
        if dtype == torch.bfloat16 or vocabulary == MAIN_VOCABULARY:
            yield divergence, Configuration(vocabulary, dtype, divergence)
    yield "no teacher", Configuration(teachers=0)
    yield "reverse_kl, floor", Configuration(teacher_floor=-20.0)
    for tuning in plan.CANDIDATES[1:]:
        sizes = f"{tuning.tiles}x{tuning.num_warps}x{tuning.programs}"
        yield f"reverse_kl, {sizes}{', lag' * tuning.lag}", Configuration(tuning=tuning)


def described(name: str, configuration: Configuration) -> dict:
    """The figures of a line, or why the configuration does not compile."""
    dtype = str(configuration.dtype).removeprefix("torch.")
    line = {"name": name, "vocabulary": configuration.vocabulary, "dtype": dtype}
    try:
        resources = machine_code.resources(compile_rows(configuration))
        main = compile_rows(configuration._replace(mask=False, small=False))
        cost, order = machine_code.cost(main), machine_code.order(main)
    except Exception as error:  # the compiler raises errors of many types
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        return {**line, "error": repr(root)}
    assert isinstance(main.form, plan.Resident)
    return {
        **line,
        "floor": (configuration.teachers + 2) * configuration.dtype.itemsize,
        "splits": main.form.splits,
        "slice_v": main.form.slice_v,
        "num_warps": main.form.num_warps,
        "spilled": resources.spilled,
        **resources._asdict(),
        **cost._asdict(),
        **order._asdict(),
    }


def report() -> Iterator[dict]:
    """The versions, then a line for each configuration in order, compiled in two processes."""
    yield {"triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        yield from pool.map(described, *zip(*configurations(), strict=True))


def _report_of(python: Path) -> Iterator[dict]:
    """The report that another Python makes."""
    command = [python, "-m", "bench", "aot", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)


def _row(line: dict, version: str) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[line["dtype"]]
    name = f"{line['vocabulary']:6} {dtype} {line['name']:26} | {version:6} |"
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
    reports = [report()] + ([_report_of(options.beside)] if options.beside else [])
    versions = [next(each) for each in reports]
    table = [TITLE, "", COLUMNS]
    print("\n".join(table), flush=True)
    failed = 0
    # Each report has its own processes, so both go on while this one waits for either.
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
    git, folder = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    commit = subprocess.run(git, cwd=folder, capture_output=True, text=True).stdout.strip()
    compilers = ", ".join(f"Triton {v['triton']} with ptxas {v['ptxas']}" for v in versions)
    command = shlex.join(["python", "-m", "bench", "aot", *arguments])
    made = f"`{command}`, of commit {commit or 'unknown'}: {compilers}."
    path.write_text("\n".join(["# Compiled for sm_90", "", made, "", "```", *table, "```", ""]))
