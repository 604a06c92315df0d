"""A run that ends early: it says what happened, and how to go on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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


# The handler that `sigterm` has replaced, while it has.
_replaced: list[Any] = []


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
        _restore()

    _replaced.append(signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    signal.signal(signal.SIGTERM, note)
    try:
        yield received
    finally:
        _restore()


def _restore() -> None:
    if _replaced:
        signal.signal(signal.SIGTERM, _replaced.pop())


# Processes that a reward forks must not inherit the handler: `terminate` would not end them. The
# signal waits meanwhile, since Python forgets those that come in the midst of a fork.


def _mask(how: int) -> None:
    if _replaced:
        signal.pthread_sigmask(how, {signal.SIGTERM})


def _in_child() -> None:
    if _replaced:
        _restore()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


os.register_at_fork(
    before=partial(_mask, signal.SIG_BLOCK),
    after_in_parent=partial(_mask, signal.SIG_UNBLOCK),
    after_in_child=_in_child,
)
