"""A run that stops and goes on is the run that never stopped, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import config, options, read_lines, write_prompts
from safetensors.torch import load_file

from train.checkpoint import atomic_directory, find_checkpoint, load_state
from train.config import UserError, make_config
from train.loop import train

ROOT = Path(__file__).parents[2]
TIMINGS = ("seconds", "tokens_per_second")
RUN = {
    "max_steps": 12,
    "eval_steps": 4,
    "save_steps": 3,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "reward_weight": {"kind": "cosine", "start": 0, "end": 4},
}
# Uses every global generator, so that a resume which forgets one is found out; and takes its time,
# so that a kill after step 7 lands before the end.
REWARD = """
import random
import time
import numpy
import torch

def noisy(prompts, completions):
    time.sleep(0.03)
    noise = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
    return [noise * (i % 3) + len(text) for i, text in enumerate(completions)]
"""


def run_options(folder: Path, **changes) -> dict:
    (folder / "reward.py").write_text(REWARD)
    held_out = str(write_prompts(folder / "eval.jsonl"))
    rewards = [f"{folder}/reward.py:noisy"]
    return options(folder, **{**RUN, "eval_file": held_out, "rewards": rewards, **changes})


def rows(output: Path) -> list[dict]:
    found = read_lines(output / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in found]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert [row["step"] for row in rows(one)] == list(range(1, 13))
    assert read_lines(one / "samples.jsonl") == read_lines(other / "samples.jsonl")
    weights = [load_file(output / "final" / "model.safetensors") for output in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_six_and_six_steps_are_twelve(tmp_path):
    straight, halves = str(tmp_path / "straight"), str(tmp_path / "halves")
    train(make_config(run_options(tmp_path, output_dir=straight)))
    train(make_config(run_options(tmp_path, output_dir=halves)))
    assert_same_run(Path(straight), Path(halves))  # the seed fixes a run
    # Back to the state after step 6: what came later must come again, and only once.
    for name in ("step-000009", "step-000012"):
        shutil.rmtree(Path(halves) / "checkpoints" / name)
    shutil.rmtree(Path(halves) / "final")
    torch.rand(7)
    summary = train(
        make_config(run_options(tmp_path, output_dir=halves, resume_from_checkpoint="latest"))
    )
    assert summary["steps"] == 12
    assert_same_run(Path(straight), Path(halves))
    # The same from a named checkpoint, into another folder: the last six steps.
    path = f"{straight}/checkpoints/step-000006"
    elsewhere = tmp_path / "elsewhere"
    changes = {"output_dir": str(elsewhere), "resume_from_checkpoint": path}
    train(make_config(run_options(tmp_path, **changes)))
    assert rows(elsewhere) == rows(Path(straight))[6:]


def command(folder: Path, output: Path, *more: str) -> list[str]:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(folder, output_dir=str(output))))
    return [sys.executable, "-m", "train", "--config", str(file), *more]


def test_kill_and_resume(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(tmp_path, killed), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 7):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    # A line that the kill cut short, and a checkpoint that it left half written.
    with metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    (killed / "checkpoints" / ".partial-step-000009").mkdir(exist_ok=True)
    resume = [*command(tmp_path, killed), "resume_from_checkpoint=latest"]
    done = subprocess.run(resume, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    straight = tmp_path / "straight"
    train(make_config(run_options(tmp_path, output_dir=str(straight))))
    assert_same_run(straight, killed)
    assert not list((killed / "checkpoints").glob(".*"))


def test_latest_without_a_checkpoint_starts_from_nothing(tmp_path):
    run = config(tmp_path, resume_from_checkpoint="latest")
    folder = tmp_path / "run" / "checkpoints" / ".partial-step-000005"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "from": "a killed run"}\n')
    assert find_checkpoint(run) is None
    train(run)
    found = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2]
    assert all("from" not in row for row in found)


def test_a_wrong_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"resume_from_checkpoint: 'nowhere' is not a checkpoint"):
        train(config(tmp_path, resume_from_checkpoint="nowhere"))


def test_changed_options_are_told(tmp_path, capsys):
    train(config(tmp_path, max_steps=2))
    train(config(tmp_path, max_steps=3, learning_rate=0.5, resume_from_checkpoint="latest"))
    told = " ".join(capsys.readouterr().out.split())
    assert "these options differ from the checkpoint's: max_steps, learning_rate" in told


def test_checkpoints_hold_plain_data_only(tmp_path):
    train(config(tmp_path, max_steps=2, save_steps=2))
    folder = tmp_path / "run" / "checkpoints" / "step-000002"
    assert {path.name for path in folder.iterdir()} == {"model", "state.pt", "config.yaml"}
    assert (folder / "model" / "model.safetensors").exists()
    state = load_state(folder)  # weights_only=True
    assert (state["step"], state["position"]) == (2, 4)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "thing"
    with atomic_directory(target) as folder:
        (folder / "x").write_text("old")

    def fail():
        with atomic_directory(target) as folder:
            (folder / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "x").read_text() == "old"
    with atomic_directory(target) as folder:
        (folder / "x").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (target / "x").read_text() == "new"


def test_tiny_config_runs_from_nothing(tmp_path):
    run = [sys.executable, "-m", "train", "--config", "train/configs/tiny.yaml"]
    done = subprocess.run(
        [*run, f"output_dir={tmp_path}/x", "save_steps=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    output = tmp_path / "x"
    assert len(read_lines(output / "metrics.jsonl")) == 12
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in (3, 6, 9, 12)
    }
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["environment"]["torch"] == str(torch.__version__)
    assert make_config(saved).output_dir == str(output)
