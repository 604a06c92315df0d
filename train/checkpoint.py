"""Folders that are written completely or not at all, and checkpoints that resume a run exactly.

A checkpoint is `checkpoints/step-000123/`:

    model/       the student and its tokenizer, as `transformers` saves them (safetensors)
    state.pt     moments of the optimizer, random states, data position; tensors and plain values
                 only, so that it loads with `weights_only=True`
    config.yaml  the options of the run
"""

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from train.config import TrainConfig, UserError

_NAME = re.compile(r"step-(\d{6,})")


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


def save_checkpoint(
    config: TrainConfig,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
) -> Path:
    """Writes `checkpoints/step-<step>` completely or not at all.

    Args:
        state: tensors, numbers, strings and containers of them; the random states are added here.
    """
    target = Path(config.output_dir) / "checkpoints" / f"step-{step:06d}"
    with atomic_directory(target) as folder:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        torch.save({**state, "step": step, "random": _random_state()}, folder / "state.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(config.as_options(), sort_keys=False))
    return target


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The folder that `resume_from_checkpoint` names; None for a run from scratch.

    `latest` without any checkpoint is a run from scratch, too, so that the same command restarts a
    run that was killed before its first checkpoint.

    Raises:
        UserError: a path that is not a checkpoint.
    """
    option = config.resume_from_checkpoint
    if option is None:
        return None
    if option == "latest":
        folders = (Path(config.output_dir) / "checkpoints").glob("step-*")
        complete = [folder for folder in folders if _NAME.fullmatch(folder.name)]
        return max(complete, key=lambda folder: int(folder.name[5:]), default=None)
    if not (Path(option) / "state.pt").is_file():
        raise UserError(
            f"resume_from_checkpoint: {option!r} is not a checkpoint; give a folder such as "
            f"{config.output_dir}/checkpoints/step-000100, or latest"
        )
    return Path(option)


def load_state(folder: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, `step` and `random` included."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def changed_options(folder: Path, config: TrainConfig) -> list[str]:
    """The options that affect the numbers of a run and differ from the checkpoint's."""
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    harmless = {"output_dir", "resume_from_checkpoint", "save_steps", "logging_steps", "report_to"}
    current = config.as_options()
    return [key for key in current if key not in harmless and current[key] != saved.get(key)]


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # get_state(legacy=False) would return a dict
    name, keys, position, has_gauss, gauss = numpy_state
    state: dict[str, Any] = {
        "python": json.dumps(random.getstate()),
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets the global generators of Python, NumPy and torch to what `_random_state` returned."""
    version, keys, gauss = json.loads(state["python"])
    random.setstate((version, tuple(keys), gauss))
    name, numpy_keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(numpy_keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
