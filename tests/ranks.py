"""Tests that run in several processes at once, which form a group: real collectives (gloo).

`on_ranks` makes a test of a function that every rank is to call; pytest's side of it is the fixture
`ranks`, a `Pool`, and a rank's own is a `Ranks`.

    @every_size
    @on_ranks
    def test_that_all_get_the_sum(ranks):
        value = torch.tensor(ranks.rank)
        torch.distributed.all_reduce(value, group=ranks.group)
        assert value == sum(range(ranks.group.size()))
"""

import contextlib
import datetime
import functools
import inspect
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed

from cases import Case, Outcome
from hybrid_kernels import Mixture
from tolerance import ANOTHER_ORDER, assert_gradient, assert_values

# How much of a vocabulary each rank has: never the same, and at no 16-byte boundary.
SHARES = {1: (1.0,), 2: (0.31, 0.69), 4: (0.39, 0.08, 0.46, 0.07)}

# What the processes have imported when they begin. (Dynamo is what a custom op imports.)
IMPORTED = ["torch._dynamo", "hybrid_kernels", "pytest"]
GRACE = 5  # seconds to tell what became of the others, once a rank has failed
HANG = datetime.timedelta(minutes=10)  # of a collective; no test waits for it to pass or to fail

# Two processes are enough for the interpreter.
every_size = pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.native)], scope="session"
)
two_ranks = pytest.mark.parametrize("world_size", [2], scope="session")


def on_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """A test of what every rank calls, with its `Ranks` and the test's arguments."""

    @functools.wraps(test)
    def run(ranks: "Pool", **arguments: Any) -> None:
        __tracebackhide__ = True
        ranks.run(run, **arguments)

    return run


# -- on a rank ------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """What a rank knows of the group it is in."""

    backend: str
    group: torch.distributed.ProcessGroup

    @property
    def rank(self) -> int:
        return self.group.rank()

    def bounds(self, vocabulary: int, rank: int | None = None) -> tuple[int, int]:
        """Where a rank's shard begins and ends."""
        rank = self.rank if rank is None else rank
        *shares, _ = SHARES[self.group.size()]
        ends = [0]
        for left, share in zip(range(len(shares), 0, -1), shares, strict=True):
            wanted = max(ends[-1] + 1, round(ends[-1] + share * vocabulary))
            ends.append(min(wanted, vocabulary - left))
        ends.append(vocabulary)
        return ends[rank], ends[rank + 1]

    def shard(self, case: Case) -> Case:
        """This rank's part of a case: a view into the whole, so that rows have gaps."""
        first, last = self.bounds(case.vocabulary)

        def view(stored: torch.Tensor) -> torch.Tensor:
            return case.view(stored)[..., first:last]

        def part(teacher):
            if isinstance(teacher, Mixture):
                return Mixture([(weight, part(one)) for weight, one in teacher.members])
            return teacher[..., first:last] if isinstance(teacher, torch.Tensor) else teacher

        return replace(case, view=view, given=part(case.given))

    def assert_equals_whole(self, case: Case, method: str = "hybrid_loss", **options) -> Outcome:
        """Asserts that this rank's results are those of the whole; returns its outcome."""
        whole = self.on_one(lambda: getattr(case, method)(backend=self.backend, **options))
        own = getattr(self.shard(case), method)(
            backend=self.backend, process_group=self.group, **options
        )
        self.assert_result(own.result, whole.result)
        first, last = bounds = self.bounds(case.vocabulary)
        gradient = case.view(own.gradient)
        assert_gradient(gradient[..., first:last], case.view(whole.gradient), bounds, self.backend)
        others = torch.ones_like(gradient, dtype=torch.bool)
        others[..., first:last] = False
        assert not gradient[others].any(), "a gradient of what is another rank's"
        return own

    def on_one(self, function: Callable[[], Any]) -> Any:
        """What a function returns on one rank, which tells the others: none computes it again."""
        told = [function() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(told, group=self.group, group_src=0)
        return told[0]

    def assert_result(self, own: Any, whole: Any, tolerance: float = ANOTHER_ORDER) -> None:
        """Every field is that of the whole, and to the last bit what the other ranks have."""
        for name, expected in whole._asdict().items():
            got = getattr(own, name)
            assert (got is None) == (expected is None), name
            if got is not None:
                # (The loss multiplies log p(y) by numbers that are themselves only so exact.)
                factor = 1 + _largest(whole.log_prob) if name == "loss" else 1
                assert_values(got, expected, name, factor * tolerance)
        told = torch.stack([t.mean() if t.ndim else t for t in own if t is not None])
        everywhere = [torch.empty_like(told) for _ in range(self.group.size())]
        torch.distributed.all_gather(everywhere, told, self.group)
        for other in everywhere:
            assert_values(other, told, "what another rank tells", 0)


def _largest(values: torch.Tensor) -> float:
    return max(values[values.isfinite()].abs().tolist(), default=0.0)


# -- the processes --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a rank's function returned, or the traceback of its exception."""

    result: Any
    failure: str = ""


class Pool:
    """The processes of a group, which serve one call after another.

    Where a rank fails the others may wait for it in a collective: all processes are killed then,
    and the next call starts others.
    """

    def __init__(self, size: int, backend: str, folder: Path) -> None:
        self.size, self.backend, self.folder = size, backend, folder
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable, *args: Any, **options: Any) -> list[Any]:
        """What a module's function returns on each rank, which it gets a `Ranks` of.

        Raises:
            AssertionError: with the traceback of every rank that failed.
        """
        __tracebackhide__ = True
        if not self.processes:
            self._start()
        answers = self._ask(pickle.dumps((function, args, options)))
        if any(answer.failure for answer in answers):
            ranks: dict[str, list[str]] = {}
            for rank, answer in enumerate(answers):
                ranks.setdefault(answer.failure or "passed", []).append(str(rank))
            raise AssertionError("\n".join(f"rank {', '.join(r)}: {t}" for t, r in ranks.items()))
        return [answer.result for answer in answers]

    def _ask(self, task: bytes) -> list[Answer]:
        """The answers of all ranks. Without a limit, until one has failed."""
        answers: dict[Connection, Answer] = {}
        for pipe in self.pipes:
            with contextlib.suppress(ConnectionError):  # of a process that died: see below
                pipe.send_bytes(task)
        failed = False
        while missing := [pipe for pipe in self.pipes if pipe not in answers]:
            ready = wait(missing, GRACE if failed else None)
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[pipe] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    process = self.processes[self.pipes.index(pipe)]
                    process.join()
                    answers[pipe] = Answer(None, f"the process died, exit code {process.exitcode}")
                failed |= bool(answers[pipe].failure)
        if failed:
            silent = Answer(None, f"had not ended {GRACE} seconds after the others")
            found = [answers.get(pipe, silent) for pipe in self.pipes]
            self.close()
            return found
        return [answers[pipe] for pipe in self.pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        meeting = f"{tempfile.mkdtemp(dir=self.folder)}/meeting"
        for rank in range(self.size):
            pipe, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, self.backend, meeting)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that ours ends when the process does
            self.processes.append(process)
            self.pipes.append(pipe)

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection, rank: int, size: int, backend: str, meeting: str) -> None:
    """What a rank's process does, until it is killed or the one that started it ends."""
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' own affair
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import speed_up

        speed_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory with NaN
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=HANG
    )
    group = torch.distributed.group.WORLD
    assert group is not None
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        try:
            function, args, options = pickle.loads(task)
            result = inspect.unwrap(function)(Ranks(backend, group), *args, **options)
            answer = pickle.dumps(Answer(result))
        except BaseException as error:  # those of pytest are no `Exception`
            error.__traceback__ = error.__traceback__.tb_next or error.__traceback__
            answer = pickle.dumps(Answer(None, "".join(traceback.format_exception(error))))
        pipe.send_bytes(answer)


def _end_with_the_tests() -> None:
    """Even where the process waits in a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
