"""The stages for a GPU, on a machine without one: failures, dry runs, prebuilt kernels."""

import contextlib
import gc
import json
import math
import os
import runpy
import signal
import sys
import time
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from bench import standin
from bench.gpu import checks, conductor, meeting, prebuild, profiler, report, stages
from bench.gpu.conductor import Run, Stage
from hybrid_kernels import hybrid_loss, timing
from hybrid_kernels.triton_backend import plan

pytestmark = pytest.mark.skipif(plan.INTERPRETED, reason="compiles, or walks through launches")


def rows_of(folder):
    (path,) = folder.glob("results-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcomes(folder):
    return {row["stage"]: row["outcome"] for row in rows_of(folder) if "outcome" in row}


# -- the conductor ---------------------------------------------------------------------------------


class Simulated(Run):
    """A run whose clock jumps to the end of a stage that creates the file `asleep`.

    So no outcome depends on the speed of the machine.
    """

    now = 0.0
    silent = True  # whether a stage that sleeps writes nothing

    @property
    def asleep(self):
        return self.folder / "asleep"

    def passed(self):
        return self.now

    def wait(self, process, seconds):
        while not self.asleep.exists():
            if process.poll() is not None:
                return process.returncode
            time.sleep(0.01)
        self.asleep.unlink()
        self.now += seconds
        if self.silent:
            past = time.time() - seconds
            os.utime(self.results, (past, past))


def says(run, **row):
    """Python that appends a row to the results."""
    return f"open({str(run.results)!r}, 'a').write({json.dumps(row)!r} + chr(10));"


def sleeps(run):
    return f"import time; open({str(run.asleep)!r}, 'w'); time.sleep(1000)"


def python(name, code, seconds=20.0):
    return Stage(name, seconds, command=(sys.executable, "-c", code))


def stage(run, name, code, seconds=20.0):
    """A stage that writes a row, then runs some Python."""
    return python(name, says(run, stage=name, case=name) + code, seconds)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(conductor, "GRACE", 0.1)
    simulated = Simulated(tmp_path / "a-gpu", seconds=60, dry=True)
    simulated.write({"device": "A GPU", "commit": "0123456789ab", "torch": "2", "triton": "3"})
    return simulated


@pytest.fixture
def in_the_background():
    """Ignores interrupts, as processes in a shell's background do."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_stage_costs_only_itself(run, tmp_path, capsys):
    """One hangs together with its child, one dies, one fails, one writes nothing."""
    pipe, survived = tmp_path / "pipe", tmp_path / "survived"
    os.mkfifo(pipe)
    ignores = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    child = f"{ignores} import os; end = os.open({str(pipe)!r}, os.O_RDWR);"
    child += f"open({str(run.asleep)!r}, 'w'); os.read(end, 1); open({str(survived)!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    parent += "time.sleep(1000)"
    silent = python("silent", "print('only to the terminal')")
    status = run.all(
        [
            stage(run, "first", "pass"),
            stage(run, "hangs", parent, seconds=2.0),
            stage(run, "stubborn", ignores + sleeps(run), seconds=2.0),
            stage(run, "dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
            stage(run, "fails", "raise SystemExit(3)"),
            silent,
            stage(run, "last", "print('a line for the log')"),
        ]
    )
    assert status == 1
    assert outcomes(run.folder) == {
        "first": "ok",
        "hangs": "cut off after 2 s",
        "stubborn": "cut off after 2 s",
        "dies": "died of SIGSEGV",
        "fails": "failed with status 3",
        "silent": "said nothing",
        "last": "ok",
    }
    said = {row["case"] for row in rows_of(run.folder) if "case" in row}
    assert said == {"first", "hangs", "stubborn", "dies", "fails", "last"}
    # A child that is alive would read from the pipe and create the file `survived`. A killed one
    # may keep the pipe open for a moment.
    with contextlib.suppress(OSError):
        while True:
            end = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(end, b"?")
            os.close(end)
    assert not survived.exists()
    log = run.log.read_text()
    assert "a line for the log" in log
    assert "only to the terminal" in log
    assert (
        capsys.readouterr().out.rstrip().endswith((run.folder / "report.md").read_text().rstrip())
    )
    assert len(list(run.folder.iterdir())) <= 8


def test_the_clock_cuts_off_what_goes_on(tmp_path):
    run = Run(tmp_path, seconds=60, dry=True)
    run.write({})
    code = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert run.execute(code, 0.1, tmp_path / "log")[0] == "cut off after 0 s"
    assert run.passed() > 0.1
    assert run.execute([sys.executable, "-c", ""], 1e6, tmp_path / "log")[0] == "ok"


@pytest.mark.parametrize("begun", [True, False])
def test_after_a_hang_nothing_waits_for_siblings(run, begun):
    """Silence is a hang if programs may wait for each other; otherwise the stage is slow."""
    real, later = Stage("headline", 20.0), python("later", "raise SystemExit(1)")
    row = {"begun": "a kernel", "waits": True} if begun else {"begun": "a peer", "waits": False}
    after = {"stage": "hangs", "compiled": "a kernel"}
    run.all(
        [
            python("hangs", says(run, stage="hangs", **row) + says(run, **after) + sleeps(run)),
            later._replace(after_a_hang=False),
        ]
    )
    assert ("--sweeping" in run.command(real, 20)) == begun
    ending = "not begun: programs that wait have hung" if begun else "failed with status 1"
    assert outcomes(run.folder) == {"hangs": "cut off after 20 s", "later": ending}
    ended = next(row for row in rows_of(run.folder) if "hung" in row)
    assert (ended["hung"], ended["health"]) == (begun, True)
    assert f"- {row['begun']}: begun, never ended" in (run.folder / "report.md").read_text()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("error", ["CUDA error: unspecified launch failure", "ValueError()"])
def test_a_wait_that_ended_itself_is_a_hang(run, error, waits):
    row = {"stage": "traps", "case": "a kernel"}
    said = says(run, begun="a kernel", waits=waits) + says(run, **row, failed=error)
    run.stage(python("traps", said + "raise SystemExit(1)"))
    hung = waits and "CUDA" in error
    assert run.sweeps == hung
    assert outcomes(run.folder) == {"traps": "failed with status 1"}
    assert [row["health"] for row in rows_of(run.folder) if "health" in row] == [True] * hung


def test_what_goes_on_is_no_hang(run, monkeypatch, in_the_background):
    """A stage may write a last row when it is cut off, also in a shell's background."""
    for name in ("SILENCE", "GRACE"):
        monkeypatch.setattr(conductor, name, 1e6)
    run.seconds, run.silent = math.inf, False
    row = says(run, stage="slow", begun="another", waits=True)
    run.stage(python("slow", f"try: {row} {sleeps(run)}\nexcept KeyboardInterrupt: {row}", 2e6))
    assert outcomes(run.folder) == {"slow": "cut off after 2000000 s"}
    assert len([row for row in rows_of(run.folder) if "begun" in row]) == 2
    assert not run.sweeps


def test_a_gpu_that_no_longer_answers_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(run, "health", lambda: False)
    run.all([stage(run, "hangs", sleeps(run)), stage(run, "later", "pass")])
    assert outcomes(run.folder)["later"] == "not begun: the GPU no longer answers"


def test_the_clock_stops_the_run(run):
    long = [stage(run, name, sleeps(run), 500) for name in ("one", "two")]
    run.seconds = conductor.LAST + conductor.GRACE + 6
    run.all([*long, stage(run, "three", "pass")])
    late = "not begun: the run's time was up"
    assert outcomes(run.folder) == {"one": "cut off after 6 s", "two": late, "three": late}
    assert (run.folder / "report.md").exists()


def test_every_stage_has_a_function_and_the_times_fit():
    assert list(stages.FUNCTIONS) == [stage.name for stage in conductor.STAGES]
    # A stage that ends early leaves its seconds to the others.
    assert sum(stage.seconds for stage in conductor.STAGES) < 1.3 * conductor.CLOCK


def test_the_script_in_a_dry_run(tmp_path, monkeypatch, capsys):
    command = ["bench", "gpu", str(tmp_path), "--dry-run", "--stages=setup"]
    command += [f"--prebuilt={tmp_path}", "--stage-seconds=1e6", "--seconds=1e9"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("bench", run_name="__main__")
    assert end.value.code == 0
    folder = tmp_path / "dry-run"
    assert outcomes(folder) == {"setup": "ok"}
    assert capsys.readouterr().out.rstrip().endswith((folder / "report.md").read_text().rstrip())


def test_the_stages_that_are_asked_for_come_after_the_setup(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Run, "all", lambda run, stages: begun.extend(stages))
    conductor.main([str(tmp_path), "--dry-run", "--stages=hangs,right", "--stage-seconds=7"])
    assert [(stage.name, stage.seconds) for stage in begun] == [
        ("setup", 7.0),
        ("right", 7.0),
        ("hangs", 7.0),
    ]


@pytest.fixture
def on_meta(tmp_path):
    gc.freeze()  # each case calls gc.collect(), which is slow if it visits all modules
    with standin.gpu(compiles=False) as driver:
        yield stages.Stage("here", tmp_path / "results-1.jsonl", math.inf, "meta"), driver
    gc.unfreeze()


class OneOfEach:
    """A plugin of pytest that runs one combination of each test's arguments."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = {item.nodeid.partition("[")[0]: item for item in items}.values()


@pytest.fixture
def shortened(request, monkeypatch):
    """Without `--all`, runs each smoke test once, and each tuning on one case."""
    if not request.config.getoption("--all"):
        monkeypatch.setattr(pytest, "main", partial(pytest.main, plugins=[OneOfEach()]))
        once = SimpleNamespace(product=lambda tunings, cases: zip(tunings, cycle(cases)))
        monkeypatch.setattr(stages, "itertools", once)


@pytest.mark.parametrize("name", stages.FUNCTIONS)
def test_every_stage_walks_through_its_problems(name, on_meta, shortened, monkeypatch, tmp_path):
    """No result looks as if it had been measured."""
    stage, driver = on_meta
    for variable in ("BENCH_PREBUILT", "BENCH_PEERS"):
        monkeypatch.setenv(variable, str(tmp_path))
    stages.FUNCTIONS[name](stage)
    rows = [json.loads(line) for line in stage.results.read_text().splitlines()]
    assert rows
    assert not [row for row in rows if row.get("median_ms") or row.get("us") or row.get("right")]
    assert {row["failed"] for row in rows if "failed" in row} <= {"a dry run has no peers"}
    assert driver.launches or name in ("setup", "ceilings")


def test_a_machine_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conductor, "device_name", lambda: None)
    assert conductor.main([str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        conductor.main([str(tmp_path), "--stages=headlines"])
    assert "headlines; there are setup" in capsys.readouterr().err


def test_a_device_keeps_its_own_name():
    assert conductor.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert conductor.slug("NVIDIA H200") == "nvidia-h200"


# -- what stages do --------------------------------------------------------------------------------


def test_a_case_that_fails_costs_only_itself(on_meta, monkeypatch):
    stage, _ = on_meta

    def measure(case, device):
        if case.vocabulary == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if case.vocabulary == 2:
            raise RuntimeError("out of memory")
        return {"median_ms": 1.0}

    monkeypatch.setattr(stages.measure, "measure", measure)
    cases = [stages.Case("hybrid_kernels", 8, size) for size in (2, 3)]
    stage.cases(cases)
    lost = stages.Case("hybrid_kernels", 8, 1)
    with pytest.raises(RuntimeError, match="illegal"):
        stage.cases([lost, *cases])
    rows = [json.loads(line) for line in stage.results.read_text().splitlines()]
    heard = ["begun" if "begun" in row else "failed" in row for row in rows]
    assert heard == ["begun", True, "begun", False, "begun", True]


def test_a_stage_begins_nothing_when_its_time_is_up(on_meta):
    stage, driver = on_meta
    stage.until = 0
    for name in ("headline", "right", "tuning", "hangs", "meeting"):
        stages.FUNCTIONS[name](stage)
    assert driver.launches == 0
    rows = [json.loads(line) for line in stage.results.read_text().splitlines()]
    assert {row.get("failed") for row in rows} == {"not begun: out of time"}


def test_what_sweeps_says_so(tmp_path):
    stage = stages.Stage("here", tmp_path / "results-1.jsonl", math.inf, "meta", sweeps=True)
    with standin.gpu(compiles=False):
        stage.cases([stages.Case("hybrid_kernels", 8, 64)])
    first, row = (json.loads(line) for line in stage.results.read_text().splitlines())
    assert first["waits"] is False
    assert row["case"].endswith(", sweeping")
    assert row["inputs"] == "sweeping form"


SMALL = [c._replace(vocabulary=min(c.vocabulary, 700), rows=min(c.rows, 30)) for c in checks.CHECKS]


@pytest.mark.parametrize("check", dict.fromkeys(SMALL), ids=str)
def test_checks_pass_where_the_kernels_are_right(check):
    """The torch backend replaces the kernels."""
    row = checks.run(check, "cpu")
    assert row["right"] is True, row


@pytest.mark.parametrize("what", ["gradient", "value", "last row"])
def test_checks_see_what_is_wrong(what, monkeypatch):
    def broken(student, *arguments, **options):
        result = hybrid_loss(student, *arguments, **options)
        if what == "value":
            return result._replace(divergence=result.divergence * 1.01)
        factor = torch.ones(len(student), 1, dtype=student.dtype)
        factor[-1 if what == "last row" else slice(None)] = 1.3
        student.register_hook(lambda gradient: gradient * factor)
        return result

    monkeypatch.setattr(checks.hybrid_kernels, "hybrid_loss", broken)
    row = checks.run(checks.Check("hybrid", "jsd", torch.bfloat16, 300, 30), "cpu")
    assert row["right"] is False


def test_the_profilers_table_is_read():
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected",
        head,
        '"0","1","resident_kernel(int)","gpu__time_duration.sum","ns","1,234,567"',
        '"0","1","resident_kernel(int)","launch__registers_per_thread","register","255"',
        '"0","1","resident_kernel(int)","smsp__issue_active.avg.pct_of_peak_sustained_active","%","n/a"',
        "==PROF== Disconnected",
        '"1","1","sweep_kernel","gpu__time_duration.sum","ns","1,000"',
    ]
    assert profiler.parse("\n".join(lines)) == [
        {"profiled": "resident_kernel(int)", "ns": 1234567.0, "registers": 255.0},
        {"profiled": "sweep_kernel", "ns": 1000.0},
    ]
    assert profiler.parse("==ERROR== no permission") == []


def test_the_report_shows_one_commit_and_nothing_wrong(tmp_path):
    def write(name, commit, *rows):
        first = {"stage": "run", "device": "A GPU", "commit": commit, "torch": "2", "triton": "3"}
        text = "".join(json.dumps(row) + "\n" for row in (first, *rows))
        (tmp_path / name).write_text(text + '{"stage": "headline", "ca')  # cut off

    def case(provider, ms, error=None, **other):
        op = {"copy": "copy", "add": "add"}.get(provider, "hybrid_loss")
        problem = {"n": 8192, "v": 151936, "d": None, "dtype": "bfloat16", "inputs": ""}
        problem |= {"divergence": "reverse_kl", "floor_bytes": 2 if op == "copy" else 3}
        times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "peak_mib": 1.0}
        row = {"stage": "headline", "case": provider, "provider": provider, "op": op}
        return {**row, **problem, **times, "grad_error": error, **other}

    write("results-1.jsonl", "old", case("hybrid_kernels", 77.0, 1e-3))
    write("results-2.jsonl", "new", case("copy", 2.0), case("add", 4.0), case("ours", 9.0, 1e-3))
    wrong = {"stage": "right", "check": "a check", "right": False, "gradient": 0.5, "values": 0.0}
    later = {"stage": "right", "check": "a check", "failed": "not begun: out of time"}
    write(
        "results-3.jsonl",
        "new",
        case("ours", 5.0, 1e-3, host_ahead=0.9),
        case("liger", 1.0, float("nan")),
        wrong,
        later,
        {"stage": "tuning", "tuning": "bad", "failed": "gradient error 1e+00"},
        {"stage": "tuning", "tuning": "good", "of": "a problem", "median_ms": 5, "floor_bytes": 3},
        {"stage": "profile", "profiled": None},
        {"stage": "hangs", "begun": "two streams", "waits": True},
        {"stage": "headline", "outcome": "cut off after 2 s", "hung": True, "seconds": 2},
    )
    text = report.render(tmp_path)
    assert "| ours | 5 | 5-5 |  | 60% | 80% | 1 |  | 1e-03 |" in text
    assert "77" not in text
    assert "| liger |" not in text
    assert "- liger (8192, 151936, bfloat16, reverse_kl): gradient error nan, no result" in text
    assert "Against float64: 0 of 1 right.\n- WRONG: a check: gradient 5.0e-01" in text
    assert "- bad: gradient error 1e+00" in text
    assert "failed: " not in text
    assert "- two streams: begun, never ended" in text
    assert "cut off after 2 s, hung" in text
    assert "- the host was late, in this share of the samples: ours (10%)" in text
    assert (
        "Tunings, a problem\n\n| | median ms | of add |\n|---|---|---|\n| good | 5 | 80% |" in text
    )


@pytest.mark.parametrize("late", [False, True])
def test_times_say_whether_the_host_was_ahead(late, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return late

        def elapsed_time(self, end):
            return 2.0

    flushed = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.torch, "zeros", lambda *_, **__: flushed)
    calls = []
    times = timing.device_times(lambda: calls.append(1), samples=4, warmups=2)
    assert len(calls) == 6
    assert times == ([2.0] * 4, 0.0 if late else 1.0)


# -- prebuilt kernels ------------------------------------------------------------------------------


def test_prebuilt_kernels_are_found_by_another_build(tmp_path, monkeypatch):
    """Kernels that one build compiled are unpacked under the names that another looks for."""
    packed, other = tmp_path / "packed", tmp_path / "cache"
    assert prebuild.main([str(packed), "--stages=meeting", "--jobs=1"]) == 0
    assert (packed / prebuild.PACK).stat().st_size < 2**20
    monkeypatch.setattr(prebuild.cache, "triton_key", lambda: "another-build")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(other))
    assert prebuild.unpack(packed) == f"{len(meeting.SPLITS)} kernels, for another-build"
    monkeypatch.setattr(conductor, "output", lambda *command: "")  # no git
    about = json.loads((packed / conductor.ABOUT).read_text())
    assert conductor.commit(packed) == about["commit"]
    monkeypatch.setattr(conductor, "sources", lambda: "changed")
    assert conductor.commit(packed) == "unknown"
    assert "OTHER SOURCES" in prebuild.unpack(packed)
    meeting.meeting_kernel.device_caches.clear()
    stage = stages.Stage("meeting", tmp_path / "results.jsonl", math.inf, "meta")
    with standin.gpu(), stages.counted_compilations(stage):
        stages.meeting_alone(stage)
    rows = [json.loads(line) for line in stage.results.read_text().splitlines()]
    assert rows[-1]["cache"] == {"hits": len(meeting.SPLITS), "misses": 0}


def test_kernels_of_another_version_are_ignored(tmp_path):
    assert prebuild.unpack(tmp_path) == f"there is no {prebuild.PACK} in {tmp_path}"
    (tmp_path / prebuild.PACK).write_bytes(b"")
    (tmp_path / conductor.ABOUT).write_text(json.dumps({"triton": "1.0", "kernels": []}))
    assert prebuild.unpack(tmp_path).startswith("made with Triton 1.0, of no use to")
