"""A run that ends early: it says what happened, and how to go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train.checkpoint import how_to_go_on
from train.config import TrainConfig

NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


class StoppedError(RuntimeError):
    """A run that can't go on, or was told to stop. The message says how to go on.

    Attributes:
        status: the exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def last_words(config: TrainConfig, *kinds: type[BaseException]) -> Iterator[None]:
    """Adds how to go on to exceptions of these kinds.

    Raises:
        StoppedError: in place of an OSError, and where memory is short. Models and the user's code,
            which may raise an OSError, too, have errors of their own, so it is about the run's
            files.
    """
    try:
        yield
    except kinds as error:
        words = how_to_go_on(config)
        if isinstance(error, OSError):
            file = error.filename or config.output_dir
            text = f"can't read or write {file!r}: {error.strerror or error}"
            raise StoppedError(f"{text}\n{words}", status=1) from error
        if isinstance(error, NO_MEMORY):
            raise StoppedError(
                f"out of memory: {error}\nLower per_device_train_batch_size (and raise "
                "gradient_accumulation_steps as much), per_device_eval_batch_size or "
                f"max_completion_length, or set bf16=true. {words}",
                status=1,
            ) from error
        error.args = (f"{str(error) or 'interrupted'}\n{words}",)
        raise


@contextmanager
def sigterm() -> Iterator[list[int]]:
    """A list to which the first SIGTERM is added; a second one does what it did before.

    Clusters send SIGTERM some time before they kill, so a run has a moment to save what it has.
    Ctrl-C remains a KeyboardInterrupt at once, as in any program: it also ends a reward that hangs.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # handlers are the main thread's
        return

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
