"""A run that is stopped and resumed equals a run that was never stopped, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import config, options, read_lines, write_prompts
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import get_scheduler

from train.__main__ import main
from train.checkpoint import atomic_directory, find_checkpoint, load_state
from train.config import LR_SCHEDULERS, UserError, make_config
from train.loop import train

ROOT = Path(__file__).parents[2]
TIMINGS = ("seconds", "tokens_per_second")
RUN = {
    "max_steps": 6,
    "eval_steps": 5,
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "reward_weight": {"kind": "cosine", "start": 0, "end": 4},
}
# Uses every global generator, so that a resume fails the tests if it forgets one. Kills its process
# at the call number in KILL_AT_CALL.
REWARD = """
import os
import random
import signal
import numpy
import torch

calls = 0

def noisy(prompts, completions):
    global calls
    calls += 1
    if os.environ.get("KILL_AT_CALL") == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    noise = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
    return [noise * (i % 3) + len(text) for i, text in enumerate(completions)]
"""


def run_options(folder: Path, **changes) -> dict:
    (folder / "reward.py").write_text(REWARD)
    held_out = str(write_prompts(folder / "eval.jsonl"))
    rewards = [f"{folder}/reward.py:noisy"]
    return options(folder, **{**RUN, "eval_file": held_out, "rewards": rewards, **changes})


def rows(output: Path, name: str = "metrics") -> list[dict]:
    lines = read_lines(output / f"{name}.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The output of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(make_config(run_options(folder)))
    assert [row["step"] for row in rows(folder / "run")] == list(range(1, 7))
    return folder / "run"


def test_a_checkpoint_is_resumed_in_another_folder(tmp_path, straight):
    torch.rand(7)
    path = str(straight / "checkpoints/step-000002")
    assert train(make_config(run_options(tmp_path, resume_from_checkpoint=path)))["steps"] == 6
    assert rows(tmp_path / "run") == rows(straight)[2:]


def test_kill_and_resume(tmp_path, straight, capsys):
    killed = tmp_path / "run"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(tmp_path)))
    command = ["--config", str(file)]
    # Call 1 is the evaluation before step 1, calls 2 to 11 are steps 1 to 5, and call 12 is the
    # evaluation after step 5. The run is killed at call 13, in step 6, and repeats step 5 when it
    # resumes from the checkpoint of step 4.
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "KILL_AT_CALL": "13"}
    done = subprocess.run(
        [sys.executable, "-m", "train", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(killed, "eval")] == [0, 5]
    assert {path.name for path in killed.glob("checkpoints/*")} == {"step-000002", "step-000004"}
    assert not (killed / "final").exists()
    # A kill can also leave an incomplete line and an incomplete checkpoint.
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    (killed / "checkpoints" / ".partial-step-000006").mkdir()
    assert main([*command, "resume_from_checkpoint=latest"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert not list((killed / "checkpoints").glob(".*"))
    for name in ("metrics", "eval", "samples"):
        assert rows(killed, name) == rows(straight, name)
    weights, expected = (load_file(run / "final/model.safetensors") for run in (killed, straight))
    assert weights.keys() == expected.keys()
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


def test_latest_without_a_checkpoint_starts_from_scratch(tmp_path):
    run = config(tmp_path, resume_from_checkpoint="latest")
    folder = tmp_path / "run" / "checkpoints" / ".partial-step-000005"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "from": "a killed run"}\n')
    assert find_checkpoint(run) is None
    train(run)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all("from" not in row for row in metrics)


def test_a_wrong_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"resume_from_checkpoint: 'nowhere' is not a checkpoint"):
        train(config(tmp_path, resume_from_checkpoint="nowhere"))


def test_changed_options_are_reported(straight, tmp_path, capsys):
    changes = {"output_dir": str(tmp_path), "max_steps": 3, "learning_rate": 0.5}
    path = str(straight / "checkpoints/step-000002")
    train(make_config(run_options(straight.parent, resume_from_checkpoint=path, **changes)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "these options differ from the checkpoint's: max_steps, learning_rate" in printed


def test_checkpoints_hold_plain_data_and_no_option(straight):
    folder = straight / "checkpoints" / "step-000002"
    assert {path.name for path in folder.iterdir()} == {"model", "state.pt", "config.yaml"}
    assert (folder / "model" / "model.safetensors").exists()
    state = load_state(folder)  # weights_only=True
    assert state.keys() == {"step", "optimizer", "position", "random"}
    assert (state["step"], state["position"]) == (2, 8)
    # An option among these would have the old run's value after a resume.
    for moments in state["optimizer"].values():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("scheduler", "step", "max_steps"),
    [*((name, 6, 8) for name in LR_SCHEDULERS), ("cosine", 2, 3)],
)
def test_the_optimizer_has_the_new_options(straight, tmp_path, scheduler, step, max_steps, capsys):
    changes = {
        "output_dir": str(tmp_path),
        "resume_from_checkpoint": str(straight / f"checkpoints/step-{step:06d}"),
        "max_steps": max_steps,
        "learning_rate": 3e-3,
        "weight_decay": 0.25,
        "lr_scheduler_type": scheduler,
        "warmup_steps": 0 if scheduler == "constant" else 5,
    }
    used = []

    def record(optimizer, *_):
        (group,) = optimizer.param_groups
        used.append({key: value for key, value in group.items() if key != "params"})

    hook = register_optimizer_step_pre_hook(record)
    try:
        train(make_config(run_options(straight.parent, **changes)))
    finally:
        hook.remove()
    fresh = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-3, weight_decay=0.25)
    schedule = get_scheduler(scheduler, fresh, changes["warmup_steps"], max_steps)
    expected = []
    for _ in range(max_steps):
        (group,) = fresh.param_groups
        expected.append({key: group[key] for key in group.keys() - {"params", "initial_lr"}})
        fresh.step()
        schedule.step()
    assert used == expected[step:]
    assert [row["lr"] for row in rows(tmp_path)] == [group["lr"] for group in used]
    printed = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint's: max_steps, learning_rate, " in printed


def test_a_new_seed_is_in_effect(straight, tmp_path):
    path = str(straight / "checkpoints/step-000002")
    changes = {"output_dir": str(tmp_path), "resume_from_checkpoint": path, "max_steps": 3}
    train(make_config(run_options(straight.parent, seed=7, **changes)))
    assert torch.initial_seed() == 7


def test_a_failed_write_leaves_the_old_folder(tmp_path):
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


def test_tiny_config_makes_its_own_models(tmp_path):
    output = tmp_path / "x"
    tiny = str(ROOT / "train/configs/tiny.yaml")
    assert main(["--config", tiny, f"output_dir={output}", "save_steps=3"]) == 0
    assert len(read_lines(output / "metrics.jsonl")) == 12
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in (3, 6, 9, 12)
    }
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["environment"]["torch"] == str(torch.__version__)
    assert make_config(saved).output_dir == str(output)
