"""`python -m bench COMMAND`

quick            a small benchmark, under two minutes on two cores
run              the CPU's suite, into bench/results/cpu; --suite=linear-cpu: from hidden states
report [FOLDER]  tables and plots of the results in a folder
aot              what the compiler makes of the shipped kernels, for GPUs that are not here;
                 --beside PYTHON: and what another Triton makes of them
prebuild         compiles kernels for a GPU that is not here, and packs them into prebuilt/
gpu [FOLDER]     runs everything that needs a GPU, in stages, into FOLDER/<device> (GPU.md)
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report, summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# Commands whose module parses their options.
MODULES = {
    "aot": "bench.aot.report",
    "prebuild": "bench.gpu.prebuild",
    "gpu": "bench.gpu.conductor",
}


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


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in MODULES:
        sys.exit(importlib.import_module(MODULES[sys.argv[1]]).main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=("quick", "run", "report", *MODULES))
    parser.add_argument("folder", nargs="?", type=Path, help="default: bench/results/cpu")
    parser.add_argument("--suite", choices=("cpu", "linear-cpu"), default="cpu")
    parser.add_argument("--deadline", help="run: seconds after which no case starts")
    arguments = parser.parse_args()
    default = RESULTS / "cpu" / ("linear" if "linear" in arguments.suite else "")
    folder = (arguments.folder or default).resolve()  # pytest runs in the root
    if arguments.command == "quick":
        with tempfile.TemporaryDirectory() as temporary:
            measure("quick", Path(temporary), "-p", "no:cacheprovider")
    elif arguments.command == "run":
        options = [f"--deadline={arguments.deadline}"] if arguments.deadline else []
        measure(arguments.suite, folder, *options)
    else:
        staged = any(folder.glob("results-*.jsonl"))
        module = importlib.import_module("bench.gpu.report") if staged else report
        print(module.render(folder))


if __name__ == "__main__":
    main()
