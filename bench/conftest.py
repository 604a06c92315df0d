"""Makes the cases of a suite pytest's parameters, and records what they were measured on."""

import os
import time

import pytest
import torch

from bench.linear import LINEAR_PROVIDERS
from bench.measure import provider_of
from bench.providers import PROVIDERS
from bench.suites import SUITES, Case
from bench.summary import cpu_name, versions

START = time.monotonic()
OUT_OF_TIME: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, default="cpu", help="what to measure")
    parser.addoption(
        "--deadline", type=float, default=float("inf"), help="seconds after which no case starts"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        suite = str(metafunc.config.getoption("--suite"))
        metafunc.parametrize("case", [_unless_missing(case) for case in SUITES[suite]()], ids=str)


def _unless_missing(case: Case):
    missing = provider_of(case).missing()
    reason = f"the peer {case.provider} cannot run here: {missing}"
    return pytest.param(case, marks=pytest.mark.skipif(bool(missing), reason=reason))


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    deadline: float = request.config.option.deadline
    if time.monotonic() - START > deadline:
        OUT_OF_TIME.append(request.node.name)  # the results list these
        # How many cases fit is known only now, so this cannot be a mark.
        pytest.skip(f"not started: --deadline={deadline:g} seconds had passed")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    linear = "linear" in str(config.getoption("--suite"))
    peers = LINEAR_PROVIDERS if linear else PROVIDERS
    missing = {name: peer.missing() for name, peer in peers.items()}
    machine_info["hybrid_kernels"] = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        **versions(),
        "missing_peers": {name: reason for name, reason in missing.items() if reason},
        "out_of_time": OUT_OF_TIME,
    }
