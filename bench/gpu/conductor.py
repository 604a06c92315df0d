"""`python -m bench gpu [FOLDER]`: all stages, one after another, into FOLDER/<device>.

A GPU is lent for minutes, so nothing may cost more than itself. Each stage is a process group with
a time limit, and appends what it finds to `results-<id>.jsonl`, a line at a time. If a stage hangs,
dies or says nothing, that is noted there, and the next one begins. After a hang the kernels whose
programs wait for each other are not used any more. The run's own clock ends it in time to print the
tables.

Nothing is needed but torch and Triton. Two folders are used where they are there: `prebuilt/`
(kernels, from `python -m bench prebuild`) and `peers/` (wheels of what to compare with).
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from bench import summary
from bench.gpu import report

ROOT = Path(__file__).parents[2]
# Seconds of the whole run; those between the signals that end a stage; those to print the tables.
CLOCK, GRACE, LAST = 540, 5, 8
# A stage that has said nothing for so long when its time is up hangs; it was not just slow.
SILENCE = 15
HEALTH = 20
# The newest part of a stage's output that is kept.
LOG_BYTES = 2**20


class Stage(NamedTuple):
    """What runs, for how many seconds at most, and the decision that it is for."""

    name: str
    seconds: float
    decides: str
    command: tuple[str, ...] = ()  # by default that of `stages.py`


STAGES = (
    Stage("setup", 45, "what is here; whether prebuilt kernels are found"),
    Stage("ceilings", 15, "what bandwidth is measured against"),
    Stage("meeting", 15, "whether programs may wait for each other, and what it costs"),
    Stage("right", 40, "which kernels are right"),
    Stage("headline", 25, "the figures that matter"),
    Stage("tuning", 40, "DEFAULT_TUNING; whether the lean prototype is worth building"),
    Stage("profile", 40, "what binds"),
    Stage("peers", 80, "the comparison"),
    Stage("matrix", 60, "vocabularies, divergences, rows"),
    Stage("linear", 60, "the budget of a chunk"),
    Stage("hangs", 40, "whether launches hang beside other work"),
    Stage("sanitizers", 40, "whether memory is used as it should be"),
    Stage("smoke", 90, "the tests that need a GPU"),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "bench" / "results")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", help=f"some of {','.join(names)} (setup always runs)")
    parser.add_argument("--seconds", type=float, default=CLOCK, help=f"of the run ({CLOCK})")
    parser.add_argument("--stage-seconds", type=float, help="of each stage, in place of its own")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / "prebuilt", help="packed kernels")
    parser.add_argument("--peers", type=Path, default=ROOT / "peers", help="wheels")
    parser.add_argument("--dry-run", action="store_true", help="walk the stages without a GPU")
    options = parser.parse_args(arguments)
    wanted = options.stages.split(",") if options.stages else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--stages: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    device = "dry-run" if options.dry_run else device_name()
    if device is None:
        print("python -m bench gpu: nvidia-smi sees no GPU; --dry-run walks the stages without one")
        return 2
    stages = [stage for stage in STAGES if stage.name in ("setup", *wanted)]
    if options.stage_seconds:
        stages = [stage._replace(seconds=options.stage_seconds) for stage in stages]
    run = Run(options.folder.resolve() / slug(device), options.seconds, options.dry_run)
    run.environment |= {
        "BENCH_PREBUILT": str(options.prebuilt.resolve()),
        "BENCH_PEERS": str(options.peers.resolve()),
    }
    run.write(
        {
            "device": device,
            "commit": commit(options.prebuilt),
            "id": run.id,
            **summary.versions(),
        }
    )
    return run.all(stages)


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_name() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return names.splitlines()[0].strip() if names.strip() else None


def commit(prebuilt: Path) -> str:
    """Of the sources. Where the checkout has no history, `HYBRID_KERNELS_COMMIT`, or that at which
    the kernels were prebuilt."""
    if given := os.environ.get("HYBRID_KERNELS_COMMIT"):
        return given

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    if head := git("rev-parse", "HEAD"):
        return head + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    noted = prebuilt / "commit"
    return noted.read_text().strip() if noted.exists() else "unknown"


class Run:
    """One run of some stages, and the files that it leaves."""

    def __init__(self, folder: Path, seconds: float, dry: bool = False) -> None:
        self.begin, self.seconds, self.dry = time.monotonic(), seconds, dry
        self.id = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results = folder / f"results-{self.id}.jsonl"
        self.log = folder / f"log-{self.id}.txt"
        self.sweeps = False  # from a hang on
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        # A kernel cache that starts empty, and no tuning file but what is found here.
        self.environment = {
            "TRITON_CACHE_DIR": f"{self.scratch.name}/triton",
            "HYBRID_KERNELS_TUNING": f"{self.scratch.name}/none.json",
            "BENCH_SITE": f"{self.scratch.name}/site",
            "BENCH_TUNING": str(folder / "tuning.json"),
            "PYTHONPATH": f"{self.scratch.name}/site:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }

    def all(self, stages: list[Stage]) -> int:
        """Runs them; the exit status is 1 if one did not end well."""
        outcomes = []
        for stage in stages:
            left = self.seconds - self.passed() - LAST
            if left < GRACE + 3:
                self.write({"stage": stage.name, "outcome": "not begun: the run's time was up"})
                outcomes.append(False)
                continue
            outcomes.append(self.stage(stage._replace(seconds=min(stage.seconds, left - GRACE))))
        try:
            print(report.render(self.folder), flush=True)
        except Exception:  # the findings are in the results all the same
            traceback.print_exc()
        self.scratch.cleanup()
        return int(not all(outcomes))

    def passed(self) -> float:
        return time.monotonic() - self.begin

    def write(self, row: dict[str, Any]) -> None:
        row = {"stage": "run", "at": round(self.passed(), 1), **row}
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def stage(self, stage: Stage) -> bool:
        """Runs one; whether it ended well."""
        begin, lines = self.passed(), self.lines()
        output = Path(self.scratch.name, f"{stage.name}.log")
        ending = self.execute(self.command(stage), stage.seconds, output)
        seconds = self.passed() - begin
        ok = ending == "ok"
        if ok and self.lines() == lines:
            ok, ending = False, "said nothing"
        self.keep(stage.name, output)
        row = {"stage": stage.name, "outcome": ending, "seconds": round(seconds, 1)}
        print(f"{stage.name:10} {ending:32} {seconds:5.0f} s of {stage.seconds:.0f}", flush=True)
        if "cut off" in ending:
            hung = time.time() - self.results.stat().st_mtime > min(SILENCE, stage.seconds / 2)
            self.sweeps |= hung
            row |= {"hung": hung, "health": self.health()}
        self.write(row)
        return ok

    def command(self, stage: Stage) -> list[str]:
        if stage.command:
            return list(stage.command)
        flags = ["--dry-run"] * self.dry + ["--sweeping"] * self.sweeps
        own = [sys.executable, "-m", "bench.gpu.stages", stage.name, str(self.results)]
        # (A stage that knows when to end is not cut off in the middle of a case.)
        return [*own, f"--until={time.time() + stage.seconds - 3:.1f}", *flags]

    def execute(self, command: list[str], seconds: float, output: Path) -> str:
        """Runs a command for so long at most; how it ended, which is "ok" or says more."""
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                end_group(process, signal.SIGINT)
                status = None
            # Whatever the stage has started: a kernel that hangs must not keep the GPU.
            end_group(process, signal.SIGKILL)
        if status is None:
            return f"cut off after {seconds:.0f} s"
        if status < 0:
            return f"died of {signal.Signals(-status).name}"
        return "ok" if status == 0 else f"failed with status {status}"

    def health(self) -> bool:
        """Whether the GPU still answers, from a process of its own."""
        if self.dry:
            return True
        probe = "import torch; assert int(torch.ones(8, device='cuda').sum()) == 8"
        output = Path(self.scratch.name, "health.log")
        return self.execute([sys.executable, "-c", probe], HEALTH, output) == "ok"

    def lines(self) -> int:
        with self.results.open() as file:
            return sum(1 for _ in file)

    def keep(self, name: str, output: Path) -> None:
        """Appends the end of a stage's output to the log, as soon as there is one."""
        text = output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        with self.log.open("a") as file:
            file.write(f"==== {name}\n{text}\n")


def end_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to a process and all that it has started; waits a while for the first."""
    try:
        os.killpg(process.pid, number)
        process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
