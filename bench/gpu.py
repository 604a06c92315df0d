"""`python -m bench gpu`: everything that a GPU is wanted for, in one command and one folder.

The steps run one after another, each with a time limit of its own, and a step that fails or is cut
off does not keep the next from running: results are written as they come. Ten minutes in all on an
H200; `HYBRID_KERNELS_COMMIT` names the commit where the checkout has no history.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
OK, MISSING = "ok", "missing on this machine"


class Step(NamedTuple):
    """A command and how many seconds it may take."""

    name: str
    command: list[str]
    seconds: int


def steps(folder: Path) -> list[Step]:
    """Correctness first, then the benchmark. Most of the time is compilation, where processes that
    share it out help."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    waits = ["tests/test_gpu.py", "-k", "hang or graphs or not_read or run_to_run"]
    shared = ["-n", "8", "--dist", "worksteal", "-m", "gpu", "tests"]
    checked = [python, "-m", "bench.memory_check"]
    checker = ["compute-sanitizer", "--error-exitcode=1"]
    benchmark = [python, "-m", "bench", "run", str(folder), "--suite=gpu", "--deadline=180"]
    return [
        Step("doctor", [python, "-m", "hybrid_kernels"], 40),
        Step("waits", [*pytest, *waits], 70),
        Step("tests", [*pytest, *shared], 170),
        Step("small", checked, 40),  # and what the checkers then need not compile
        Step("memcheck", [*checker, "--tool=memcheck", *checked], 30),
        Step("racecheck", [*checker, "--tool=racecheck", *checked], 30),
        Step("benchmark", benchmark, 215),
    ]


def main(folder: Path) -> int:
    """Runs all steps; the exit status is 1 if one failed that could run."""
    if not torch.cuda.is_available():
        print("python -m bench gpu: needs a GPU; python -m bench run measures a CPU")
        return 2
    folder = folder.resolve()  # the steps run in the repository's root
    folder.mkdir(parents=True, exist_ok=True)
    outcomes, lines = [], []
    for step in steps(folder):
        start = time.perf_counter()
        log = folder / f"{step.name}.log"
        outcome = _run(step, log)
        taken = time.perf_counter() - start
        outcomes.append(outcome)
        lines.append(f"{step.name:10} {outcome:24} {taken:5.0f} s   {log.name}")
        print(lines[-1], flush=True)
    (folder / "steps.txt").write_text("\n".join(lines) + "\n")
    if (folder / "report.md").exists():
        print((folder / "report.md").read_text())
    return int(any(outcome not in (OK, MISSING) for outcome in outcomes))


def _run(step: Step, log: Path) -> str:
    with log.open("w") as output:
        try:
            run = subprocess.Popen(
                step.command, stdout=output, stderr=output, cwd=ROOT, start_new_session=True
            )
        except FileNotFoundError:
            return MISSING
        try:
            status = run.wait(step.seconds)
        except subprocess.TimeoutExpired:
            # With all that it has started: a kernel that hangs must not keep the GPU.
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return f"CUT OFF after {step.seconds} s"
    return OK if status == 0 else f"FAILED, status {status}"
