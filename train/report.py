"""The output of a run: files, trackers, a progress bar, plots, and a summary at the end."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import hybrid_kernels
from train.batch import MicroBatch
from train.checkpoint import Checkpoint
from train.config import ENVIRONMENT, TrainConfig, printable
from train.files import write_atomically

SAMPLES_PER_EVALUATION = 8
LARGE_MISMATCH = 0.1  # nats; rounding to bf16 leaves a few hundredths
_RECORDS = ("metrics.jsonl", "eval.jsonl", "samples.jsonl")


class RunLog:
    """Writes everything that a run writes except checkpoints.

    `metrics.jsonl` gets one object per step, `eval.jsonl` one per evaluation, and `samples.jsonl` a
    few responses. Lines about steps that are still to come are dropped: a killed run has left them.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, resumed: Checkpoint | None
    ) -> None:
        self.console = Console(soft_wrap=True)
        self._config = config
        self._accelerator = accelerator
        self._output = Path(config.output_dir)
        done = resumed.step if resumed else 0
        # The first step of which records will be added; 0 is the evaluation before the run.
        first = done + 1 if resumed and resumed.own else 0
        dropped = [_drop_from(self._output / name, first) for name in _RECORDS]
        self._files = {name: (self._output / name).open("a", encoding="utf-8") for name in _RECORDS}
        metrics, evaluations = (_read(self._output / name) for name in _RECORDS[:2])
        # The step of the last evaluation.
        self.evaluated = evaluations[-1]["step"] if evaluations else None
        if done < config.max_steps:  # else the options have no effect
            options = {**config.as_options(), ENVIRONMENT: environment()}
            text = yaml.safe_dump(options, sort_keys=False)
            write_atomically(self._output / "config.yaml", text)
        if config.report_to != "none":
            options = {"tensorboard": {"purge_step": first}}
            accelerator.init_trackers("train", init_kwargs=options)
        if resumed is not None:
            self._say(f"resumed from {resumed.folder}, {done} steps done")
        elif config.resume_from_checkpoint:
            self.console.print("no checkpoint yet: starting from scratch")
        if dropped[0][0]:
            self.console.print(f"dropped the records of {dropped[0][0]} later steps")
        for name, (_, unreadable) in zip(_RECORDS, dropped, strict=True):
            if unreadable:
                self.warn(f"{name}: dropped {unreadable} lines that are no records")
        steps = {row["step"] for row in metrics}
        if (
            resumed is not None
            and resumed.own
            and (missing := done + 1 - min(steps, default=1) - len(steps))
        ):
            self.warn(f"{_RECORDS[0]} has no record of {missing} of the {done} steps that are done")
        for text in resumed.differences(config) if resumed else ():
            self.warn(text)
        if config.top_k or config.top_p < 1:
            self.warn(
                f"top_k={config.top_k}, top_p={config.top_p:g}: responses are drawn from a "
                "truncated distribution, but the gradient is computed for the whole one and so is "
                "biased. Use top_k=0 top_p=1 unless that is intended"
            )
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=config.max_steps, completed=done)
        self._progress.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the progress bar and closes the files, also after an error."""
        self._progress.stop()
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                if kind is None:  # else the first error is the one to see
                    raise

    def sync(self) -> None:
        """Waits until all records are on disk, so that a checkpoint never outlives its records."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(_as_it_is(text), style=style, highlight=False)

    def warn(self, text: str) -> None:
        self.console.print("[bold yellow]warning:[/]", _as_it_is(text), highlight=False)

    def step(self, row: dict[str, Any], batch: MicroBatch) -> None:
        """Records a step, and shows every `logging_steps`th one."""
        self._append("metrics.jsonl", row)
        line = (
            f"reward {row['reward']:.3f}  kl {row['kl']:.3f}  entropy {row['entropy']:.3f}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=row["step"], description=line)
        if row["step"] % self._config.logging_steps and row["step"] != self._config.max_steps:
            return
        if not self.console.is_terminal:
            print(f"step {row['step']}/{self._config.max_steps}  {line}", flush=True)
        self._accelerator.log(
            {key: value for key, value in row.items() if key != "step"}, step=row["step"]
        )
        scores = {name: float(values[0]) for name, values in batch.scores.items()}
        sample = {"prompt": batch.examples[0].prompt, "completion": batch.completions[0]}
        sample |= {**scores, "reward": float(batch.reward[0])}
        self._append("samples.jsonl", {"step": row["step"], "split": "train", **sample})

    def evaluation(self, step: int, result: dict[str, float], rows: Sequence[dict]) -> None:
        """Records the figures of an evaluation after `step` updates, and its first responses."""
        self._append("eval.jsonl", {"step": step, **result})
        for row in rows[:SAMPLES_PER_EVALUATION]:
            self._append("samples.jsonl", {"step": step, "split": "eval", **row})
        self._accelerator.log(result, step=step)
        figures = "  ".join(f"{name[5:]} {value:.3f}" for name, value in result.items())
        self._say(f"held out, after {step} steps: {figures}")

    def finish(self) -> dict[str, Any]:
        """Ends the progress bar, writes plots and `summary.json`, prints samples and warnings."""
        self._progress.stop()
        metrics, evaluations, samples = (_read(self._output / name) for name in _RECORDS)
        draw_plots(self._output / "plots", metrics, evaluations)
        summary = summarise(self._config, metrics, evaluations)
        write_atomically(self._output / "summary.json", json.dumps(summary, indent=2) + "\n")
        self.console.print(_sample_table(samples))
        for text in summary["warnings"]:
            self._say(text, style="bold red")
        self._say(f"written to {self._output}")
        return summary

    def _append(self, name: str, row: dict[str, Any]) -> None:
        # JSON has no NaN, which is the reward of what could not be scored.
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self._files[name].flush()


def environment() -> dict[str, str]:
    """The versions that a run depends on, and this code's commit if it is a git checkout."""
    versions = {
        "python": platform.python_version(),
        "hybrid_kernels": hybrid_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return versions
    return {**versions, "commit": described.stdout.strip()}


def summarise(config: TrainConfig, metrics: list[dict], evaluations: list[dict]) -> dict[str, Any]:
    """A few figures: evaluations before and after, means of the first and last tenth of steps.

    Steps without a value (None) are left out of the means; a mean of no value is None.
    """
    tenth = max(1, len(metrics) // 10)

    def mean(rows: list[dict], name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    summary: dict[str, Any] = {
        "steps": metrics[-1]["step"],
        "tokens": sum(row["tokens"] for row in metrics),
        "seconds": sum(row["seconds"] for row in metrics),
        "train": {
            name: {"first": mean(metrics[:tenth], name), "last": mean(metrics[-tenth:], name)}
            for name in ("reward", "kl", "entropy", "objective")
        },
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
        "warnings": [],
    }
    if evaluations:
        name = "eval_reward"
        if config.eval_metrics:
            name = "eval_" + config.eval_metrics[0].name
        first, last = summary["train"]["reward"].values()
        # A resumed run may have other metrics than before, and a score may be missing.
        values = [row[name] for row in evaluations if row.get(name) is not None]
        if None not in (first, last) and last > first and values and values[-1] < values[0]:
            summary["warnings"].append(
                f"The training reward rose ({first:.3f} to {last:.3f}) while "
                f"the held-out {name[5:]} fell ({values[0]:.3f} to {values[-1]:.3f}): the student "
                "may be exploiting the reward, or memorising the prompts."
            )
    forbidden = sum(row["teacher_forbidden"] for row in metrics)
    if forbidden:
        summary["warnings"].append(
            f"The teacher gave {forbidden} sampled tokens a probability of (nearly) zero; see "
            "teacher_floor and cost_clip."
        )
    mismatch = mean(metrics, "sampler_mismatch")
    if mismatch is not None and mismatch > LARGE_MISMATCH:
        summary["warnings"].append(
            f"Log-probabilities of the same tokens differ by {mismatch:.2f} nats between sampling "
            "and training, on average: the gradient is not that of the policy which is sampled. "
            "Is the student a causal model, whose logits don't depend on later tokens?"
        )
    return summary


def draw_plots(folder: Path, metrics: list[dict], evaluations: list[dict]) -> None:
    """Draws reward.png, kl.png, gradient_norms.png and objective.png against optimizer steps."""
    # Imported late, because it takes half a second, even if a run stops at a wrong option.
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)

    def draw(name: str, label: str, lines: dict[str, tuple[list[dict], str, str]]) -> None:
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for legend, (rows, key, style) in lines.items():
            rows = [row for row in rows if key in row]
            axes.plot(
                [row["step"] for row in rows], [row[key] for row in rows], style, label=legend
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=120)

    sampled, greedy = "training, sampled", "held out, greedy"
    draw(
        "reward",
        "mean reward",
        {sampled: (metrics, "reward", "-"), greedy: (evaluations, "eval_reward", "o--")},
    )
    draw(
        "kl",
        "KL(student || teacher), nats per token",
        {sampled: (metrics, "kl", "-"), greedy: (evaluations, "eval_kl", "o--")},
    )
    draw(
        "gradient_norms",
        "gradient norm over the parameters",
        {
            "whole step": (metrics, "grad_norm", "-"),
            "dense part, one micro-batch": (metrics, "grad_norm_dense", "o--"),
            "sparse part, one micro-batch": (metrics, "grad_norm_sparse", "s:"),
        },
    )
    draw("objective", "J at the final reward weight, nats", {sampled: (metrics, "objective", "-")})


def _sample_table(samples: list[dict]) -> Table:
    """The last few responses, to held-out prompts if there are any."""
    shown = [row for row in samples if row["split"] == "eval"] or samples
    table = Table("step", "prompt", "completion", "reward", title="samples")
    for row in shown[-SAMPLES_PER_EVALUATION:]:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = str(prompt[-1].get("content"))
        reward = "none" if row["reward"] is None else f"{row['reward']:.2f}"
        cells = (str(row["step"]), prompt[-60:], row["completion"][:80], reward)
        table.add_row(*map(_as_it_is, cells))
    return table


def _as_it_is(text: str) -> Text:
    """A text from outside, in which `[/x]`, `\\[x\\]` and `:x:` are not markup."""
    return Text(printable(text))


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _drop_from(path: Path, step: int) -> tuple[int, int]:
    """Drops the lines of this step and later ones, and those that are no records.

    Returns:
        how many lines of later steps that were, and how many others, without the last one, which
        a crash may cut short.
    """
    if not path.exists():
        return 0, 0
    earlier, dropped, unreadable = [], 0, 0
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in (*lines, last):
        try:
            is_earlier = json.loads(line)["step"] < step
        except (ValueError, TypeError, KeyError):
            unreadable += line is not last
            continue
        if is_earlier:
            earlier.append(line + "\n")
        else:
            dropped += 1
    write_atomically(path, "".join(earlier))
    return dropped, unreadable
