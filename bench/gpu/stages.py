"""`python -m bench.gpu.stages NAME RESULTS`: runs a stage; each is a function here.

A stage appends its results to the file RESULTS at once. With --dry-run the same code runs on meta
tensors without a GPU (`standin.py`). With --compile, too, it leaves every kernel in Triton's cache,
so that the prebuilt kernels are always those that the stages launch.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.runtime import cache

from bench import measure, memory_check, standin
from bench.gpu import checks, conductor, hangs, meeting, prebuild, profiler
from bench.linear import LINEAR_PROVIDERS
from bench.providers import PROVIDERS
from bench.suites import (
    HYBRID,
    INPUTS,
    LINEAR,
    OURS,
    SUPPORTS,
    TOP_K,
    TOP_K_TORCH,
    TWO_LAUNCHES,
    TWO_TEACHERS,
    Case,
)
from bench.summary import Row
from hybrid_kernels import available_divergences, tune
from hybrid_kernels.triton_backend import plan

ROOT = Path(__file__).parents[2]
ROWS, MAIN = 8192, 151_936
VOCABULARIES = (32_000, 50_257, 128_256, MAIN, 262_144)
# Operations whose bandwidth the others are compared with.
PLAIN = ("copy", "add", "read")
# The problems on which tunings are compared.
TUNED = (
    Case(OURS, 3533, MAIN),
    Case(OURS, 16_384, 32_000),
    Case(OURS, 3533, MAIN, divergence="jsd"),
    Case(OURS, 3533, MAIN, torch.float32),
    Case(TOP_K, 3533, MAIN, inputs="K=128"),
    Case(TWO_TEACHERS[0], 3533, MAIN),
)
PEERS = ("speculators 0.9.0", "Liger 0.8.5", "torch eager", "torch.compile")


class Stage:
    """A stage while it runs.

    Attributes:
        name: a key of `FUNCTIONS`.
        results: the file.
        until: when it should end, in Unix time.
        device: "cuda", or "meta" in a dry run.
        sweeps: whether the sweeping form replaces the row-resident one.
    """

    def __init__(
        self, name: str, results: Path, until: float, device: str, sweeps: bool = False
    ) -> None:
        self.name, self.results, self.device, self.sweeps = name, results, device, sweeps
        self.begin, self.until = time.time(), until

    @property
    def dry(self) -> bool:
        return self.device == "meta"

    def left(self) -> float:
        """Seconds until this stage should end."""
        return self.until - time.time()

    def write(self, row: Row) -> None:
        at = round(time.time() - self.begin, 2)
        with self.results.open("a") as file:
            file.write(json.dumps({"stage": self.name, "at": at, **row}) + "\n")

    def attempt(self, row: Row, run: Callable[[], Row], waits: bool = True) -> None:
        """Runs something, and writes one row before it and one with its results or its error.

        An error is raised again only if the device is lost.

        Args:
            row: names what is run.
            run: returns the results.
            waits: whether programs may wait for each other, so that silence means a hang.
        """
        if self.left() <= 0:
            self.write({**row, "failed": "not begun: out of time"})
            return
        self.write({"begun": next(iter(row.values())), "waits": waits and not self.sweeps})
        try:
            results = run()
        except Exception as error:
            self.write({**row, "failed": repr(error)[:300]})
            if any(sign in str(error) for sign in conductor.LOST):
                raise
        else:
            self.write({**row, **results})

    def named(self, problem: str) -> str:
        return f"{problem}, sweeping" if self.sweeps else problem

    def cases(self, cases: list[Case]) -> None:
        """Measures cases until the stage's time is up."""
        for case in cases:
            name = self.named(str(case))
            if reason := self.missing(case):
                self.write({"case": name, "failed": reason})
            else:
                ours = case.provider.startswith(OURS)
                self.attempt({"case": name}, lambda case=case: self.measured(case), waits=ours)
            if not self.dry:
                torch.cuda.empty_cache()

    def measured(self, case: Case) -> Row:
        row = measure.measure(case, self.device)
        if self.sweeps:
            row["inputs"] = ", ".join(filter(None, (row["inputs"], "sweeping form")))
        return row

    def missing(self, case: Case) -> str | None:
        """Why a case can't be measured here; None if it can."""
        provider = measure.provider_of(case)
        if self.dry and (provider.needs or "compile" in case.provider):
            return "a dry run has no peers"
        return provider.missing()


# -- the stages, in the order of `conductor.STAGES` ------------------------------------------------


def setup(stage: Stage) -> None:
    """Describes the machine, unpacks prebuilt kernels and installs peers from wheels."""
    if not stage.dry:
        stage.write(_machine())
    stage.write({"prebuilt": prebuild.unpack(Path(os.environ["BENCH_PREBUILT"]))})
    if not stage.dry:
        stage.write({"launchers": prebuild.build_launchers()})
    wheels = sorted(str(path) for path in Path(os.environ["BENCH_PEERS"]).glob("*.whl"))
    if wheels:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--no-cache-dir", "--target", os.environ["BENCH_SITE"]]
        status = subprocess.run([*command, *wheels]).returncode
        stage.write({"wheels": len(wheels), "pip_status": status})
        importlib.invalidate_caches()  # Python has cached that this folder on the path is empty
    providers = {**PROVIDERS, **LINEAR_PROVIDERS}
    missing = {name: provider.missing() for name, provider in providers.items()}
    stage.write({"missing_peers": {name: why for name, why in missing.items() if why}})


def _machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"]
    smi = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "driver": smi.stdout.split(",")[0].strip(),
        "smi": smi.stdout.strip(),
        "triton_key": cache.triton_key()[:40],
        "fp32_sums_of_bf16": _fp32_sums(),
    }


def _fp32_sums() -> str:
    """Whether cuBLAS can add bf16 products to an fp32 tensor, which the linear op needs."""
    a, out = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16), torch.ones(64, 64).cuda()
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError as error:
        return repr(error)[:200]
    return "right" if bool((out == 65).all()) else "WRONG"


def ceilings(stage: Stage) -> None:
    stage.cases([Case(name, ROWS, MAIN) for name in PLAIN])


def meeting_alone(stage: Stage) -> None:
    for name, run in meeting.measurements(stage.device).items():
        stage.attempt({"meeting": name}, run, waits=False)


def right(stage: Stage) -> None:
    for check in checks.CHECKS:
        name = stage.named(str(check))
        stage.attempt({"check": name}, lambda c=check: checks.run(c, stage.device))


def headline(stage: Stage) -> None:
    stage.cases(
        [
            Case(name, ROWS, vocabulary, divergence=divergence)
            for vocabulary in (MAIN, 32_000)
            for name, divergence in (
                (OURS, "reverse_kl"),
                (HYBRID, "reverse_kl"),
                (OURS, "forward_kl"),
                (OURS, "jsd"),
            )
        ]
    )


def tuning(stage: Stage) -> None:
    """Tries each candidate on a few problems; writes the best for each size of logits to a file."""
    times: dict[Case, dict[plan.Tuning, float]] = {case: {} for case in TUNED}

    def timed(case: Case, candidate: plan.Tuning) -> Row:
        with mock.patch.object(plan, "tuned", return_value=candidate):
            measured = measure.measure(case, stage.device)
        times[case][candidate] = measured["median_ms"]
        return measured

    for candidate, case in itertools.product(plan.CANDIDATES, TUNED):
        row = {"tuning": str(candidate), "of": str(case)}
        stage.attempt(row, lambda case=case, candidate=candidate: timed(case, candidate))
    if stage.dry:
        return
    os.environ["HYBRID_KERNELS_TUNING"] = os.environ["BENCH_TUNING"]
    for itemsize in (2, 4):
        of_size = [by for case, by in times.items() if case.dtype.itemsize == itemsize]
        tried = {c: [by.get(c, math.inf) for by in of_size] for c in plan.CANDIDATES}
        best = tune.fastest(tried)
        plan.write_tuning(torch.cuda.get_device_name(), itemsize, best)
        stage.write({"best_tuning": str(best), "itemsize": itemsize})


def profile(stage: Stage) -> None:
    for row in profiler.measure(stage.device, stage.left()):
        stage.write(row)


def peers(stage: Stage) -> None:
    """Starts with the main size and divergence, ends with what takes longest to compile or tune."""
    cases = [Case(peer, ROWS, MAIN) for peer in PEERS]
    cases += [Case(name, ROWS, MAIN) for name in TWO_TEACHERS]
    cases += [Case(TOP_K, ROWS, MAIN, inputs="K=128")]
    cases += [Case(name, ROWS, MAIN, inputs="K=128") for name in TOP_K_TORCH if "comp" not in name]
    slow_last = PEERS[-2::-1]
    cases += [Case(peer, ROWS, MAIN, divergence="jsd") for peer in slow_last]
    cases += [Case(peer, ROWS, 32_000) for peer in slow_last]
    cases += [Case(peer, ROWS, MAIN, divergence="forward_kl") for peer in slow_last]
    cases += [Case(PEERS[-1], ROWS, 32_000), Case("torch.compile, max-autotune", ROWS, MAIN)]
    stage.cases(cases)


def matrix(stage: Stage) -> None:
    """Starts with the most informative cases, as time may not suffice for all."""
    sizes = [v for v in VOCABULARIES if v not in (MAIN, 32_000)]
    cases = [Case(OURS, ROWS, v, divergence=d) for v in sizes for d in ("reverse_kl", "jsd")]
    cases += [Case(OURS, ROWS, MAIN, divergence=d) for d in available_divergences()]
    cases += [Case(name, ROWS, MAIN) for name in TWO_LAUNCHES]
    cases += [Case(name, rows, MAIN) for rows in (1024, 4096, 16_384) for name in ("add", OURS)]
    cases += [Case(TOP_K, ROWS, MAIN, inputs=f"K={size}") for size in SUPPORTS]
    plain = [name for name, options in INPUTS.items() if name and "support" not in options]
    cases += [Case(OURS, ROWS, MAIN, inputs=name) for name in plain]
    cases += [Case(name, 4096, MAIN, torch.float32) for name in ("add", OURS)]
    cases += [Case(OURS, ROWS, MAIN, torch.float16)]
    cases += [Case(HYBRID, ROWS, v) for v in sizes]
    cases += [Case(OURS, ROWS, v, divergence=d) for v in sizes for d in ("forward_kl", "jeffreys")]
    headline = {Case(OURS, ROWS, MAIN, divergence=d) for d in ("reverse_kl", "forward_kl", "jsd")}
    stage.cases([case for case in dict.fromkeys(cases) if case not in headline])


def linear(stage: Stage) -> None:
    """Cases from hidden states, with N=8192 and D=4096."""
    sized: dict[str, Any] = {"rows": ROWS, "vocabulary": MAIN, "size": 4096}
    ours = [LINEAR, *(f"hybrid_kernels, chunks of {rows}" for rows in (1024, 2048, 4096))]
    first = ["four GEMMs alone", *ours, "TRL 1.16, divergence + log-prob"]
    others = [name for name in LINEAR_PROVIDERS if name not in first]
    stage.cases(
        [
            Case(name, **sized)
            if "reverse_kl" in LINEAR_PROVIDERS[name].divergences
            else Case(name, divergence="forward_kl", **sized)
            for name in (*first, *others)
        ]
    )


def hanging(stage: Stage) -> None:
    for name, check in hangs.CHECKS.items():
        stage.attempt({"hang": name}, lambda check=check: {"right": check(stage.device)})


def sanitize(stage: Stage, tool: str) -> None:
    """Runs compute-sanitizer on small problems; its racecheck would see shared memory only."""
    if stage.dry:
        memory_check.main(stage.device)
        stage.write({"tool": tool, "status": None})
        return
    # Torch's allocator cuts tensors out of larger blocks, which would hide writes out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--error-exitcode=9", f"--tool={tool}"]
    command += [sys.executable, "-m", "bench.memory_check", stage.device]
    try:
        status: Any = subprocess.run(command, env=environment).returncode
    except FileNotFoundError:
        status = "compute-sanitizer is missing on this machine"
    stage.write({"tool": tool, "status": status})
    if status:
        sys.exit(f"{tool}: {status}")


def smoke(stage: Stage) -> None:
    """Runs the tests marked `smoke` on the Triton kernels, in several processes.

    A dry run runs them in this process, which has the stand-in for a GPU.
    """
    files = sorted((ROOT / "tests").glob("test_*.py"))
    options = [str(path) for path in files if "mark.smoke" in path.read_text()]
    options += ["--all", "-p", "no:cacheprovider", "-m", "gpu and smoke", "-k", "not torch-cuda"]
    if stage.dry:
        status = int(importlib.import_module("pytest").main([*options, "-q", "--backend", "meta"]))
    else:
        # The time limit needs a thread, because no signal interrupts a wait for the device.
        options += ["-v", "-n", "8", "--dist", "worksteal"]
        options += ["--timeout=30", "--timeout-method=thread"]
        status = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode
    stage.write({"pytest_status": status})
    if status:
        sys.exit(f"pytest: {status}")


FUNCTIONS: dict[str, Callable[[Stage], None]] = {
    "setup": setup,
    "ceilings": ceilings,
    "meeting": meeting_alone,
    "right": right,
    "headline": headline,
    "tuning": tuning,
    "profile": profile,
    "peers": peers,
    "matrix": matrix,
    "linear": linear,
    "hangs": hanging,
    "memcheck": partial(sanitize, tool="memcheck"),
    "synccheck": partial(sanitize, tool="synccheck"),
    "smoke": smoke,
}


@contextlib.contextmanager
def counted_compilations(stage: Stage) -> Iterator[None]:
    """Counts kernels found in Triton's cache, and writes a row for each that was compiled."""
    counts = {"hits": 0, "misses": 0}

    def listener(*, src, cache_hit: bool, **_: Any) -> None:
        counts["hits" if cache_hit else "misses"] += 1
        if not cache_hit:
            stage.write({"compiled": src.name})

    try:
        with mock.patch.object(knobs.compilation, "listener", listener):
            yield
    finally:
        if any(counts.values()):
            stage.write({"cache": counts})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.stages", description=__doc__)
    parser.add_argument("name", choices=tuple(FUNCTIONS))
    parser.add_argument("results", type=Path)
    parser.add_argument("--until", type=float, default=math.inf, help="when to end, in Unix time")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile what a dry run launches")
    parser.add_argument("--sweeping", action="store_true", help="no programs that wait")
    options = parser.parse_args()
    device = "meta" if options.dry_run else "cuda"
    stage = Stage(options.name, options.results, options.until, device, options.sweeping)
    with contextlib.ExitStack() as stack:
        if options.dry_run:
            stack.enter_context(standin.gpu("sm_90", compiles=options.compile))
        if options.compile:
            stack.enter_context(prebuild.recorded_keys())
        if options.sweeping:
            stack.enter_context(mock.patch.object(plan, "resident", return_value=None))
        stack.enter_context(counted_compilations(stage))
        FUNCTIONS[options.name](stage)


if __name__ == "__main__":
    main()
