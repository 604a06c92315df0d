"""What limits a kernel's speed, by hardware counters that a process under Nsight Compute reads."""

import contextlib
import csv
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.providers import PROVIDERS, Problem

# There are few rows because the profiler saves and restores all memory between its passes.
ROWS, VOCABULARY = 2048, 151_936
PROFILED = (("hybrid_kernels", "reverse_kl"), ("hybrid_kernels", "jsd"))
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    **{
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio": f"stalled: {reason}"
        for reason in (
            "barrier",
            "long_scoreboard",
            "short_scoreboard",
            "math_pipe_throttle",
            "membar",
            "not_selected",
            "wait",
        )
    },
}


def work(device: str) -> None:
    """Launches each kernel that is profiled."""
    for provider, divergence in PROFILED:
        problem = Problem.random((ROWS, VOCABULARY), torch.bfloat16, divergence, device)
        PROVIDERS[provider].make(problem)()


def measure(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """One row of results for each profiled kernel."""
    if device == "meta":
        work(device)
        yield {"profiled": "nothing"}
        return
    command = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(METRICS)]
    command += ["-k", "regex:resident_kernel", "--launch-count", str(len(PROFILED))]
    command += [sys.executable, "-m", "bench.gpu.profiler"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=max(5, seconds))
    except FileNotFoundError:
        yield {"profiled": "nothing", "failed": "ncu is missing on this machine"}
        return
    except subprocess.TimeoutExpired:
        yield {"profiled": "nothing", "failed": f"ncu took more than {seconds:.0f} s"}
        return
    print(run.stdout[-20_000:], run.stderr[-5000:])
    rows = parse(run.stdout)
    for row, (_, divergence) in zip(rows, PROFILED, strict=False):  # in the order of `work`
        row["profiled"] += f", {divergence}"
    yield from rows or [{"profiled": "nothing", "failed": f"ncu's status: {run.returncode}"}]


def parse(output: str) -> list[dict[str, Any]]:
    """A row for each launch, from ncu's CSV with a line for each metric of each launch."""
    start = re.search(r'^"ID",', output, re.MULTILINE)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO(output[start.start() :])):
        name = METRICS.get(line["Metric Name"])
        if name is None:  # ncu also prints messages between the lines
            continue
        row = launches.setdefault(line["ID"], {"profiled": line["Kernel Name"]})
        with contextlib.suppress(ValueError):  # "n/a"
            row[name] = float(line["Metric Value"].replace(",", ""))
    return list(launches.values())


if __name__ == "__main__":
    work("cuda")
    torch.cuda.synchronize()
