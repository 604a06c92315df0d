"""Makes Triton's interpreter faster, and runs the programs of a kernel side by side.

`speed_up` makes it three to four times as fast. The interpreter runs one program after another, so
that programs which wait for each other would never end. Under `interleaved` each is a greenlet that
gives way before and after every atomic operation and, if requested, every load and store; a seed
decides which one continues, so that an order can be repeated.

    with interleaved(seed=1):
        kernel[grid](...)

Every access takes effect at once for all programs, and a tile is accessed as a whole. So this finds
deadlocks, reads that come before their writes, rows that overtake each other, and wrong counters.
It can't find missing fences or barriers, nor races between warps.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import greenlet
import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

ATOMICS = ("create_atomic_rmw", "create_atomic_cas")
ACCESSES = ("create_masked_load", "create_masked_store")


def speed_up() -> None:
    """Makes the interpreter three to four times as fast, permanently, with the same results.

    Unchanged, it patches Triton's language at every call of a helper, and undoes that after every
    launch. It makes a new table of dtypes for each look-up, repeats all integer arithmetic in 64
    bits to detect overflows, and makes new types and shapes for every tensor, even where a
    broadcast changes neither.
    """
    patch, look_up = interpreter._patch_lang, interpreter._get_np_dtype
    seen, patched, dtypes = set(), set(), {}

    def patch_once(function: Callable) -> _NoUndo:
        if id(function.__globals__) not in seen:
            seen.add(id(function.__globals__))
            languages = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
            if not languages <= patched:
                patched.update(languages)
                patch(function)
        return _NO_UNDO

    def look_up_once(dtype: tl.dtype) -> np.dtype:
        name = str(dtype.scalar)
        if name not in dtypes:
            dtypes[name] = look_up(dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _make_once(tl.tensor, lambda handle, type: str(type), ("handle", "type"))
    _make_once(tl.block_type, lambda element, shape: (str(element), *map(_number, shape)))
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(self, left: tl.tensor, right: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        alike = left.type.is_block() == right.type.is_block()
        if alike and left.handle.data.shape == right.handle.data.shape:
            return left, right
        return broadcast(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast_others


def _make_once(kind: Any, key: Callable, unshared: tuple[str, ...] = ()) -> None:
    """Lets objects whose arguments have the same key share all attributes but `unshared`, which
    have the names of the first arguments."""
    make, made = kind.__init__, {}

    def look_up(self, *arguments) -> None:
        name = key(*arguments)
        if name not in made:
            make(self, *arguments)
            made[name] = dict(vars(self))
        vars(self).update(made[name], **dict(zip(unshared, arguments, strict=False)))

    kind.__init__ = look_up


def _number(size: int | tl.constexpr) -> int:
    return size.value if isinstance(size, tl.constexpr) else size


class _NoUndo:
    """Replaces the object that would undo a patch."""

    def restore(self) -> None:
        pass


_NO_UNDO = _NoUndo()


class Deadlock(AssertionError):
    """The programs did not end within the limit."""


@contextlib.contextmanager
def interleaved(seed: int = 0, limit: int = 100_000, loads: bool = True) -> Iterator[None]:
    """Runs the programs of kernels that are launched in this context side by side.

    Args:
        seed: determines the order.
        limit: the most turns that all programs of a launch may take together.
        loads: whether programs give way at loads and stores, too. Atomic operations alone are
            faster, and enough where programs read what others write only after a wait.

    Raises:
        Deadlock: programs still ran when the limit was reached.
    """
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    launch = executor.__call__
    draw = random.Random(seed)
    scheduler = greenlet.getcurrent()

    def giving_way(operation: Callable) -> Callable:
        def wrapped(*args, **options):
            _give_way(scheduler)
            result = operation(*args, **options)
            _give_way(scheduler)
            return result

        return wrapped

    def launch_side_by_side(self, *args, **options):
        # The executor calls the kernel once for each program. The calls are collected, and all run
        # at the last one.
        kernel, programs = self.fn, []

        def collect(**values):
            programs.append((builder.grid_idx, greenlet.greenlet(lambda: kernel(**values))))
            if builder.grid_idx == tuple(size - 1 for size in builder.grid_dim):
                _run(builder, programs, draw, limit)

        self.fn = _LooksLike(kernel, collect)
        try:
            return launch(self, *args, **options)
        except InterpreterError as error:
            if isinstance(error.__cause__, Deadlock):
                raise error.__cause__ from None
            raise

    names = ATOMICS + (ACCESSES if loads else ())
    originals = {name: getattr(builder, name) for name in names}
    for name, operation in originals.items():
        setattr(builder, name, giving_way(operation))
    executor.__call__ = launch_side_by_side
    try:
        yield
    finally:
        executor.__call__ = launch
        for name in originals:
            delattr(builder, name)  # uncovers the method


def _give_way(scheduler: greenlet.greenlet) -> None:
    if greenlet.getcurrent() is not scheduler:
        scheduler.switch()


def _run(builder: Any, programs: list, draw: random.Random, limit: int) -> None:
    """Gives programs turns in random order until all have ended."""
    alive = list(programs)
    try:
        for _ in range(limit):
            if not alive:
                return
            choice = draw.randrange(len(alive))
            index, program = alive[choice]
            builder.set_grid_idx(*index)
            program.switch()
            if program.dead:
                alive.pop(choice)
        if alive:
            waiting = ", ".join(str(index) for index, _ in alive[:8])
            raise Deadlock(f"{len(alive)} programs still ran after {limit} turns: {waiting}")
    finally:
        for _, program in alive:
            program.throw()  # ends it


class _LooksLike:
    """Calls one function and shows the parameters and globals of another, as the executor asks."""

    def __init__(self, shown: Callable, called: Callable) -> None:
        self.__name__, self.__globals__ = shown.__name__, shown.__globals__
        self.__annotations__ = shown.__annotations__
        self.__signature__ = inspect.signature(shown)
        self._called = called

    def __call__(self, **values):
        return self._called(**values)
