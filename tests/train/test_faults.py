"""Whatever happens to a run, it loses only the steps since its last checkpoint, and says so.

Each test breaks a run in one way, goes on with the same command, and compares with a run to which
nothing happened.
"""

import asyncio
import errno
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from helpers import config, rows, run_options, write_prompts
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from train import checkpoint, files, report
from train.__main__ import main
from train.checkpoint import find_checkpoint
from train.config import UserError, make_config
from train.loop import train
from train.rewards import Scorer
from train.stop import StoppedError, sigterm

ROOT = Path(__file__).parents[2]
LAST = "step-000006"
GO_ON = "go on from it with resume_from_checkpoint=latest"


@pytest.fixture
def command(tmp_path):
    """A command line that starts or continues the run of the fixture `straight` in `tmp_path`."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(tmp_path, resume_from_checkpoint="latest")))
    return ["--config", str(file)]


@pytest.fixture
def unfinished(straight, tmp_path) -> Path:
    """A run that was killed between its last checkpoint and `final/`."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "final")
    return run


def assert_equal_runs(run, straight):
    for name in ("metrics", "eval", "samples"):
        assert rows(run, name) == rows(straight, name)
    weights, expected = (load_file(path / "final/model.safetensors") for path in (run, straight))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    partial = [path for path in run.rglob(".*") if path.name.startswith((".partial", ".replaced"))]
    assert not partial


def content(run: Path) -> dict[Path, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


# Damage.

KINDS = {
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "missing": None,
}


def damage(file: Path, kind: str) -> None:
    change = KINDS[kind]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_of_a_checkpoint_is_found(unfinished, tmp_path, kind):
    folder = unfinished / "checkpoints" / LAST
    (folder / "model/nested").mkdir()
    (folder / "model/nested/model-00002-of-00002.safetensors").write_bytes(b"a shard")
    files.write_manifest(folder)
    run = make_config(run_options(tmp_path, resume_from_checkpoint="latest"))
    named = make_config({**run.as_options(), "resume_from_checkpoint": str(folder)})
    assert find_checkpoint(run).step == find_checkpoint(named).step == 6
    saved = [path for path in folder.rglob("*") if path.is_file()]
    assert len(saved) == 9
    for file in saved:
        intact = file.read_bytes()
        damage(file, kind)
        found = find_checkpoint(run)
        assert found.step == 4, file
        ((damaged, reason),) = found.damaged.items()
        assert damaged == folder
        assert reason.startswith(("manifest.json", file.relative_to(folder).as_posix()))
        with pytest.raises(UserError, match=f"{LAST}' is damaged: .*; resume_from.*=latest goes"):
            find_checkpoint(named)
        file.write_bytes(intact)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"state.pt": 1}', "\0", "[[1, 2]]"])
def test_a_manifest_may_hold_anything(unfinished, tmp_path, text):
    (unfinished / "checkpoints" / LAST / "manifest.json").write_text(text)
    found = find_checkpoint(make_config(run_options(tmp_path, resume_from_checkpoint="latest")))
    assert list(found.damaged.values()) == ["manifest.json is no list of files"]


def test_a_run_goes_on_before_what_is_damaged(straight, unfinished, command, capsys):
    folder = unfinished / "checkpoints" / LAST
    for aside in (f"{LAST}.damaged", f"{LAST}.damaged-again"):
        damage(folder / "model/model.safetensors", "cut")
        damaged = {path.relative_to(folder): data for path, data in content(folder).items()}
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert (
            f"warning: '{folder}' is damaged: model/model.safetensors has 17152 bytes instead of "
            f"34304. It is now '{aside}', and the run goes on from 'step-000004': it repeats 2 "
            "more steps\n"
        ) in printed
        assert "dropped the records of 2 later steps" in printed
        assert_equal_runs(unfinished, straight)
        kept = unfinished / "checkpoints" / aside
        assert {path.relative_to(kept): data for path, data in content(kept).items()} == damaged
        shutil.rmtree(unfinished / "final")


def test_no_checkpoint_is_intact(unfinished, command, capsys):
    checkpoints = unfinished / "checkpoints"
    damage(checkpoints / LAST / "state.pt", "missing")
    shutil.rmtree(checkpoints / "step-000004")
    (checkpoints / "step-000004").mkdir()
    shutil.rmtree(checkpoints / "step-000002")
    (checkpoints / "step-000002").touch()
    before = content(unfinished)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: resume_from_checkpoint: '{checkpoints}/step-000006' is damaged: state.pt is "
        f"missing; '{checkpoints}/step-000004' is damaged: manifest.json is missing; "
        f"'{checkpoints}/step-000002' is damaged: manifest.json can't be read: Not a directory; no "
        "checkpoint is intact. To start again, choose another output_dir\n"
    )
    assert content(unfinished) == before


def test_a_damaged_checkpoint_of_another_run_is_refused(unfinished, tmp_path):
    folder = unfinished / "checkpoints" / LAST
    damage(folder / "state.pt", "cut")
    option = {"resume_from_checkpoint": str(folder), "output_dir": str(tmp_path / "new")}
    with pytest.raises(
        UserError, match=r"state.pt has .* bytes instead.*; name another checkpoint"
    ):
        train(make_config(run_options(tmp_path, **option)))


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(unfinished, command, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "_fingerprint", refuse)
    before = content(unfinished)
    assert main(command) == 1
    assert f"can't read or write '{unfinished}/checkpoints/{LAST}/" in capsys.readouterr().err
    assert content(unfinished) == before


def test_weights_without_an_intact_checkpoint_are_kept(straight, tmp_path, command, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    damage(run / "checkpoints" / LAST / "config.yaml", "empty")
    before = content(run)
    assert main(command) == 2
    assert (
        f"'{run}/final' is the end of a run whose last checkpoint is damaged ('{run}/checkpoints/"
        f"{LAST}' is damaged: config.yaml has 0 bytes instead of"
    ) in capsys.readouterr().err
    assert content(run) == before


@pytest.mark.parametrize("text", [b"", b"six\n", b"\xff\0"])
def test_a_damaged_identity_can_be_repaired(straight, unfinished, command, text, capsys):
    identity = unfinished / "run_id"
    expected = identity.read_text().strip()
    for file in (identity, unfinished / "metrics.jsonl", unfinished / "summary.json"):
        assert file.exists()
    identity.write_bytes(text)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"it is step 6 of the run {expected}, and '{identity}' holds " in error
    identity.write_text(expected)
    assert main(command) == 0
    assert_equal_runs(unfinished, straight)


@pytest.mark.parametrize("text", [b"", b"six\n", b"\xff\0"])
def test_files_that_are_not_needed_may_be_damaged(straight, tmp_path, command, text, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for name in ("summary.json", "config.yaml", ".lock"):
        (run / name).write_bytes(text)
    (run / "final/.steps").write_bytes(text)
    assert main(command) == 2
    assert "checkpoint is not known, because '.steps' in it holds no" in capsys.readouterr().err
    shutil.rmtree(run / "final")
    assert main(command) == 0
    assert_equal_runs(run, straight)
    with files.locked(run):
        (run / ".lock").write_bytes(text)
        assert main(command) == 2
    assert "is in use by" in capsys.readouterr().err


def test_missing_records_are_missed(unfinished, tmp_path, command, capsys):
    lines = (unfinished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff\0\n", *lines[3:5]]))
    (unfinished / "samples.jsonl").write_bytes(b"\0" * 9)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "warning: metrics.jsonl: dropped 1 lines that are no records" in printed
    assert "metrics.jsonl has no record of 2 of the 6 steps that are done" in printed
    assert [row["step"] for row in rows(unfinished)] == [1, 2, 4, 5]


# Crashes.


class Watch:
    """Calls a function whenever this process opens, moves or removes a file. Hooks can't be
    removed, so there is one for all tests."""

    def __init__(self):
        self.function = None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        function = self.function
        if function and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            self.function = None  # it opens files itself
            try:
                function(event, arguments)
            finally:
                self.function = function


WATCH = Watch()


def test_a_crash_at_any_moment(straight, tmp_path, command, monkeypatch):
    """What the folder holds at some moment is what a SIGKILL at that moment leaves."""
    run, moments, kept = tmp_path / "run", [], []
    monkeypatch.setattr(WATCH, "function", lambda *_: moments.append(run.exists()))
    assert main([*command, "save_steps=1"]) == 0
    monkeypatch.setattr(WATCH, "function", None)
    shutil.rmtree(run)
    chosen = random.Random(0).sample(range(moments.index(True), len(moments)), k=8)

    def keep(*_):
        if len(moments) in chosen:
            shutil.copytree(run, tmp_path / f"killed-{len(moments)}")
            kept.append(len(moments))
        moments.append(True)

    moments.clear()
    monkeypatch.setattr(WATCH, "function", keep)
    assert main([*command, "save_steps=1"]) == 0
    monkeypatch.setattr(WATCH, "function", None)
    assert sorted(kept) == sorted(chosen)
    for moment in kept:
        killed = tmp_path / f"killed-{moment}"
        assert main([*command, "save_steps=1", f"output_dir={killed}"]) == 0
        assert_equal_runs(killed, straight)


def run_until_killed(command, **environment):
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "train", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_process_that_is_killed(tmp_path, straight, command, capsys):
    killed = tmp_path / "run"
    # Call 1 is the evaluation before step 1, calls 2 to 11 are steps 1 to 5, and call 12 is the
    # evaluation after step 5. The run is killed at call 13, in step 6, and repeats step 5 when it
    # resumes from the checkpoint of step 4.
    run_until_killed(command, KILL_AT_CALL="13")
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(killed, "eval")] == [0, 5]
    assert {path.name for path in killed.glob("checkpoints/*")} == {"step-000002", "step-000004"}
    assert not (killed / "final").exists()
    # A kill can also leave an incomplete line and an incomplete checkpoint.
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    (killed / "checkpoints" / ".partial-step-000006").mkdir()
    assert main(command) == 0
    assert "resumed from" in capsys.readouterr().out
    assert_equal_runs(killed, straight)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments(straight, tmp_path, command, seed):
    command = [*command, "save_steps=1"]
    run_until_killed(command, KILL_AT_FILE=str(random.Random(seed).randrange(1, 300)))
    assert main(command) == 0
    assert_equal_runs(tmp_path / "run", straight)


# Signals.


def during(monkeypatch, call: int, function) -> None:
    """Calls a function during the scoring of this number, counted from 1."""
    score, calls = Scorer.score, []

    def scored(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            function()
        return score(*arguments, **options)

    monkeypatch.setattr(Scorer, "score", scored)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


# Scorings 1 and 2 are of the evaluation before the first step, and each step has two: 7 and 8 are
# of step 3. An evaluation follows step 5, with 11 and 12.
@pytest.mark.parametrize(("call", "step"), [(7, 3), (12, 5), (1, 1)])
def test_sigterm_saves_first(straight, tmp_path, command, call, step, monkeypatch, capsys):
    run, handler = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        during(patch, call, send(signal.SIGTERM))
        assert main(command) == 143
    assert capsys.readouterr().err.endswith(
        f"error: stopped by SIGTERM after step {step}\nThe last checkpoint is "
        f"'{run}/checkpoints/step-{step:06d}'; {GO_ON}\n"
    )
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main(command) == 0
    assert_equal_runs(run, straight)


def test_a_second_sigterm_stops_at_once(straight, tmp_path, command, monkeypatch):
    class Ended(BaseException):
        pass

    def end(*_):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with monkeypatch.context() as patch:
            during(patch, 8, lambda: [send(signal.SIGTERM)(), send(signal.SIGTERM)()])
            with pytest.raises(Ended):
                main(command)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)
    assert main(command) == 0
    assert_equal_runs(tmp_path / "run", straight)


def test_ctrl_c_stops_at_once(straight, tmp_path, command, monkeypatch, capsys):
    run, handler = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        during(patch, 3, send(signal.SIGINT))
        assert main(command) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err.endswith(
        "error: interrupted\nThere is no checkpoint yet: start again with "
        "resume_from_checkpoint=latest\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", lambda folder: send(signal.SIGINT)())
        assert main(command) == 130
    assert list((run / "checkpoints").iterdir()) == []
    with monkeypatch.context() as patch:
        during(patch, 8, send(signal.SIGINT))
        assert main(command) == 130
    error = capsys.readouterr().err
    assert f"The last checkpoint is '{run}/checkpoints/step-000002'; {GO_ON}\n" in error
    assert main(command) == 0
    assert_equal_runs(run, straight)


def test_a_run_in_another_thread_sets_no_handler(tmp_path):
    summaries = []
    run = config(tmp_path, max_steps=1)
    thread = threading.Thread(target=lambda: summaries.append(train(run)))
    thread.start()
    thread.join()
    assert summaries[0]["steps"] == 1


# Disks.


@contextmanager
def no_space(size: int):
    """Files end at `size` bytes, in every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system", "the file")


def rust_error(*_, **__):
    raise Exception("No space left on device (os error 28)")


def patch_from_step_4(patch, owner, name, replacement):
    """Replaces a function when the checkpoint of step 4 is saved."""
    save = checkpoint.save_checkpoint

    def save_checkpoint(config, step, *others):
        if step == 4:
            patch.setattr(owner, name, replacement)
        return save(config, step, *others)

    patch.setattr(checkpoint, "save_checkpoint", save_checkpoint)


def full_at(size):
    def begin(patch):
        def save_in_full(*arguments, save=checkpoint.save_checkpoint):
            with no_space(size if arguments[1] == 4 else resource.RLIM_INFINITY):
                return save(*arguments)

        patch.setattr(checkpoint, "save_checkpoint", save_in_full)

    return begin


def fill(log, name):
    log._files[name].close()
    log._files[name] = open("/dev/full", "a")  # noqa: SIM115


def full_records(patch):
    def append(log, name, row, append=report.RunLog._append):
        if row["step"] == 5:
            fill(log, name)
        append(log, name, row)

    patch.setattr(report.RunLog, "_append", append)


FULL = {
    "model": (full_at(30_000), "step-000004/model': File too large", 2),
    "state": (full_at(90_000), "step-000004/state.pt': File too large", 2),
    "tokenizer": (
        lambda patch: patch_from_step_4(
            patch, PreTrainedTokenizerBase, "save_pretrained", rust_error
        ),
        "step-000004/model': No space left on device",
        2,
    ),
    "records": (full_records, "No space left on device", 4),
    "final": (
        lambda patch: patch.setattr(checkpoint, "save_model", patched_final),
        "'the file': Read-only file system",
        6,
    ),
    "plots": (
        lambda patch: patch.setattr(report, "draw_plots", refuse),
        "'the file': Read-only file system",
        6,
    ),
    "read-only": (
        lambda patch: patch_from_step_4(patch, checkpoint.os, "fsync", refuse),
        "'the file': Read-only file system",
        2,
    ),
}


def patched_final(folder, *arguments, save=checkpoint.save_model):
    return refuse() if "final" in folder.name else save(folder, *arguments)


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_can_t_be_written(straight, tmp_path, command, what, monkeypatch, capsys):
    run, (begin, message, last) = tmp_path / "run", FULL[what]
    with monkeypatch.context() as patch:
        begin(patch)
        assert main(command) == 1
    error = capsys.readouterr().err
    assert f"error: can't read or write '{run}" in error or "write 'the file'" in error
    assert error.endswith(
        f"{message}\nThe last checkpoint is '{run}/checkpoints/step-{last:06d}'; {GO_ON}\n"
    )
    assert "Traceback" not in error
    folders = {f"step-{step:06d}" for step in range(2, last + 1, 2)}
    assert {path.name for path in (run / "checkpoints").iterdir()} == folders
    assert main(command) == 0
    assert_equal_runs(run, straight)


def test_memory_that_is_short(tmp_path, command, monkeypatch, capsys):
    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    during(monkeypatch, 7, short)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "error: out of memory: CUDA out of memory.\nLower per_device_train_batch_size" in said
    assert said.endswith(f"checkpoints/step-000002'; {GO_ON}\n")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, command, monkeypatch, capsys):
    def diverge(optimizer, *_, step=torch.optim.AdamW.step):
        step(optimizer)
        for group in optimizer.param_groups:
            group["params"][0].data[0] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    assert main([*command, "save_steps=1"]) == 1
    said = capsys.readouterr().err
    assert "error: step 1: its update made weights infinite or NaN, so they are not saved" in said
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    target = tmp_path / "thing"
    with files.atomic_directory(target) as folder:
        (folder / "x").write_text("old")

    def fail():
        with files.atomic_directory(target) as folder:
            (folder / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "x").read_text() == "old"
    with files.atomic_directory(target) as folder:
        (folder / "x").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (target / "x").read_text() == "new"


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_atomically", refuse)
    with pytest.raises(StoppedError, match=r"the file.*Read-only.*\nThere is no checkpoint yet"):
        train(config(tmp_path))


def test_a_checkpoint_is_on_disk_after_its_records(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    train(config(tmp_path, max_steps=1))
    expected = ["metrics.jsonl", "state.pt", "manifest.json", "model", ".partial-step-000001"]
    places = [synced.index(name) for name in expected]
    assert places[0] < min(places[1:])
    assert places[-1] == max(places)


def test_an_error_is_not_masked_by_closing(tmp_path, monkeypatch):
    def fail(log, *_):
        fill(log, "samples.jsonl")
        log._files["samples.jsonl"].write("not flushed")
        raise UserError("the first error")

    monkeypatch.setattr(report.RunLog, "step", fail)
    with pytest.raises(UserError, match="the first error"):
        train(config(tmp_path))


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in ("checkpoints/.partial-step-000003", ".partial-final"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run/.partial-config.yaml").touch()
    with files.locked(tmp_path / "run"):
        assert not list((tmp_path / "run").rglob(".partial*"))


# Rewards.


class Raises:
    def __init__(self, *names):
        self.names = names

    def __getattribute__(self, name):
        if name in object.__getattribute__(self, "names"):
            raise RuntimeError("no")
        return object.__getattribute__(self, name)


class Numbers:
    def __len__(self):
        return 8

    def __iter__(self):
        raise SystemExit("no")


class Number(float):
    def __float__(self):
        raise RuntimeError("no")

    __repr__ = __float__


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no")


def raising(error):
    def reward(completions):
        raise error

    return reward


def close_stdout(completions):
    sys.stdout.close()
    return [0.0] * len(completions)


async def cancelled(completions):
    raise asyncio.CancelledError


FATAL = {
    "exit": (raising(SystemExit(0)), r"raised SystemExit: 0 \("),
    "quit": (lambda completions: sys.exit("done"), r"raised SystemExit: done \("),
    "cancelled": (cancelled, r"raised asyncio.exceptions.CancelledError \("),
    "no text": (raising(Unspeakable()), "raised test_faults.Unspeakable: <exception str"),
    "stdout": (close_stdout, "closed the output of the run"),
    "tolist": (lambda completions: Raises("tolist"), "returned Raises, which raised RuntimeError"),
    "iter": (lambda completions: Numbers(), "returned Numbers, which raised SystemExit: no"),
    "float": (lambda completions: [Number()] * 8, "returned list, which raised RuntimeError: no"),
    "meta": (lambda completions: torch.zeros(8, device="meta"), "returned Tensor, which raised "),
    "sparse": (lambda completions: torch.zeros(8).to_sparse(), "returned Tensor, which raised "),
}


def rewarded(tmp_path, monkeypatch, function, **changes):
    """A run whose reward is 0 in the calls 1 to 6, and then what the function returns."""
    module, calls = types.ModuleType("faulty"), []

    def reward(completions):
        calls.append(1)
        return function(completions) if len(calls) > 6 else [0.0] * len(completions)

    module.faulty = reward
    monkeypatch.setitem(sys.modules, "faulty", module)
    return make_config(run_options(tmp_path, rewards=["faulty:faulty"], **changes))


@pytest.mark.parametrize("case", FATAL)
def test_a_reward_that_dies(tmp_path, case, monkeypatch):
    function, message = FATAL[case]
    run = rewarded(tmp_path, monkeypatch, function)
    if case == "stdout":
        monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(UserError, match=f"reward faulty: {message}") as raised:
        train(run)
    assert str(raised.value).endswith(f"checkpoints/step-000002'; {GO_ON}")


def lengths(completions):
    return [float(len(text)) for text in completions]


def draw(completions):
    return torch.rand(len(completions)).tolist()


def after(*changes):
    def reward(completions):
        for change in changes:
            change()
        return lengths(completions)

    return reward


HARMLESS = {
    "folder": after(lambda: os.chdir("/")),
    "gradients": after(lambda: torch.set_grad_enabled(False)),
    "dtype": after(lambda: torch.set_default_dtype(torch.float64)),
    "device": after(lambda: torch.set_default_device("meta")),
    "seed": after(lambda: torch.manual_seed(0)),
    "draws": after(lambda: torch.rand(7)),
    "thread": after(lambda: threading.Thread(target=print).start()),
    "leaf": lambda completions: torch.tensor(lengths(completions), requires_grad=True),
    "inference": torch.inference_mode()(lambda completions: torch.tensor(lengths(completions))),
}


def outcome(folder, monkeypatch, function, max_steps=4):
    folder.mkdir()
    monkeypatch.chdir(folder)
    train(
        rewarded(folder, monkeypatch, function, output_dir="run", max_steps=max_steps, save_steps=0)
    )
    return rows(folder / "run")


def test_a_reward_has_no_effect_but_its_numbers(tmp_path, monkeypatch):
    expected = outcome(tmp_path / "expected", monkeypatch, lengths)
    for name, function in HARMLESS.items():
        assert outcome(tmp_path / name, monkeypatch, function) == expected, name


def test_a_reward_draws_new_numbers_each_time(tmp_path, monkeypatch):
    drawn = [row["reward"] for row in outcome(tmp_path / "draws", monkeypatch, draw, 5)]
    assert drawn[:2] == [0, 0]
    assert 0 < drawn[3] != drawn[4] > 0


def test_rewards_draw_other_numbers_than_each_other(tmp_path):
    (tmp_path / "r.py").write_text(
        "import torch\ndef a(completions): return torch.rand(len(completions))\nb = a\n"
    )
    names = ("a", "b")
    held_out = str(write_prompts(tmp_path / "eval.jsonl"))
    options = {"eval_file": held_out, "per_device_eval_batch_size": 4, "max_steps": 1}
    train(config(tmp_path, rewards=[f"{tmp_path}/r.py:{name}" for name in names], **options))
    scores = [row[name] for row in rows(tmp_path / "run", "samples")[:8] for name in names]
    assert len(set(scores)) == 16


def test_workers_of_a_reward_can_be_terminated():
    with sigterm() as received:
        for _ in range(20):  # at any moment
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            worker.start()
            worker.terminate()
            worker.join()
            assert worker.exitcode == -signal.SIGTERM
    assert not received


def test_a_setup_that_dies_leaves_nothing(tmp_path):
    (tmp_path / "fill.py").write_text(
        "import sys\n"
        "def one(folder):\n    (folder / 'half').touch()\n    sys.exit('no')\n"
        "def two(folder):\n    (folder / 'whole').touch()\n"
    )
    with pytest.raises(UserError, match=r"setup: '.*:one': raised SystemExit: no"):
        train(config(tmp_path, setup=f"{tmp_path}/fill.py:one"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    train(config(tmp_path, setup=f"{tmp_path}/fill.py:two"))
    assert {path.name for path in (tmp_path / "run/assets").iterdir()} == {"whole", ".setup"}
    (tmp_path / "run/assets/.setup").write_bytes(b"\xff\0")
    with pytest.raises(UserError, match=r"assets' was filled by .*; move that folder away"):
        train(config(tmp_path, setup=f"{tmp_path}/fill.py:two", resume_from_checkpoint="latest"))
