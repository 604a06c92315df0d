"""A student that surpasses its biased teacher: `python -m train.demo`.

Two-digit addition. The teacher drops the carry, so it is right in 55 % of the problems at best. The
student starts from noisy sums. Three arms run the same loop (`python -m train`) with the same
checkpoints, prompts and options (`configs/demo.yaml`), and differ only in two weights:

    arm         reward_weight   dense_weight
    imitation   0               as configured    distillation on the student's own responses
    reward      as configured   0                policy gradient on the reward only
    hybrid      as configured   as configured    the KL exactly, the reward by policy gradient
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from train import addition
from train.addition import Addends
from train.config import UserError
from train.data import Example
from train.files import atomic_directory, write_atomically
from train.rewards import exact_match
from train.rollout import Sampler, generate

CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
ARMS: dict[str, list[str]] = {
    "imitation": ["reward_weight=0"],
    "reward": ["dense_weight=0"],
    "hybrid": [],
}
# From the Okabe-Ito palette, which colour-blind readers can distinguish, too.
COLOURS = {"imitation": "#E69F00", "reward": "#0072B2", "hybrid": "#009E73"}
HELD_OUT = 1000  # problems, out of 10,000, that are never trained on
START_ACCURACY = 0.16  # at which the student's supervised training stops
PARALLEL_RUNS = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--quick", action="store_true", help="a few steps only, as a test")
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 1:
        parser.error(f"--seeds: got {parsed.seeds}, expected at least 1")
    try:
        _demo(parsed)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(parsed: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    console = Console(soft_wrap=True)
    started = time.perf_counter()
    runs = [(arm, seed) for seed in range(parsed.seeds) for arm in ARMS]
    for run in runs:
        shutil.rmtree(run_folder(parsed.output, *run), ignore_errors=True)
    with atomic_directory(parsed.output / "assets") as folder:
        accuracies = make_assets(folder, quick=parsed.quick, console=console)
    overrides = ["max_steps=6", "eval_steps=3"] if parsed.quick else []
    run_all(parsed.output, runs, overrides, console)
    summary = summarise(parsed.output, parsed.seeds, accuracies)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(parsed.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    curves = {arm: read_curves(parsed.output, arm, parsed.seeds) for arm in ARMS}
    draw_learning_curves(parsed.output / "learning_curves.png", curves, summary["teacher_accuracy"])
    write_atomically(parsed.output / "report.md", report(summary))
    console.print(result_table(summary))
    for line in (verdict(summary), *collapses(summary)):
        console.print(line)
    text = f"{summary['seconds']:.0f} s in all; written to {parsed.output}"
    console.print(text, markup=False, highlight=False)


def make_assets(folder: Path, *, quick: bool, console: Console) -> dict[str, float]:
    """Trains teacher and student under supervision, and writes checkpoints and problems.

    Returns:
        `teacher_accuracy` and `start_accuracy`, greedy, on the held-out problems.
    """
    torch.set_num_threads(1)  # more would not speed up models of this size
    problems = addition.all_problems(seed=0)
    held_out, rest = problems[:HELD_OUT], problems[HELD_OUT:]
    addition.write_problems(folder / "eval.jsonl", held_out)
    addition.write_problems(folder / "train.jsonl", rest)
    console.print("training the teacher, which drops the carry ...")
    teacher = addition.make_model(seed=1)
    addition.fit(teacher, rest, addition.sum_without_carry, steps=20 if quick else 300)
    console.print("training the student on noisy sums ...")
    student = addition.make_model(seed=2)
    noise = random.Random(0)

    def good_enough() -> bool:
        # Measured on problems of the training split, so that held-out ones don't decide anything.
        return greedy_accuracy(student, rest[:500]) >= START_ACCURACY

    addition.fit(
        student,
        rest,
        lambda problem: addition.noisy_sum(problem, noise),
        steps=20 if quick else 1000,
        stop=good_enough,
    )
    accuracies = {}
    for name, model, key in (("teacher", teacher, "teacher"), ("student", student, "start")):
        addition.save(model, folder / name)
        accuracies[f"{key}_accuracy"] = greedy_accuracy(model, held_out)
        console.print(f"{name}: held-out accuracy {accuracies[f'{key}_accuracy']:.3f}")
    return accuracies


def greedy_accuracy(model: Any, problems: list[Addends]) -> float:
    """The share of problems whose greedy answer is the true sum."""
    tokenizer = addition.make_tokenizer()
    texts = [addition.prompt(problem) for problem in problems]
    examples = [Example(text, tokenizer(text)["input_ids"], {}) for text in texts]
    sampler = Sampler(
        eos_ids=(addition.END,),
        pad_id=addition.PAD,
        vocab_size=len(addition.VOCABULARY),
        max_completion_length=addition.MAX_ANSWER,
    )
    rollout = generate(model.eval(), examples, sampler, greedy=True)
    answers = tokenizer.batch_decode(rollout.tokens, skip_special_tokens=True)
    expected = [addition.true_sum(problem) for problem in problems]
    return sum(exact_match(texts, answers, expected)) / len(problems)


def run_all(
    output: Path, runs: list[tuple[str, int]], overrides: list[str], console: Console
) -> None:
    """Executes all runs, `PARALLEL_RUNS` at a time, each in a process with one thread.

    Raises:
        UserError: a run failed. The message names its log.
    """
    waiting = list(runs)
    active: dict[tuple[str, int], subprocess.Popen] = {}
    while waiting or active:
        while waiting and len(active) < PARALLEL_RUNS:
            arm, seed = run = waiting.pop(0)
            console.print(f"{arm}, seed {seed} ...")
            active[run] = start_run(output, arm, seed, overrides)
        time.sleep(0.2)
        for run, process in list(active.items()):
            if process.poll() is None:
                continue
            del active[run]
            folder = run_folder(output, *run)
            if process.returncode:
                for other in active.values():
                    other.terminate()
                raise UserError(f"{folder} failed; see {folder}.log")
            after = json.loads((folder / "summary.json").read_text())["after"]
            console.print(f"{run[0]}, seed {run[1]}: accuracy {after['eval_exact_match']:.3f}")


def start_run(output: Path, arm: str, seed: int, overrides: list[str]) -> subprocess.Popen:
    assets, folder = output / "assets", run_folder(output, arm, seed)
    command = [sys.executable, "-m", "train", "--config", str(CONFIG), f"output_dir={folder}"]
    command += [f"student={assets}/student", f"teacher={assets}/teacher", f"seed={seed}"]
    command += [f"train_file={assets}/train.jsonl", f"eval_file={assets}/eval.jsonl"]
    command += [*ARMS[arm], *overrides]
    # More threads would slow down models of this size, with several runs at a time.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path(f"{folder}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_folder(output: Path, arm: str, seed: int) -> Path:
    return output / f"{arm}-{seed}"


def read_curves(output: Path, arm: str, seeds: int) -> list[list[tuple[int, float]]]:
    """One curve of (optimizer step, held-out accuracy) for each seed."""
    curves = []
    for seed in range(seeds):
        lines = (run_folder(output, arm, seed) / "eval.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        curves.append([(row["step"], row["eval_exact_match"]) for row in rows])
    return curves


def summarise(output: Path, seeds: int, accuracies: dict[str, float]) -> dict[str, Any]:
    """The figures of `summary.json`. Lists have one entry for each seed."""
    runs = {
        arm: [
            json.loads((run_folder(output, arm, seed) / "summary.json").read_text())
            for seed in range(seeds)
        ]
        for arm in ARMS
    }

    def after(figure: str) -> dict[str, list[float]]:
        return {arm: [run["after"][figure] for run in runs[arm]] for arm in ARMS}

    return {
        "heldout_accuracy": after("eval_exact_match"),
        **accuracies,
        "heldout_problems": HELD_OUT,
        "heldout_kl": after("eval_kl"),
        "seeds": list(range(seeds)),
        "steps": runs["hybrid"][0]["steps"],
        "tokens": {arm: [run["tokens"] for run in runs[arm]] for arm in ARMS},
    }


def verdict(summary: dict[str, Any]) -> str:
    """States whether the hybrid arm beats the other arms and the teacher for every seed."""
    accuracy, teacher = summary["heldout_accuracy"], summary["teacher_accuracy"]
    margins = [
        hybrid - max(imitation, reward, teacher)
        for hybrid, imitation, reward in zip(
            accuracy["hybrid"], accuracy["imitation"], accuracy["reward"], strict=True
        )
    ]
    if min(margins) > 0:
        return (
            "For every seed the hybrid arm is above both other arms and above the teacher, by "
            f"{min(margins):.3f} or more."
        )
    return (
        f"The hybrid arm is NOT above both other arms and the teacher for every seed: the margins "
        f"over the best of them are {', '.join(f'{margin:+.3f}' for margin in margins)}."
    )


def collapses(summary: dict[str, Any]) -> list[str]:
    """One line for each arm that ended below the student's start for at least one seed."""
    start = summary["start_accuracy"]
    lines = []
    for arm, values in summary["heldout_accuracy"].items():
        seeds = [
            seed for seed, value in zip(summary["seeds"], values, strict=True) if value < start
        ]
        if seeds:
            names = ", ".join(map(str, seeds))
            lines.append(f"The {arm} arm collapsed: it ended below the start for seed {names}.")
    return lines


def result_table(summary: dict[str, Any]) -> Table:
    columns = [f"seed {seed}" for seed in summary["seeds"]]
    table = Table("held-out accuracy", *columns, "mean")
    for arm, values in summary["heldout_accuracy"].items():
        cells = [f"{value:.3f}" for value in values]
        table.add_row(arm, *cells, f"{sum(values) / len(values):.3f}")
    table.add_section()
    for name, key in (("teacher", "teacher_accuracy"), ("student at the start", "start_accuracy")):
        table.add_row(name, *[""] * len(columns), f"{summary[key]:.3f}")
    return table


def report(summary: dict[str, Any]) -> str:
    """The content of `report.md`."""
    seeds = summary["seeds"]
    lines = [
        "# Two-digit addition with a teacher that drops the carry",
        "",
        f"Greedy accuracy on {summary['heldout_problems']} held-out problems after "
        f"{summary['steps']} optimizer steps. The teacher scores "
        f"{summary['teacher_accuracy']:.3f}, the student starts at "
        f"{summary['start_accuracy']:.3f}.",
        "",
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for arm, values in summary["heldout_accuracy"].items():
        cells = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {arm} | {cells} | {sum(values) / len(values):.3f} |")
    return "\n".join(
        [
            *lines,
            "",
            verdict(summary),
            *collapses(summary),
            "",
            "![held-out accuracy against optimizer steps](learning_curves.png)",
            "",
            "The arms have the same options (`config.yaml` in their folders), with two exceptions: "
            "imitation has `reward_weight=0`, and reward has `dense_weight=0`. All arms have "
            "`sampled_kl: false` and `gamma: 0`, so that only the reward drives the reward arm. "
            "No held-out problem is used in any training, including the supervised one.",
            "",
            f"Made by `python -m train.demo` in {summary['seconds']:.0f} s.",
            "",
        ]
    )


def draw_learning_curves(
    path: Path, curves: dict[str, list[list[tuple[int, float]]]], teacher_accuracy: float
) -> None:
    """Plots held-out accuracy against optimizer steps: a thin line per seed, a thick mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, seeds in curves.items():
        steps = [step for step, _ in seeds[0]]
        values = [[accuracy for _, accuracy in seed] for seed in seeds]
        for seed in values:
            axes.plot(steps, seed, color=COLOURS[arm], alpha=0.35, linewidth=0.9)
        mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
        axes.plot(steps, mean, color=COLOURS[arm], linewidth=2.4, label=f"{arm} (mean)")
    axes.axhline(teacher_accuracy, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("held-out greedy accuracy")
    axes.set_title("Two-digit addition, teacher without carry")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
