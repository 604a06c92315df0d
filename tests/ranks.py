"""Tests that run in several processes at once, which form a group: real collectives (gloo).

`on_ranks` makes a test of a function that every rank calls. Its argument `ranks` is the fixture of
that name, a `Pool`, in pytest's process, and a `Ranks` on each rank.

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

# The share of a vocabulary on each rank: all different, and cut at no 16-byte boundary.
SHARES = {1: (1.0,), 2: (0.31, 0.69), 4: (0.39, 0.08, 0.46, 0.07)}

# Modules that are imported once, before the processes are forked. Custom ops import Dynamo.
IMPORTED = ["torch._dynamo", "hybrid_kernels", "pytest"]
GRACE = 5  # seconds that the other ranks have to end once one has failed
HANG = datetime.timedelta(minutes=10)  # timeout of a collective, on which no test relies

# Two processes are enough for the interpreter.
every_size = pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.native)], scope="session"
)
two_ranks = pytest.mark.parametrize("world_size", [2], scope="session")


def on_ranks(test: Callable[..., None]) -> Callable[..., None]:
    """Makes a test of a function that every rank calls, with its `Ranks` as the first argument."""

    @functools.wraps(test)
    def run(ranks: "Pool", **arguments: Any) -> None:
        __tracebackhide__ = True
        ranks.run(run, **arguments)

    return run


# -- on a rank ------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """A rank's view of its group."""

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
            end = max(ends[-1] + 1, round(ends[-1] + share * vocabulary))
            ends.append(min(end, vocabulary - left))
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
        """Asserts that this rank's results equal those of the whole; returns its outcome."""
        whole = self.on_one(lambda: getattr(case, method)(backend=self.backend, **options))
        got = getattr(self.shard(case), method)(
            backend=self.backend, process_group=self.group, **options
        )
        self.assert_result(got.result, whole.result)
        first, last = bounds = self.bounds(case.vocabulary)
        gradient = case.view(got.gradient)
        assert_gradient(gradient[..., first:last], case.view(whole.gradient), bounds, self.backend)
        others = torch.ones_like(gradient, dtype=torch.bool)
        others[..., first:last] = False
        assert not gradient[others].any(), "gradient outside of this rank's shard"
        return got

    def on_one(self, function: Callable[[], Any]) -> Any:
        """Runs a function on one rank only, and returns its result on all."""
        result = [function() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(result, group=self.group, group_src=0)
        return result[0]

    def assert_result(self, result: Any, whole: Any, tolerance: float = ANOTHER_ORDER) -> None:
        """Asserts that fields equal those of the whole and, to the last bit, of the other ranks."""
        for name, expected in whole._asdict().items():
            got = getattr(result, name)
            assert (got is None) == (expected is None), name
            if got is not None:
                # The loss multiplies log p(y) by factors that have this error themselves.
                factor = 1 + _largest(whole.log_prob) if name == "loss" else 1
                assert_values(got, expected, name, factor * tolerance)
        means = torch.stack([t.mean() if t.ndim else t for t in result if t is not None])
        everywhere = [torch.empty_like(means) for _ in range(self.group.size())]
        torch.distributed.all_gather(everywhere, means, self.group)
        for other in everywhere:
            assert_values(other, means, "the result of another rank", 0)


def _largest(values: torch.Tensor) -> float:
    return max(values[values.isfinite()].abs().tolist(), default=0.0)


# -- the processes --------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a rank's function returned, or the traceback of its exception."""

    result: Any
    failure: str = ""


class Pool:
    """The processes of a group, which serve one call after another.

    When a rank fails, others may be waiting for it in a collective. So all processes are killed,
    and the next call starts new ones.
    """

    def __init__(self, size: int, backend: str, folder: Path) -> None:
        self.size, self.backend, self.folder = size, backend, folder
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable, *args: Any, **options: Any) -> list[Any]:
        """Calls a module's function on each rank, with its `Ranks`, and returns the results.

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
        """The answers of all ranks. There is no time limit until one has failed."""
        answers: dict[Connection, Answer] = {}
        for pipe in self.pipes:
            with contextlib.suppress(ConnectionError):  # the process died; handled below
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
            complete = [answers.get(pipe, silent) for pipe in self.pipes]
            self.close()
            return complete
        return [answers[pipe] for pipe in self.pipes]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        rendezvous = f"{tempfile.mkdtemp(dir=self.folder)}/meeting"
        for rank in range(self.size):
            pipe, child_end = context.Pipe()
            arguments = (child_end, rank, self.size, self.backend, rendezvous)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            child_end.close()  # so that our end closes when the process dies
            self.processes.append(process)
            self.pipes.append(pipe)

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection, rank: int, size: int, backend: str, rendezvous: str) -> None:
    """Serves calls in a rank's process, until it is killed or its parent ends."""
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the parent handles
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreter import speed_up

        speed_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills new memory with NaN
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=HANG
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
        except BaseException as error:  # pytest's are not derived from `Exception`
            error.__traceback__ = error.__traceback__.tb_next or error.__traceback__
            answer = pickle.dumps(Answer(None, "".join(traceback.format_exception(error))))
        pipe.send_bytes(answer)


def _end_with_the_tests() -> None:
    """Ends this process with its parent, even while it waits in a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
