"""The demo: its task, its verdict, and one short run of all arms."""

import contextlib
import json
import random
import runpy
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import yaml

from train import addition, demo
from train.__main__ import main


def test_the_biased_teacher_is_right_without_a_carry_only():
    assert addition.sum_without_carry((27, 48)) == "065"
    assert addition.true_sum((27, 48)) == "075"
    problems = addition.all_problems(seed=0)
    assert len(set(problems)) == 10_000
    right = [addition.sum_without_carry(item) == addition.true_sum(item) for item in problems]
    assert sum(right) == 5_500
    assert all(
        is_right == (a % 10 + b % 10 < 10) for is_right, (a, b) in zip(right, problems, strict=True)
    )


def test_noisy_sums_keep_about_half_of_the_digits():
    noise = random.Random(0)
    noisy = [addition.noisy_sum((12, 34), noise) for _ in range(2000)]
    share = sum(text[2] == "6" for text in noisy) / len(noisy)
    assert 0.5 < share < 0.6  # half of them, and by chance a tenth of the others
    assert all(len(text) == 3 for text in noisy)


def test_tokenizer_has_one_token_per_character():
    tokenizer = addition.make_tokenizer()
    ids = tokenizer("27+48=075")["input_ids"]
    assert len(tokenizer) == 16
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "27+48=075"


def summary(hybrid):
    accuracy = {"imitation": [0.5, 0.5], "reward": [0.4, 0.6], "hybrid": hybrid}
    return {"heldout_accuracy": accuracy, "teacher_accuracy": 0.55}


def test_the_verdict_is_honest():
    assert demo.verdict(summary([0.7, 0.7])).endswith("by 0.100 or more.")
    assert "NOT above" in demo.verdict(summary([0.7, 0.59]))
    assert "+0.150, -0.010" in demo.verdict(summary([0.7, 0.59]))
    assert "NOT above" in demo.verdict(summary([0.54, 0.7]))  # below the teacher


def test_the_demo_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--help"])
    monkeypatch.delitem(sys.modules, "train.demo")  # runpy warns about imported modules
    with pytest.raises(SystemExit) as end:
        runpy.run_module("train.demo", run_name="__main__")
    assert end.value.code == 0
    assert "python -m train.demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--seeds=0"], 2, "--seeds: got 0, expected at least 1"),
        (["--output=pyproject.toml/x"], 1, "error: [Errno 20] Not a directory: 'pyproject.toml"),
    ],
)
def test_wrong_arguments_are_named(arguments, status, message, capsys):
    try:
        ended = demo.main(arguments)
    except SystemExit as end:  # argparse's way
        ended = end.code
    assert ended == status
    assert message in capsys.readouterr().err


class Here:
    """Stands in for Popen, and runs the command in this process to save the imports."""

    def __init__(self, command, env, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "train"]
        assert env["OMP_NUM_THREADS"] == "1"
        with contextlib.redirect_stdout(stdout):
            self.returncode = main(command[3:])

    def poll(self):
        return self.returncode


def test_quick_demo(tmp_path, monkeypatch):
    small = partial(addition.make_model, hidden_size=16, layers=1)
    problems = addition.all_problems(seed=0)
    monkeypatch.setattr(addition, "make_model", small)
    monkeypatch.setattr(addition, "all_problems", lambda seed: problems[:600])
    monkeypatch.setattr(demo, "HELD_OUT", 100)
    here = SimpleNamespace(Popen=Here, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(demo, "subprocess", here)
    output = tmp_path / "demo"
    assert demo.main(["--quick", "--seeds=1", f"--output={output}"]) == 0
    written = json.loads((output / "summary.json").read_text())
    assert {arm: len(values) for arm, values in written["heldout_accuracy"].items()} == {
        "imitation": 1,
        "reward": 1,
        "hybrid": 1,
    }
    assert {"teacher_accuracy", "start_accuracy", "seeds", "steps", "seconds"} <= written.keys()
    assert (output / "learning_curves.png").stat().st_size > 10_000
    assert "| hybrid |" in (output / "report.md").read_text()
    prompts = {
        name: {json.loads(line)["prompt"] for line in (output / "assets" / name).open()}
        for name in ("train.jsonl", "eval.jsonl")
    }
    assert len(prompts["eval.jsonl"]) == 100
    assert len(prompts["train.jsonl"]) == 500
    assert prompts["train.jsonl"].isdisjoint(prompts["eval.jsonl"])
    # The arms differ only in the two weights.
    configs = {
        arm: yaml.safe_load((output / f"{arm}-0/config.yaml").read_text()) for arm in demo.ARMS
    }
    for arm, options in configs.items():
        differing = {key for key in options if options[key] != configs["hybrid"][key]}
        expected = {"imitation": {"reward_weight"}, "reward": {"dense_weight"}, "hybrid": set()}
        assert differing - {"output_dir"} == expected[arm]
