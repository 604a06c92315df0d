"""A run that is stopped and resumed equals a run that was never stopped, bit for bit.

Its options are the new ones, and its folder holds one run.
"""

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import config, read_lines, rows, run_options, write_prompts
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import get_scheduler

from train import checkpoint, files, report
from train.__main__ import main
from train.checkpoint import find_checkpoint
from train.config import LR_SCHEDULERS, TrainConfig, UserError, make_config
from train.loop import train

ROOT = Path(__file__).parents[2]


def test_a_checkpoint_is_resumed_in_another_folder(tmp_path, straight):
    torch.rand(7)
    path = str(straight / "checkpoints/step-000002")
    # The rewards of evaluations draw random numbers, of which the training knows nothing.
    changes = {"eval_steps": 1, "per_device_eval_batch_size": 3}
    summary = train(make_config(run_options(tmp_path, resume_from_checkpoint=path, **changes)))
    assert summary["steps"] == 6
    assert summary["before"]["step"] == 2
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run, "eval")] == [2, 3, 4, 5, 6]
    for row, expected in zip(rows(run), rows(straight)[2:], strict=True):
        assert {key: row[key] for key in expected} == expected
    # It is another run, which has its first checkpoint from the start.
    assert (run / "run_id").read_text() != (straight / "run_id").read_text()
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(run / "checkpoints" / name)
    shutil.rmtree(run / "final")
    found = find_checkpoint(make_config(run_options(tmp_path, resume_from_checkpoint="latest")))
    assert found.step == 2
    assert found.changed == ["student"]  # the weights began with the one of the other run


def test_latest_without_a_checkpoint_starts_from_scratch(tmp_path):
    held_out = str(write_prompts(tmp_path / "eval.jsonl"))
    run = config(tmp_path, resume_from_checkpoint="latest", eval_file=held_out)
    folder = tmp_path / "run" / "checkpoints" / ".partial-step-000005"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "from": "a killed run"}\n')
    (tmp_path / "run" / "eval.jsonl").write_text(
        '{"step": 0, "eval_reward": 9, "from": "a killed run"}\n'
    )
    assert find_checkpoint(run) is None
    train(run)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    evaluations = read_lines(tmp_path / "run" / "eval.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]
    assert all("from" not in row for row in metrics + evaluations)


def test_a_wrong_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"resume_from_checkpoint: 'nowhere' is not a checkpoint"):
        train(config(tmp_path, resume_from_checkpoint="nowhere"))


def test_checkpoints_hold_plain_data_and_no_option(straight):
    folder = straight / "checkpoints" / "step-000002"
    assert {path.name for path in folder.iterdir()} == {
        *("model", "state.pt", "config.yaml", "manifest.json")
    }
    assert (folder / "model" / "model.safetensors").exists()
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state.keys() == {"run_id", "step", "optimizer", "position", "random"}
    assert (state["step"], state["position"]) == (2, 8)
    # An option among these would have the old run's value after a resume.
    for moments in state["optimizer"].values():
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}


# A new value for each option. A resumed run continues with these ...
IN_EFFECT = {
    "teachers": [{"model": "elsewhere", "weight": 2}],
    "train_file": "other.jsonl",
    "eval_file": None,
    "setup": "a:b",
    "rewards": ["a:b"],
    "reward_weight": 3,
    "gamma": 0.5,
    "dense_weight": 0.5,
    "sampled_kl": False,
    "entropy_weight": 0.1,
    "divergence": "forward_kl",
    "baseline": "none",
    "cost_clip": 5,
    "teacher_floor": -30,
    "vocab_size": 20,
    "top_k_teacher": 3,
    "top_k_support": "union",
    "tail": "mask",
    "fused_linear": False,
    "num_generations": 2,
    "max_completion_length": 3,
    "temperature": 0.5,
    "teacher_temperature": 2,
    "top_p": 0.5,
    "top_k": 3,
    "mask_truncated_completions": True,
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "weight_decay": 0.5,
    "max_grad_norm": 0,
    "bf16": True,
    "seed": 7,
}
# ... and with these, which are not worth a word ...
HARMLESS = {
    "output_dir": "elsewhere",
    "resume_from_checkpoint": None,
    "logging_steps": 2,
    "save_steps": 1,
    "report_to": "tensorboard",
    "eval_steps": 1,
    "eval_metrics": ["a:b"],
    "per_device_eval_batch_size": 1,
}
# ... but not with these, as it says.
NO_EFFECT = {"student": "elsewhere"}


def test_every_option_is_in_effect_or_named(straight, tmp_path):
    assert IN_EFFECT.keys() | HARMLESS.keys() | NO_EFFECT.keys() == {
        spec.name for spec in fields(TrainConfig)
    }
    same = {"output_dir": str(tmp_path)}
    same["resume_from_checkpoint"] = str(straight / "checkpoints/step-000002")

    def differences(**changes):
        run = make_config(run_options(straight.parent, **{**same, **changes}))
        return find_checkpoint(run).differences(run)

    assert differences() == []
    (text,) = differences(**IN_EFFECT, teacher=None)
    named, outcome = text.removeprefix("these options differ from the checkpoint's: ").split("; ")
    assert set(named.split(", ")) == IN_EFFECT.keys()
    assert outcome.startswith("the run continues with the new ones")
    assert differences(**{name: HARMLESS[name] for name in HARMLESS.keys() - same.keys()}) == []
    (text,) = differences(**NO_EFFECT)
    assert text.startswith("student: differs from the checkpoint's, and has no effect")
    # Nothing has an effect on a run that is over.
    (text,) = differences(
        output_dir=str(straight), resume_from_checkpoint="latest", learning_rate=0.5
    )
    assert text.endswith("learning_rate; that has no effect, because all steps are done")


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


def test_assets_are_those_of_the_setup(tmp_path):
    (tmp_path / "fill.py").write_text("def one(folder):\n    pass\n\n\ntwo = one\n")
    one, two = (f"{tmp_path}/fill.py:{name}" for name in ("one", "two"))
    for _ in range(2):  # the second time, they are there
        with pytest.raises(UserError, match="student: there is no folder"):
            train(config(tmp_path, setup=one, student=str(tmp_path / "none")))
    with pytest.raises(UserError, match=rf"setup: got '{two}', but .* was filled by {one}; move"):
        train(config(tmp_path, setup=two))


def later(output):
    """What comes after step 4 of a run of 6."""
    return output / "checkpoints/step-000006", output / "final"


def test_the_last_steps_are_taken_back(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for folder in later(run):
        shutil.rmtree(folder)
    # As if a first attempt was killed while it dropped records.
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(metrics[:5]))
    changes = {"learning_rate": 0, "weight_decay": 0.5, "max_steps": 5}
    path = str(run / "checkpoints/step-000004")
    train(make_config(run_options(tmp_path, resume_from_checkpoint=path, **changes)))
    assert "dropped the records of 1 later steps" in capsys.readouterr().out
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    assert rows(run)[:4] == rows(straight)[:4]
    assert [row["step"] for row in rows(run, "eval")] == [0, 5]
    assert {row["step"] for row in rows(run, "samples")} == {0, 1, 2, 3, 4, 5}
    before, after = (
        load_file(file)
        for file in (f"{path}/model/model.safetensors", run / "final/model.safetensors")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("option", "step"), [(None, 0), ("{straight}/checkpoints/step-000006", 0), ("latest", 7)]
)
def test_tensorboard_drops_the_same_steps(straight, tmp_path, option, step):
    option = option and option.format(straight=straight)
    changes = {"resume_from_checkpoint": option, "report_to": "tensorboard", "max_steps": 8}
    run = make_config(run_options(tmp_path, **changes))
    if option == "latest":
        shutil.copytree(straight, run.output_dir)
    called = []
    accelerator = SimpleNamespace(init_trackers=lambda *_, **given: called.append(given))
    resumed = find_checkpoint(run)
    with files.locked(Path(run.output_dir)), report.RunLog(run, accelerator, resumed):
        pass
    assert called == [{"init_kwargs": {"tensorboard": {"purge_step": step}}}]


def test_a_copied_folder_goes_on(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    changes = {"resume_from_checkpoint": "latest", "eval_metrics": ["train.rewards:exact_match"]}
    assert train(make_config(run_options(tmp_path, **changes)))["steps"] == 6  # nothing to do
    assert rows(run) == rows(straight)
    summary = train(make_config(run_options(tmp_path, max_steps=7, **changes)))
    assert rows(run)[:6] == rows(straight)
    assert summary["steps"] == 7
    assert "eval_exact_match" in summary["after"]


@pytest.mark.parametrize("spelling", ["{run}/{last}/", "run/{last}", "link/{last}", "last"])
def test_the_last_checkpoint_by_any_path(straight, tmp_path, spelling, monkeypatch):
    run, last = tmp_path / "run", "checkpoints/step-000006"
    shutil.copytree(straight, run)
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "last").symlink_to(run / last)
    monkeypatch.chdir(tmp_path)
    path = spelling.format(run=run, last=last)
    found = find_checkpoint(make_config(run_options(tmp_path, resume_from_checkpoint=path)))
    assert found.own
    assert found.step == 6


def test_a_folder_may_move(straight, tmp_path, monkeypatch):
    assets = {"teacher": "{output_dir}/assets/teacher", "train_file": "{output_dir}/a.jsonl"}
    run = make_config(run_options(straight.parent, output_dir=str(tmp_path / "old"), **assets))
    shutil.copytree(straight, tmp_path / "new")
    file = tmp_path / "new/checkpoints/step-000006/config.yaml"
    file.write_text(yaml.safe_dump(run.as_options()))
    files.write_manifest(file.parent)
    monkeypatch.chdir(tmp_path)

    def changed(**changes):
        given = {"output_dir": "new", "resume_from_checkpoint": "latest", **assets, **changes}
        return find_checkpoint(make_config(run_options(straight.parent, **given))).changed

    assert changed() == changed(output_dir=str(tmp_path / "new")) == []
    assert changed(train_file=run.train_file) == []
    assert changed(train_file="{output_dir}/b.jsonl") == ["train_file"]


def test_options_without_effect_are_not_recorded(straight, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = (run / "config.yaml").read_bytes()
    changes = {"student": str(straight.parent / "teacher"), "resume_from_checkpoint": "latest"}
    changed = make_config(run_options(tmp_path, learning_rate=0.5, **changes))
    train(changed)
    assert (run / "config.yaml").read_bytes() == before
    train(make_config(run_options(tmp_path, max_steps=7, **changes)))
    student = yaml.safe_load(before)["student"]
    for file in (run / "config.yaml", run / "checkpoints/step-000007/config.yaml"):
        saved = yaml.safe_load(file.read_text())
        assert (saved["student"], saved["max_steps"]) == (student, 7)
    assert (
        "student" in find_checkpoint(make_config({**changed.as_options(), "max_steps": 8})).changed
    )


def test_an_extension_that_was_killed_goes_on(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    later = tmp_path / "run/checkpoints/step-000008"
    shutil.copytree(straight / "checkpoints/step-000006", later)
    state = torch.load(later / "state.pt", weights_only=True)
    torch.save({**state, "step": 8}, later / "state.pt")
    files.write_manifest(later)
    run = make_config(run_options(tmp_path, max_steps=9, resume_from_checkpoint="latest"))
    assert find_checkpoint(run).step == 8


def test_lines_that_were_cut_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "text": "é"}\n'.encode()
    cut = whole.replace(b"1", b"2")[:-4]
    file.write_bytes(whole + b'null\n{}\n[1]\n{"step": null}\n{"step": 2}\n' + cut)
    assert report._drop_from(file, 2) == (1, 4)
    assert file.read_bytes() == whole


def test_random_states_are_those_of_one_gpu(monkeypatch):
    state, given = torch.arange(3), []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: state)
    monkeypatch.setattr("torch.cuda.set_rng_state", given.append)
    checkpoint.restore_random_state(checkpoint.random_state())
    assert given == [state]


def remove(*names):
    def tamper(run, other):
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return tamper


def rename(run, other):
    (run / "checkpoints/step-000006").rename(run / "checkpoints/step-000010")


def copy_from_another(run, other):
    shutil.copytree(other / "checkpoints/step-000002", run / "checkpoints/step-000008")


def age(run, other):
    file = run / "checkpoints/step-000006/state.pt"
    state = torch.load(file, weights_only=True)
    del state["run_id"]
    torch.save(state, file)
    files.write_manifest(file.parent)


NOT_LAST = "is not the last checkpoint of the run in '{run}', and a folder holds one run; to "
LATEST = "go on with the run there, use resume_from_checkpoint=latest; "
NOT_OURS = "was not saved by the run in"
REFUSED = {
    "another run's": (None, "{other}/checkpoints/step-000002", NOT_LAST + LATEST),
    "an earlier one": (None, "{run}/checkpoints/step-000004", NOT_LAST + LATEST),
    "another run's, no checkpoint here": (
        remove("checkpoints", "final"),
        "{other}/checkpoints/step-000002",
        NOT_LAST + "start a new run",
    ),
    "another run's, copied": (copy_from_another, "latest", NOT_OURS),
    "under another name": (rename, "latest", NOT_OURS),
    "without an identity here": (remove("run_id"), "latest", NOT_OURS),
    "only the weights are left": (remove("checkpoints"), "latest", "'{run}/final' is the end of"),
    "the last one is gone": (
        remove("checkpoints/step-000006"),
        "latest",
        "'{run}/final' is the end of a run whose last checkpoint is missing. Start a new run",
    ),
    "no checkpoint and no summary": (
        remove("checkpoints", "summary.json"),
        "latest",
        "'{run}/final' is the end of",
    ),
    "only checkpoints are left": (
        remove("metrics.jsonl", "final", "run_id"),
        None,
        "output_dir: '{run}' holds a run already",
    ),
    "too many steps": (
        remove("final"),
        "latest",
        "max_steps: got 5, but the checkpoint was saved after 6 steps; ask for more",
    ),
    "nothing to do": (
        remove("metrics.jsonl", "final"),
        "latest",
        "max_steps: got 6, but the checkpoint was saved after 6 steps; ask for more",
    ),
    "older code's": (age, "latest", "lacks run_id: another version of this code has written it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_holds_one_run(straight, tmp_path, case, capsys):
    run, other = tmp_path / "run", straight
    tamper, option, message = REFUSED[case]
    shutil.copytree(straight, run)
    if tamper is not None:
        tamper(run, other)
    if "{other}" in str(option) or tamper is copy_from_another:
        (run / "run_id").write_text("another")
    changes = {"max_steps": 5 if case == "too many steps" else 6}
    changes["resume_from_checkpoint"] = option and option.format(run=run, other=other)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_options(tmp_path, **changes)))

    def content():
        files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.read_bytes() for path in files}

    before = content()
    assert main(["--config", str(file)]) == 2
    last = "resume_from_checkpoint: '" + str(run / "checkpoints/step-000006")
    assert message.format(run=run, last=last) in capsys.readouterr().err
    assert content() == before


def test_a_folder_is_for_one_process(tmp_path, monkeypatch):
    run = config(tmp_path, setup="no:where", max_steps=1)
    (tmp_path / "run").mkdir()
    holder = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('process 1 on moon', end='', file=file, flush=True); print(flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run/.lock")], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        with pytest.raises(
            UserError, match=r"output_dir: '.*' is in use by process 1 on moon, or by a"
        ):
            train(run)
    finally:
        process.kill()
        process.communicate()
    for _ in range(2):  # a run that fails lets go
        with pytest.raises(UserError, match="setup: can't import 'no'"):
            train(run)
    with files.locked(tmp_path / "run"):
        content = (tmp_path / "run/.lock").read_text()
        assert content.startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            train(run)

    def without_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", without_locks)
    with pytest.warns(match="has no locks"), files.locked(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_dir: can't write to"):
        train(config(tmp_path, output_dir=str(tmp_path / "file")))


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
