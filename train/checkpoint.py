"""Folders that are written completely or not at all, and checkpoints that resume a run exactly.

A checkpoint is `checkpoints/step-000123/`:

    model/       the student and its tokenizer, as `transformers` saves them (safetensors)
    state.pt     the run's identity, steps done, the optimizer's moments, random states, data
                 position; tensors and plain values only, so that it loads with `weights_only=True`
    config.yaml  the options of the run

That is all that is restored: a resumed run takes everything else from its own options.

A folder holds one run, whose identity is in `run_id` and in each checkpoint, and which goes on from
its last checkpoint only. A checkpoint of another folder starts a new run.
"""

import fcntl
import json
import os
import random
import re
import shutil
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.config import TrainConfig, UserError

_NAME = re.compile(r"step-(\d{6,})")
_FILES = ("model", "state.pt", "config.yaml")
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


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and is on disk by then.

    A crash at any moment leaves no `target`, the old one, or the complete new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".partial-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    for path in sorted(temporary.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(temporary)
    replaced = target.parent / f".replaced-{target.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file such that a crash leaves its old content or all of `text`."""
    temporary = path.with_name(f".partial-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps other processes out of a run's folder.

    If this process is killed, the lock ends with it and with the processes that it forked, such as
    workers of a reward.

    Raises:
        UserError: another process has the lock, or the folder can't be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: can't write to {str(output)!r}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"output_dir: {str(output)!r} is in use by {file.read() or 'another process'}, or "
                "by a process that it started; wait for their end, or choose another folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"output_dir: the file system of {str(output)!r} has no locks ({error.strerror}); "
                "don't start a second run there",
                stacklevel=3,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        torch.save({**state, "step": step, "random": random_state()}, folder / "state.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(config.as_options(), sort_keys=False))
    return target


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
    """

    folder: Path
    state: dict[str, Any]
    own: bool
    student: str
    changed: list[str]

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
    folders = [path for path in _path(output, 0).parent.glob("*") if _NAME.fullmatch(path.name)]
    last = max(folders, key=lambda path: int(path.name[5:]), default=None)
    holds_run = has_steps or last is not None or final.exists()
    if option is None:
        if holds_run:
            raise UserError(
                f"output_dir: {config.output_dir!r} holds a run already; continue it with "
                "resume_from_checkpoint=latest, or choose another folder"
            )
        return None
    folder = last if option == "latest" else Path(option)
    found, done = None, 0
    if folder is not None:
        own = last is not None and folder.resolve() == last.resolve()
        found = _read(folder, own, config)
        done = found.step
        if holds_run and not own:
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
        saved_here = identity.exists() and identity.read_text().strip() == found.state["run_id"]
        if own and not (saved_here and last == _path(output, done)):
            raise UserError(
                f"resume_from_checkpoint: {str(last)!r} was not saved by the run in "
                f"{config.output_dir!r}. Move it away, or choose another output_dir"
            )
    steps = final / FINAL_STEPS
    if final.exists() and not (steps.exists() and int(steps.read_text()) <= done):
        raise UserError(
            f"resume_from_checkpoint: {str(final)!r} is the end of a run whose last checkpoint is "
            f"missing. Start a new run from it with student={final} in another output_dir, or "
            "first move it away"
        )
    if done > config.max_steps or (done == config.max_steps and not has_steps):
        raise UserError(
            f"max_steps: got {config.max_steps}, but the checkpoint was saved after {done} steps; "
            "ask for more"
        )
    return found


def run_id(output: Path, resumed: Checkpoint | None) -> str:
    """The identity of the run that goes on, or of a new one, which is written to its folder."""
    if resumed is not None and resumed.own:
        return resumed.state["run_id"]
    identity = uuid.uuid4().hex
    write_atomically(output / "run_id", identity + "\n")
    return identity


def _path(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:06d}"


def _read(folder: Path, own: bool, config: TrainConfig) -> Checkpoint:
    """Raises a UserError for a folder that `save_checkpoint` has not written."""
    if not all((folder / name).exists() for name in _FILES):
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} is not a checkpoint; give a folder such as "
            f"{config.output_dir}/checkpoints/step-000100, or latest"
        )
    file = folder / "state.pt"
    try:
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
        file = folder / "config.yaml"
        saved = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        student = saved["student"]
        old = _comparable(saved)
    except Exception as error:  # of whatever type: that depends on the bytes in the file
        raise UserError(
            f"resume_from_checkpoint: {str(file)!r} is damaged or can't be read: {error!r}"
        ) from error
    if missing := [key for key in _STATE if key not in state]:
        raise UserError(
            f"resume_from_checkpoint: {str(folder)!r} lacks {', '.join(missing)}: another version "
            f"of this code has written it. Start a new run with student={folder}/model"
        )
    new = _comparable(config.as_options())
    changed = [key for key in new if key not in _HARMLESS and new[key].isdisjoint(old.get(key, ()))]
    return Checkpoint(folder, state, own, student, changed)


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
