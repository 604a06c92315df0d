"""`python -m bench gpu [FOLDER]`: runs all stages in turn, with results in FOLDER/<device>.

A GPU is often borrowed for minutes, so a failure must not cost more than its own stage. Each stage
is a process group with a time limit, and appends its results to `results-<id>.jsonl` line by line.
If a stage hangs, dies or writes nothing, that is recorded there, and the next one starts. After a
hang, kernels whose programs wait for each other are not run any more. The run has a time limit,
too, and ends early enough to print the tables.

It needs only torch and Triton. Two folders are used if they exist: `prebuilt/` with kernels from
`python -m bench prebuild`, and `peers/` with wheels of the packages to compare with.
"""

import argparse
import contextlib
import hashlib
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
# Seconds for the whole run, between the two signals that end a stage, and to print the tables.
CLOCK, GRACE, LAST = 540, 5, 8
# Parts of the messages of errors after which a process can't use its device any more.
LOST = ("CUDA error", "[CUDA]")
# Where programs wait for each other, so many seconds without a result count as a hang.
SILENCE = 15
# Seconds in which a GPU must answer.
HEALTH = 20
# The file in the folder of prebuilt kernels that says what they were made from.
ABOUT = "kernels.json"
# How much of the end of a stage's output is kept.
LOG_BYTES = 2**20


class Stage(NamedTuple):
    """A part of the run.

    Attributes:
        name: a key of `stages.FUNCTIONS`.
        seconds: its time limit.
        after_a_hang: whether it is useful without programs that wait for each other.
        command: what to run in place of the function of that name.
    """

    name: str
    seconds: float
    after_a_hang: bool = True
    command: tuple[str, ...] = ()


# GPU.md says what they decide. Their limits add up to more than the run's, as most end early.
STAGES = (
    Stage("setup", 45),
    Stage("ceilings", 20),
    Stage("meeting", 20, False),
    Stage("right", 45),
    Stage("headline", 30),
    Stage("tuning", 60, False),
    Stage("profile", 40, False),
    Stage("peers", 80),
    Stage("matrix", 60),
    Stage("linear", 75),
    Stage("hangs", 40, False),
    Stage("memcheck", 40, False),
    Stage("synccheck", 30, False),
    Stage("smoke", 90, False),
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
    parser.add_argument("--seconds", type=float, default=CLOCK, help=f"limit of the run ({CLOCK})")
    parser.add_argument("--stage-seconds", type=float, help="limit of each stage")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / "prebuilt", help="packed kernels")
    parser.add_argument("--peers", type=Path, default=ROOT / "peers", help="wheels")
    parser.add_argument("--dry-run", action="store_true", help="run without a GPU")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",") if options.stages else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--stages: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    device = "dry-run" if options.dry_run else device_name()
    if device is None:
        print("python -m bench gpu: there is no GPU; --dry-run runs the stages without one")
        return 2
    stages = [stage for stage in STAGES if stage.name in ("setup", *chosen)]
    if options.stage_seconds:
        stages = [stage._replace(seconds=options.stage_seconds) for stage in stages]
    run = Run(options.folder.resolve() / slug(device), options.seconds, options.dry_run)
    run.environment |= {
        "BENCH_PREBUILT": str(options.prebuilt.resolve()),
        "BENCH_PEERS": str(options.peers.resolve()),
    }
    about = {"device": device, "commit": commit(options.prebuilt), "id": run.id}
    run.write({**about, **summary.versions()})
    return run.all(stages)


def slug(device: str) -> str:
    """The name of a device's folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def device_name() -> str | None:
    """The name of the GPU by nvidia-smi or torch; None without a GPU."""
    smi = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    name = smi or output(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())")
    return name.splitlines()[0].strip() if name else None


def output(*command: str) -> str:
    """What a command prints; empty if it is missing, fails or does not end."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def commit(prebuilt: Path) -> str:
    """The commit of the sources.

    It is `HYBRID_KERNELS_COMMIT` if that is set. Else it is the commit of the prebuilt kernels if
    their sources are the same, as a copy of the checkout may lack git's history. Else git knows it.
    """
    if given := os.environ.get("HYBRID_KERNELS_COMMIT"):
        return given
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((prebuilt / ABOUT).read_text())
        if about["sources"] == sources():
            return about["commit"]
    head = output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    return head + ("-dirty" if changed else "") if head else "unknown"


def sources() -> str:
    """A digest of all sources that determine which kernels are compiled."""
    files = [*(ROOT / "hybrid_kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    parts = (str(path.relative_to(ROOT)).encode() + path.read_bytes() for path in sorted(files))
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Run:
    """One run of some stages, and the files that it leaves."""

    def __init__(self, folder: Path, seconds: float, dry: bool = False) -> None:
        self.begin, self.seconds, self.dry = time.monotonic(), seconds, dry
        self.id = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results = folder / f"results-{self.id}.jsonl"
        self.log = folder / f"log-{self.id}.txt"
        self.sweeps = False  # whether a hang has made it avoid programs that wait
        self.answers = True  # whether the GPU still does
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True)
        # The kernel cache starts empty, and the only tuning file is from the stage `tuning`.
        self.environment = {
            "TRITON_CACHE_DIR": f"{self.scratch.name}/triton",
            "HYBRID_KERNELS_TUNING": f"{self.scratch.name}/none.json",
            "BENCH_SITE": f"{self.scratch.name}/site",
            "BENCH_TUNING": str(folder / "tuning.json"),
            "PYTHONPATH": f"{self.scratch.name}/site:{os.environ.get('PYTHONPATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }

    def all(self, stages: list[Stage]) -> int:
        """Runs stages; returns the exit status, which is 1 if one of them failed."""
        endings = [self.stage(stage) for stage in stages]
        try:
            print(report.render(self.folder), flush=True)
        except Exception:  # the results file is complete without the report
            traceback.print_exc()
        self.scratch.cleanup()
        return int(not all(endings))

    def passed(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Seconds left for stages, including those to end one."""
        return self.seconds - self.passed() - LAST

    def write(self, row: dict[str, Any]) -> None:
        row = {"stage": "run", "at": round(self.passed(), 1), **row}
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def stage(self, stage: Stage) -> bool:
        """Runs a stage unless there is a reason not to; returns whether it succeeded."""
        reason = None
        if self.left() < GRACE + 3:
            reason = "the run's time was up"
        elif not self.answers:
            reason = "the GPU no longer answers"
        elif self.sweeps and not stage.after_a_hang:
            reason = "programs that wait have hung"
        if reason:
            self.write({"stage": stage.name, "outcome": f"not begun: {reason}"})
            print(f"{stage.name:10} not begun: {reason}", flush=True)
            return False
        begin, lines = self.passed(), len(self.rows())
        seconds = min(stage.seconds, self.left() - GRACE)
        log = Path(self.scratch.name, f"{stage.name}.log")
        ending, silence = self.execute(self.command(stage, seconds), seconds, log)
        ok = ending == "ok"
        if ok and len(self.rows()) == lines:
            ok, ending = False, "said nothing"
        self.keep(stage.name, log)
        passed = self.passed() - begin
        row = {"stage": stage.name, "outcome": ending, "seconds": round(passed, 1)}
        print(f"{stage.name:10} {ending:32} {passed:5.0f} s of {seconds:.0f}", flush=True)
        hung = not ok and self.hung(silence)
        if hung or "cut off" in ending:
            self.sweeps |= hung
            self.answers = self.health()
            row |= {"hung": hung, "health": self.answers}
        self.write(row)
        return ok

    def hung(self, silence: float) -> bool:
        """Whether programs that wait for each other have hung.

        They have if the stage's last row announces them and no row follows, or if they lost the
        device: a wait that lasts for seconds ends itself with an error.
        """
        *before, last = [{}, {}, *report.heard(self.rows())]
        if "failed" in last:
            return bool(before[-1].get("waits")) and any(sign in last["failed"] for sign in LOST)
        return bool(last.get("waits")) and silence > SILENCE

    def command(self, stage: Stage, seconds: float) -> list[str]:
        if stage.command:
            return list(stage.command)
        flags = ["--dry-run"] * self.dry + ["--sweeping"] * self.sweeps
        command = [sys.executable, "-m", "bench.gpu.stages", stage.name, str(self.results)]
        # A stage that knows when to end starts no case that would be cut off.
        return [*command, f"--until={time.time() + seconds - 3:.1f}", *flags]

    def execute(self, command: list[str], seconds: float, log: Path) -> tuple[str, float]:
        """Runs a command with a time limit.

        Returns how it ended, "ok" or a description, and for how many seconds it had written no
        results then.
        """
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                # A shell ignores SIGINT in its background jobs, and stages would inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            status = self.wait(process, seconds)
            silence = time.time() - self.results.stat().st_mtime
            if status is None:
                end_group(process, signal.SIGINT)
            # Children may survive their stage, and one with a hanging kernel would keep the GPU.
            end_group(process, signal.SIGKILL)
        if status is None:
            return f"cut off after {seconds:.0f} s", silence
        if status < 0:
            return f"died of {signal.Signals(-status).name}", silence
        return ("ok" if status == 0 else f"failed with status {status}"), silence

    def wait(self, process: subprocess.Popen, seconds: float) -> int | None:
        """A process's exit status; None if it has not ended after so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)

    def health(self) -> bool:
        """Whether the GPU still works in a new process."""
        seconds = min(HEALTH, self.left() - GRACE)
        if self.dry or seconds < 3:
            return True
        probe = "import torch; assert int(torch.ones(8, device='cuda').sum()) == 8"
        log = Path(self.scratch.name, "health.log")
        return self.execute([sys.executable, "-c", probe], seconds, log)[0] == "ok"

    def rows(self) -> list[dict[str, Any]]:
        return report.parse(self.results)

    def keep(self, name: str, log: Path) -> None:
        """Appends the end of a stage's output to the log."""
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        with self.log.open("a") as file:
            file.write(f"==== {name}\n{text}\n")


def end_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """Sends a signal to a process and all its children; waits for `GRACE` seconds at most."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, number)
        process.wait(GRACE)
