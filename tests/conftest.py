"""Which tests run, with which arguments, and on which backend and device.

A test with the fixture `backend` runs with the torch backend on the CPU and, where there is a GPU,
with both backends on that (mark `gpu`). `--backend triton` runs only these tests, with the Triton
kernels in the interpreter on the CPU. `--backend meta` launches what a GPU would, on tensors
without values (`bench/standin.py`); `bench/gpu/stages.py` uses it.

A parametrized test runs in just enough combinations to have every argument once; `--all` runs all.
"""

import collections
import contextlib
import importlib.util
import itertools
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

# Other processes and later runs reuse the kernels that are compiled here.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / ".triton"))

# The tensors are small, and threads would waste shared cores by spinning.
torch.set_num_threads(1)


# How many examples hypothesis tries with `--all`, natively and in the interpreter.
EXAMPLES = {"suite": (20, 6), "fuzz": (300, 60)}


class Target(NamedTuple):
    backend: str
    device: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=("torch", "triton", "meta"),
        default="torch",
        help="triton: only the tests that take a backend, on the CPU under TRITON_INTERPRET=1; "
        "meta: on tensors without values, under bench/standin.py",
    )
    parser.addoption(
        "--all",
        action="store_true",
        help="every combination of arguments, not each argument once; more hypothesis examples",
    )
    parser.addoption(
        "--examples",
        type=int,
        help="how many examples hypothesis tries; with --hypothesis-seed, new ones for each seed",
    )
    parser.addoption(
        "--orders",
        type=int,
        help="how many orders of programs that share a row are tried (test_meeting.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if _interpreted(config):
        _interpret(config)
    for profile, (native, interpreted) in EXAMPLES.items():
        examples = interpreted if _interpreted(config) else native
        if not config.getoption("--all"):
            examples //= 3
        hypothesis.settings.register_profile(
            profile,
            deadline=None,
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
            max_examples=config.getoption("--examples") or examples,
            derandomize=config.getoption("--hypothesis-seed") is None,
            print_blob=True,
        )
    hypothesis.settings.load_profile("suite")


def _interpret(config: pytest.Config) -> None:
    """Turns on the interpreter in this process, which works only before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.exit("--backend triton: nothing to test, as Triton is not installed", returncode=0)
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "--backend triton: Triton was imported first; set TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import speed_up

    speed_up()
    # Kernels overflow and make NaN on purpose.
    for cause in ("overflow", "invalid value", "divide by zero"):
        config.addinivalue_line("filterwarnings", f"ignore:{cause} encountered:RuntimeWarning")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # No test in train/ has a backend, and importing what they test takes seconds.
    return True if _interpreted(config) and collection_path.name == "train" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    if _interpreted(metafunc.config):
        targets = [pytest.param(Target("triton", "cpu"), id="triton")]
    elif metafunc.config.getoption("--backend") == "meta":
        targets = [pytest.param(Target("triton", "meta"), id="triton-meta", marks=pytest.mark.gpu)]
    else:
        targets = [pytest.param(Target("torch", "cpu"), id="torch")]
        # Without a GPU, only the tests in test_gpu.py are reported as skipped.
        ranks = "ranks" in metafunc.fixturenames  # whose processes are on the CPU
        for name in ("torch", "triton") if torch.cuda.is_available() and not ranks else ():
            mark = pytest.mark.gpu
            targets.append(pytest.param(Target(name, "cuda"), id=f"{name}-cuda", marks=mark))
    metafunc.parametrize("target", targets, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)  # combinations are chosen from the tests that -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("[" in argument for argument in config.args)  # combinations requested by id
    everything = named or config.getoption("--all")
    if _interpreted(config):
        others = [item for item in items if "target" not in getattr(item, "fixturenames", ())]
        others += [item for item in items if item.get_closest_marker("native")]
        if not everything:
            others += [item for item in items if item.get_closest_marker("twin")]
    else:
        # On a GPU the inputs decide the form of a kernel (test_gpu.py), and programs run side by
        # side anyway.
        interpreter = {"form", "interleaved", "unpatched"}
        others = [item for item in items if interpreter & set(getattr(item, "fixturenames", ()))]
    if not everything:
        others += [item for item in items if item.get_closest_marker("full")]
    _deselect(config, items, set(others))
    if config.getoption("--backend") != "meta" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none here"))
    tests = collections.defaultdict(list)
    for item in items:
        same_rows = _interpreted(config) and item.get_closest_marker("gemms") and not named
        if same_rows or not everything:
            target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
            tests[item.nodeid.partition("[")[0], target].append(item)
    redundant = [set(group) - set(each_argument_once(group)) for group in tests.values()]
    _deselect(config, items, set().union(*redundant))


def _deselect(config: pytest.Config, items: list[pytest.Item], others: set[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item in others])
    items[:] = [item for item in items if item not in others]


def each_argument_once(combinations: list[pytest.Item]) -> list[pytest.Item]:
    """A few of a test's combinations in which every argument of every `parametrize` appears. Each
    choice adds the most new arguments and, among equals, the most new pairs of arguments."""
    if len(combinations) == 1:
        return combinations
    arguments = {item: _arguments(item) for item in combinations}
    pairs = {item: set(itertools.combinations(values, 2)) for item, values in arguments.items()}
    missing, seen_pairs = set().union(*arguments.values()), set()
    chosen = []
    while missing:
        gains = [
            (len(missing.intersection(arguments[item])), len(pairs[item] - seen_pairs))
            for item in combinations
        ]
        best = combinations[gains.index(max(gains))]
        chosen.append(best)
        missing.difference_update(arguments[best])
        seen_pairs |= pairs[best]
    return chosen


def _arguments(item: pytest.Item) -> list[tuple]:
    """The arguments of a test, of which several from one `parametrize` count as one."""
    single = dict(item.callspec.params)
    grouped = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        grouped.append(tuple((name.strip(), id(single.pop(name.strip()))) for name in names))
    return grouped + [(name, id(value)) for name, value in single.items()]


def _interpreted(config: pytest.Config) -> bool:
    return config.getoption("--backend") == "triton"


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="session")
def backend(target: Target) -> str:
    return target.backend


@pytest.fixture(scope="session")
def device(target: Target) -> str:
    return target.device


@pytest.fixture(scope="session")
def ranks(world_size, backend, tmp_path_factory):
    """A pool of `world_size` processes, in which tests run (see `ranks.py`)."""
    from ranks import Pool

    pool = Pool(world_size, backend, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def interleaved(target):
    """The context manager of `interpreter.py`, for tests that only the interpreter can run."""
    return _interleaved()


def _interleaved():
    from interpreter import interleaved

    return interleaved


@pytest.fixture(scope="session")
def orders(request: pytest.FixtureRequest) -> int:
    config = request.config
    return config.getoption("--orders") or (2 if config.getoption("--all") else 1)


@pytest.fixture
def side_by_side(request: pytest.FixtureRequest, target: Target) -> Iterator[None]:
    """Lets programs that share a row run side by side. On a GPU they do; in the interpreter they
    take turns, in an order that depends on the test's name."""
    with contextlib.ExitStack() as stack:
        if target == Target("triton", "cpu"):
            seed = zlib.crc32(request.node.nodeid.encode())
            stack.enter_context(_interleaved()(seed, loads=False))
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN (the largest integer, true), so that an unwritten entry shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(target: Target, side_by_side: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts short rows into several tiles and slices, as is done with whole vocabularies."""
    if target.backend == "triton":
        from hybrid_kernels.triton_backend import plan

        for name in ("MAX_BLOCK_V", "MAX_BLOCK_V_TWO_SWEEPS", "INTERPRETED_BLOCK_V"):
            monkeypatch.setattr(plan, name, 32)
        monkeypatch.setattr(plan, "INTERPRETED_SLICE", 72)
