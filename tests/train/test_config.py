"""A wrong option is reported by its name, and schedules follow the formulas of their table."""

import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import get_scheduler

from train.config import (
    LR_SCHEDULERS,
    RewardConfig,
    TeacherConfig,
    TrainConfig,
    UserError,
    load_config,
    make_config,
)
from train.schedules import Schedule, learning_rate_factor, parse_schedule

REQUIRED = {"output_dir": "out", "student": "s", "teacher": "t", "train_file": "f"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1e-3}, "learning_rte: unknown option; did you mean learning_rate?"),
        ({1: 2}, "1: unknown option"),
        ({"xyzzy": 1}, "xyzzy: unknown option; the options are in train/config.py"),
        ({"learning_rate": "fast"}, "learning_rate: got 'fast', expected a finite number"),
        ({"learning_rate": True}, "learning_rate: got True, expected a finite number"),
        ({"learning_rate": ".inf"}, "learning_rate: got '.inf', expected a finite number"),
        ({"learning_rate": 10**400}, "learning_rate: got 1000"),
        ({"cost_clip": 1e300}, "cost_clip: got 1e+300, expected a finite number within the range"),
        ({"seed": 2**32}, "seed: got 4294967296, expected a number from 0 to 4294967295"),
        ({"max_steps": 1.5}, "max_steps: got 1.5, expected a whole number"),
        ({"max_steps": 0}, "max_steps: got 0, expected at least 1"),
        ({"bf16": 1}, "bf16: got 1, expected true or false"),
        ({"student": 7}, "student: got 7 (int), expected text"),
        ({"student": None}, "student: missing"),
        ({"student": " "}, "student: got ' ' (str), expected text"),
        ({"teacher": ""}, "teachers: got '' (str), expected text"),
        ({"output_dir": "a\0b"}, "output_dir: got 'a\\x00b', which has characters that no file"),
        ({"train_file": "\ud800"}, "train_file: got '\\ud800', which has characters that no file"),
        ({"output_dir": "~nobody_/x"}, "output_dir: got '~nobody_/x', but that user has no home"),
        ({"baseline": "mean"}, "baseline: got 'mean', expected one of none, leave_one_out"),
        ({"divergence": "kl"}, "divergence: unknown name 'kl'"),
        ({"divergence": {"name": "jsd", "beta": 2}}, "beta=2.0, which must be a number in [0, 1]"),
        (
            {"divergence": {"name": "jsd", "beta": []}},
            "divergence: beta: got [], expected a finite",
        ),
        ({"divergence": {"name": "jsd", 1: 2}}, "divergence: 'jsd' got '1', it takes"),
        ({"rewards": [3]}, "rewards: got 3, expected `module:function`"),
        ({"rewards": [{"function": "a:b", "wait": 1}]}, "rewards: unknown key 'wait'"),
        ({"rewards": [{"function": "a:b", 1: 2, "x": 1}]}, "rewards: unknown key 1"),
        ({"rewards": [{"function": "a:b", "weight": "x"}]}, "weight of a:b: got 'x'"),
        ({"teachers": [], "teacher": None}, "teachers: got an empty list"),
        ({"teacher": 7}, "teachers: got 7, expected a checkpoint, or {model: ..., weight: ...}"),
        ({"teacher": {"model": "a", "weight": 0}}, "weight of a: got 0.0, expected more than 0"),
        ({"top_k_teacher": 0}, "top_k_teacher: got 0, expected a number from 1 to 512"),
        ({"top_k_support": "mine"}, "top_k_support: got 'mine', expected one of student, teacher"),
        ({"tail": "cut"}, "tail: got 'cut', expected one of bucket, renormalize, mask"),
        ({"teachers": ["a"]}, "teachers: given together with teacher"),
        ({"gamma": 1.5}, "gamma: reaches 1.5, expected in [0, 1]"),
        ({"dense_weight": {"kind": "cosine", "start": 1, "end": -1}}, "dense_weight: reaches -1"),
        ({"gamma": {"kind": "step"}}, "gamma: unknown schedule kind 'step'"),
        ({"gamma": {"kind": []}}, "gamma: unknown schedule kind []"),
        ({"gamma": {"kind": "cosine", "start": 1, "end": 0, 1: 2, "x": 3}}, "cosine got 1"),
        (
            {"gamma": {"kind": "cosine", "start": 1}},
            "gamma: cosine needs start, end; end is missing",
        ),
        ({"gamma": {"kind": "cosine", "start": 1, "end": 0, "alpha": 1}}, "cosine got 'alpha'"),
        ({"reward_weight": {"kind": "geometric", "start": 0, "end": 1}}, "neither of them 0"),
        ({"per_device_train_batch_size": 12}, "got 12 completions, not a multiple of num_gen"),
        ({"warmup_steps": 5}, "warmup_steps: got 5, but lr_scheduler_type=constant has no warm-up"),
        ({"num_generations": 1}, "num_generations: got 1, but baseline=leave_one_out compares"),
        ({"temperature": 0}, "temperature: got 0.0, expected from 0.001 to 1000"),
        ({"top_p": 0}, "top_p: got 0.0, expected a number in (0, 1]"),
        ({"teacher_floor": 3}, "teacher_floor: got 3.0, expected a log-probability"),
    ],
)
def test_wrong_options_are_named(changes, message):
    with pytest.raises(UserError) as error:
        make_config({**REQUIRED, **changes})
    assert message in str(error.value)


# With these, every option may take the last value within its bounds.
LENIENT = {
    "num_generations": 1,
    "per_device_train_batch_size": 1,
    "baseline": "none",
    "lr_scheduler_type": "linear",
}
# Numbers without a bound: a reward with a negative weight is a penalty.
UNBOUNDED = {"rewards: weight"}
OWNERS = {"": TrainConfig, "teachers: ": TeacherConfig, "rewards: ": RewardConfig}
FIELDS = {prefix + spec.name: spec for prefix, owner in OWNERS.items() for spec in fields(owner)}
TYPES = {
    prefix + name: {hint, *typing.get_args(hint)}
    for prefix, owner in OWNERS.items()
    for name, hint in typing.get_type_hints(owner).items()
}


def inside_and_outside(option, kind, bound):
    """The last value that a bound allows, and the next one."""
    if kind == "choices":
        return bound[0], "something else"
    step = 1 if int in TYPES[option] else 1e-6
    return {
        "at_least": (bound, bound - step),
        "above": (bound + step, bound),
        "at_most": (bound, bound + step),
    }[kind]


@pytest.mark.parametrize(
    ("option", "kind"),
    [(option, kind) for option, spec in FIELDS.items() for kind in spec.metadata.get("bounds", {})],
)
def test_every_bound(option, kind):
    metadata = FIELDS[option].metadata
    inside, outside = (
        {"teacher": {"model": "t", "weight": value}} if ": " in option else {option: value}
        for value in inside_and_outside(option, kind, metadata["bounds"][kind])
    )
    make_config({**REQUIRED, **LENIENT, **inside})
    with pytest.raises(UserError) as error:
        make_config({**REQUIRED, **LENIENT, **outside})
    assert str(error.value).startswith(option)
    assert str(error.value).endswith(f", expected {metadata['expected']}")


def test_every_number_has_a_bound():
    numbers = {option for option, types in TYPES.items() if types & {int, float, Schedule}}
    assert {option for option in numbers if not FIELDS[option].metadata} == UNBOUNDED


def test_file_and_overrides(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**REQUIRED, "train_file": "{output_dir}/x", "seed": 1}))
    overrides = ["output_dir=there", "learning_rate=1e-3", "gamma={kind: cosine, start: 0, end: 1}"]
    two = "teachers=[q, {model: '{output_dir}/r', weight: 2}]"
    config = load_config(file, [*overrides, "rewards=a.b:c", two, "teacher="])
    assert (config.output_dir, config.train_file, config.seed) == ("there", "there/x", 1)
    assert config.learning_rate == 1e-3
    assert config.gamma == Schedule(0.0, "cosine", end=1.0)
    assert config.rewards[0].function == "a.b:c"
    assert config.teachers == [TeacherConfig("q"), TeacherConfig("there/r", 2.0)]
    assert make_config(REQUIRED).teachers == [TeacherConfig(REQUIRED["teacher"])]
    # The options that a run writes to its folder start an equal run.
    assert make_config({**config.as_options(), "environment": {"torch": "2"}}) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2", "found the key 'seed' twice"),
        ("rewards:\n- {function: a:b, function: c:d}", "found the key 'function' twice"),
        *((f"a: b\n{key}: 2", "key that is not text") for key in ("1", "yes", "~", "2026-01-01")),
        ("gamma: {1: 2}", "key that is not text"),
        ("? [a]\n: 2", "key that is not text"),
        ("seed: 2026-13-01", "month must be in 1..12"),
        ("x: " + "[" * 1000, "maximum recursion"),
        ("bf16: !!bool maybe", "'maybe'"),
        ("seed: !!int ''", "index out of range"),
        ("gamma: !!map [1]", "unpack"),
        ("? !!str [a]\n: 1", "unhashable"),
        ("\tseed: 1", "cannot start any token"),
        ("seed: !!python/object:os.system x", "could not determine a constructor"),
        (b"output_dir: \xe9", "unacceptable character"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("- a", "holds no `key: value` lines"),
        ("", "holds no `key: value` lines"),
    ],
)
def test_files_that_are_not_options_are_named(tmp_path: Path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_config(file)
    assert str(error.value).startswith("--config: ")
    assert repr(str(file)) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["[1", "2026-13-01", "{a: 1, a: 2}", "{1: 2}"])
def test_values_that_are_not_yaml_are_named(text):
    with pytest.raises(UserError) as error:
        load_config(None, [f"seed={text}"])
    assert str(error.value).startswith(f"seed: can't read {text!r}: ")


def test_merged_keys_may_be_given_again(tmp_path: Path):
    file = tmp_path / "run.yaml"
    text = "gamma: {<<: &a {kind: cosine, start: 0, end: 1}, end: 0.5}\ndense_weight: *a\n"
    file.write_text(yaml.safe_dump(REQUIRED) + text)
    config = load_config(file)
    assert config.gamma == Schedule(0.0, "cosine", end=0.5)
    assert config.dense_weight == Schedule(0.0, "cosine", end=1.0)


def test_paths_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = {name: f"~/{name}" for name in ("output_dir", "student", "train_file", "eval_file")}
    options["eval_file"] = Path(options["eval_file"])
    options |= {"teachers": ("~/t", {"model": "~/u", "weight": 2}), "rewards": "~/r.py:f"}
    config = make_config(options)
    paths = [config.output_dir, config.student, config.train_file, config.eval_file]
    paths += [teacher.model for teacher in config.teachers] + [config.rewards[0].function]
    assert all(path is not None and path.startswith("/home/me/") for path in paths)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        (2, [2, 2, 2, 2, 2]),
        ({"kind": "linear", "start": 2, "alpha": 0.5, "cap": 4.5}, [2, 3, 4, 4.5, 4.5]),
        ({"kind": "linear", "start": 1, "alpha": -0.3, "cap": 0.5}, [1, 0.7, 0.5, 0.5, 0.5]),
        ({"kind": "geometric", "start": 1, "end": 16}, [1, 2, 4, 8, 16]),
        ({"kind": "geometric", "start": 4, "end": 1, "steps": 2}, [4, 2, 1, 1, 1]),
        ({"kind": "cosine", "start": 0, "end": 2}, [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2]),
    ],
)
def test_schedules(option, values):
    schedule = parse_schedule("x", option)
    assert [schedule.at(step, 5) for step in range(5)] == pytest.approx(values)
    assert parse_schedule("x", schedule.as_option()) == schedule


@pytest.mark.parametrize("warmup_steps", [0, 3, 9])
@pytest.mark.parametrize("kind", LR_SCHEDULERS)
def test_learning_rate_factors_are_those_of_transformers(kind, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(kind, optimizer, warmup_steps, 7)
    if kind == "constant":
        warmup_steps = 0  # with warm-up, it is refused
    for step in range(7):
        assert learning_rate_factor(kind, step, warmup_steps, 7) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def test_command_line_prints_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "train", "--config", "train/configs/tiny.yaml"]
    command += [f"output_dir={tmp_path}", "max_stepz=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: max_stepz: unknown option; did you mean max_steps?\n"
