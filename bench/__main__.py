"""`python -m bench COMMAND`

quick            a small benchmark, under two minutes on two cores
run              the suite for this machine (or --suite), into bench/results/<device>;
                 from hidden states: --suite=linear-cpu or linear-gpu
report [FOLDER]  tables and plots of the results in a folder
aot              what the compiler makes of the shipped kernels, for GPUs that are not here
topk             what top-K losses do to the gradient: tables and a plot, exactly
precision        what the precision of the logits does to the gradient: a table
filter           what gradient filtering drops and saves, on a model trained here (10 minutes)
gpu              everything that a GPU is wanted for: tests, memory checker, benchmark
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import report, summary
from bench.suites import SUITES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


COMMANDS = ("quick", "run", "report", "aot", "topk", "precision", "filter", "gpu")


def measure(suite: str, folder: Path, *options: str) -> None:
    """Runs a suite and leaves `raw.json`, `summary.json`, `report.md` and `report.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / "raw.json"
    command = [sys.executable, "-m", "pytest", "bench", f"--suite={suite}", "--benchmark-only"]
    command += [f"--benchmark-json={raw}", "--benchmark-disable-gc", "-q", "-rs", *options]
    command += ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname"]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not raw.exists() or not raw.stat().st_size:
        sys.exit(f"the benchmark left no results (pytest's exit status: {status})")
    summary.write(folder)
    print(report.render(folder))
    if status:
        sys.exit(status)


def device_folder() -> Path:
    """`bench/results/<device>`, `cpu` where there is no GPU."""
    if not torch.cuda.is_available():
        return RESULTS / "cpu"
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("folder", nargs="?", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--suite", choices=tuple(SUITES))
    parser.add_argument("--deadline", help="run: seconds after which no case is begun")
    arguments = parser.parse_args()
    default = device_folder() / ("linear" if "linear" in (arguments.suite or "") else "")
    folder = (arguments.folder or default).resolve()  # pytest runs in the root
    if arguments.command == "quick":
        with tempfile.TemporaryDirectory() as temporary:
            measure("quick", Path(temporary), "-p", "no:cacheprovider")
    elif arguments.command == "run":
        options = [f"--deadline={arguments.deadline}"] if arguments.deadline else []
        suite = arguments.suite or ("gpu" if torch.cuda.is_available() else "cpu")
        measure(suite, folder, *options)
    elif arguments.command == "report":
        print(report.render(folder))
    elif arguments.command == "aot":
        from bench import aot

        sys.exit(aot.main())
    elif arguments.command == "topk":
        from bench import topk_bias

        topk_bias.main(arguments.folder or RESULTS)
    elif arguments.command == "precision":
        from bench import precision

        precision.main(arguments.folder or RESULTS)
    elif arguments.command == "filter":
        from bench import filter

        filter.main(arguments.folder or RESULTS)
    else:
        from bench import gpu

        sys.exit(gpu.main(folder))


if __name__ == "__main__":
    main()
