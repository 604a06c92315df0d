"""Checkpoints that resume a run exactly.

A checkpoint is `checkpoints/step-000123/`:

    model/         the student and its tokenizer, as `transformers` saves them (safetensors)
    state.pt       the run's identity, steps done, the optimizer's moments, random states, data
                   position; tensors and plain values only, so that it loads with
                   `weights_only=True`
    config.yaml    the options of the run
    manifest.json  the size and the CRC-32 of each of these files, by which damage is found

That is all that is restored: a resumed run takes everything else from its own options.

A folder holds one run, whose identity is in `run_id` and in each checkpoint, and which goes on from
its last intact checkpoint only. A checkpoint of another folder starts a new run.
"""

import json
import math
import os
import random
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.config import TrainConfig, UserError
from train.files import (
    MANIFEST,
    DamagedError,
    atomic_directory,
    check_files,
    write_atomically,
    write_manifest,
)

_NAME = re.compile(r"step-(\d{6,})")
# How many steps the weights in `final/` have had.
FINAL_STEPS = ".steps"
_STATE = ("run_id", "step", "optimizer", "position", "random")
# Options that don't affect the numbers of the training. (`eval_file` doesn't either, but without a
# word one would compare evaluations on different prompts.)
_HARMLESS = (
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "logging_steps",
    "report_to",
    "eval_steps",
    "eval_metrics",
    "per_device_eval_batch_size",
)
# Options that a resumed run can't change.
_FROM_CHECKPOINT = ("student",)


def save_checkpoint(
    config: TrainConfig,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> Path:
    """Writes `checkpoints/step-<step>` completely or not at all.

    Args:
        state: tensors, numbers, strings and containers of them; the step and the random states are
            added here.
    """
    target = _path(Path(config.output_dir), step)
    with atomic_directory(target) as folder:
        save_model(folder / "model", model, tokenizer)
        _save_state({**state, "step": step, "random": random_state()}, folder / "state.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(config.as_options(), sort_keys=False))
        write_manifest(folder)
    return target


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes an ordinary `transformers` checkpoint.

    Raises:
        OSError: it can't be written.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The libraries in Rust have types of their own, or none, for what the system refuses.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _save_state(state: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # After an error, torch fails once more as it closes the archive, and shows that failure.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from.

    Attributes:
        folder: `checkpoints/step-<step>` of some run.
        state: what `save_checkpoint` was given, with `step` and `random`.
        own: whether it is of the run in `output_dir`, which goes on; else a new run starts there.
        student: where the run that saved it began, as the option says.
        changed: the options that affect the numbers of the training and differ from the
            checkpoint's.
        damaged: later checkpoints of the run, which can't be used, and what is wrong with each.
    """

    folder: Path
    state: dict[str, Any]
    own: bool
    student: str
    changed: list[str]
    damaged: dict[Path, str] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self.state["step"]

    def differences(self, config: TrainConfig) -> list[str]:
        """Says of the changed options whether they have an effect."""
        texts = []
        if kept := [name for name in self.changed if name in _FROM_CHECKPOINT]:
            texts.append(
                f"{', '.join(kept)}: differs from the checkpoint's, and has no effect: the weights "
                "are the checkpoint's"
            )
        if new := [name for name in self.changed if name not in _FROM_CHECKPOINT]:
            outcome = (
                "the run continues with the new ones and may not repeat the old run exactly"
                if self.step < config.max_steps
                else "that has no effect, because all steps are done"
            )
            texts.append(f"these options differ from the checkpoint's: {', '.join(new)}; {outcome}")
        return texts

    def set_damaged_aside(self) -> list[str]:
        """Renames the damaged checkpoints, whose steps will be saved again. Says so."""
        texts = []
        for folder, reason in self.damaged.items():
            aside = folder.with_name(f"{folder.name}.damaged")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}-again")
            folder.rename(aside)
            texts.append(f"{str(folder)!r} is damaged: {reason}. It is now {aside.name!r}")
        if texts:
            repeated = max(map(_step, self.damaged)) - self.step
            texts[-1] += (
                f", and the run goes on from {self.folder.name!r}: it repeats {repeated} more steps"
            )
        return texts


def find_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` names; None for a run from scratch.

    `latest` without any checkpoint is a run from scratch, too, so that the same command restarts a
    run that was killed before its first checkpoint.

    Raises:
        UserError: no checkpoint, or one from which no run in `output_dir` can go on.
    """
    output, option = Path(config.output_dir), config.resume_from_checkpoint
    metrics, final = output / "metrics.jsonl", output / "final"
    has_steps = metrics.exists() and metrics.stat().st_size > 0
    folders = _checkpoints(output)
    last = folders[0] if folders else None
    holds_run = has_steps or last is not None or final.exists()
    if option is None:
        if holds_run:
            raise UserError(
                f"output_dir: {config.output_dir!r} holds a run already; continue it with "
                "resume_from_checkpoint=latest, or choose another folder"
            )
        return None
    if option != "latest":
        folders = [Path(option)]
    found, done, own, damaged = None, 0, False, {}
    for folder in folders:
        try:
            own = option == "latest" or _is_same(folder, last)
            found = _read(folder, own, config, damaged)
            break
        except DamagedError as error:
            damaged[folder] = str(error)
    reasons = "; ".join(f"{str(folder)!r} is damaged: {text}" for folder, text in damaged.items())
    if damaged and found is None:
        if option == "latest":
            advice = "no checkpoint is intact. To start again, choose another output_dir"
        elif own:
            advice = "resume_from_checkpoint=latest goes on from the last one that is intact"
        else:
            advice = "name another checkpoint"
        raise UserError(f"resume_from_checkpoint: {reasons}; {advice}")
    if found is not None:
        done = found.step
        if holds_run and not found.own:
            go_on = (
                "to go on with the run there, use resume_from_checkpoint=latest; " if last else ""
            )
            raise UserError(
                f"resume_from_checkpoint: {option!r} is not the last checkpoint of the run in "
                f"{config.output_dir!r}, and a folder holds one run; {go_on}to start a new run "
                "from it, use another output_dir. (To take back the last steps of a run, first "
                "move the checkpoints after them away.)"
            )
        identity = output / "run_id"
        text = identity.read_text(errors="replace").strip() if identity.exists() else None
        here = found.folder if option == "latest" else last
        if found.own and not (text == found.state["run_id"] and here == _path(output, done)):
            raise UserError(
                f"resume_from_checkpoint: {str(here)!r} was not saved by the run in "
                f"{config.output_dir!r}: it is step {done} of the run {found.state['run_id']}, and "
                f"{str(identity)!r} holds {text!r}. Move it away, or choose another output_dir; if "
                "only that file is damaged, write the run into it"
            )
    if final.exists() and (steps := _final_steps(final)) > done:
        missing = f"is damaged ({reasons})" if damaged else "is missing"
        if math.isinf(steps):
            missing = f"is not known, because {FINAL_STEPS!r} in it holds no number"
        raise UserError(
            f"resume_from_checkpoint: {str(final)!r} is the end of a run whose last checkpoint "
            f"{missing}. Start a new run from it with student={final} in another output_dir, or "
            "first move it away"
        )
    if done > config.max_steps or (done == config.max_steps and not has_steps):
        raise UserError(
            f"max_steps: got {config.max_steps}, but the checkpoint was saved after {done} steps; "
            "ask for more"
        )
    return found


def _is_same(folder: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(folder) == os.path.realpath(other)


def how_to_go_on(config: TrainConfig) -> str:
    """What is left of a run that ends early, for its last words."""
    if folders := _checkpoints(Path(config.output_dir)):
        return (
            f"The last checkpoint is {str(folders[0])!r}; go on from it with "
            "resume_from_checkpoint=latest"
        )
    again = config.resume_from_checkpoint or "latest"
    return f"There is no checkpoint yet: start again with resume_from_checkpoint={again}"


def _checkpoints(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, the last one first."""
    folders = [path for path in _path(output, 0).parent.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _final_steps(final: Path) -> float:
    """How many steps the weights in `final/` have had; infinity if that can't be known."""
    try:
        return int((final / FINAL_STEPS).read_text())
    except (FileNotFoundError, ValueError):
        return math.inf


def run_id(output: Path, resumed: Checkpoint | None) -> str:
    """The identity of the run that goes on, or of a new one, which is written to its folder."""
    if resumed is not None and resumed.own:
        return resumed.state["run_id"]
    identity = uuid.uuid4().hex
    write_atomically(output / "run_id", identity + "\n")
    return identity


def _path(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def _read(folder: Path, own: bool, config: TrainConfig, damaged: dict[Path, str]) -> Checkpoint:
    """The arguments `own` and `damaged` are the fields of the result.

    Raises:
        UserError: `save_checkpoint` has not written this folder.
        DamagedError: it has, but the files have changed.
    """
    if not own and not (folder / "state.pt").exists() and not (folder / MANIFEST).exists():
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} is not a checkpoint; give a folder such as "
            f"{config.output_dir}/checkpoints/step-000100, or latest"
        )
    check_files(folder, needed=("state.pt", "config.yaml"))
    file = folder / "state.pt"
    try:
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
        file = folder / "config.yaml"
        saved = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        student = saved["student"]
        old = _comparable(saved)
    except Exception as error:  # of whatever type: that depends on the bytes in the file
        raise DamagedError(f"{file.name} can't be read: {error!r}") from error
    if missing := [key for key in _STATE if key not in state]:
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} lacks {', '.join(missing)}: another version "
            f"of this code has written it. Start a new run with student={folder}/model"
        )
    new = _comparable(config.as_options())
    changed = [key for key in new if key not in _HARMLESS and new[key].isdisjoint(old.get(key, ()))]
    return Checkpoint(folder, state, own, student, changed, damaged)


def _comparable(options: dict[str, Any]) -> dict[str, set[str]]:
    """Each option as text, as it is and with `{output_dir}` for that folder, which may move."""
    folder = json.dumps(options["output_dir"])[:-1] + "/"
    texts = {key: json.dumps(value, sort_keys=True) for key, value in options.items()}
    return {key: {text, text.replace(folder, '"{output_dir}/')} for key, text in texts.items()}


def random_state() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # get_state(legacy=False) would return a dict
    name, keys, position, has_gauss, gauss = numpy_state
    state: dict[str, Any] = {
        "python": json.dumps(random.getstate()),
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        # Of the run's device only: the machine that resumes may have another number of them.
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets the global generators of Python, NumPy and torch to what `random_state` returned."""
    version, keys, gauss = json.loads(state["python"])
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
