"""The suite's cases as parameters, and the stamp of what they were measured on."""

import importlib.metadata
import os
import platform
import subprocess
import time

import pytest
import torch

from bench.linear import LINEAR_PROVIDERS
from bench.providers import PROVIDERS
from bench.suites import SUITES

START = time.monotonic()
OUT_OF_TIME: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "gpu" if torch.cuda.is_available() else "cpu"
    parser.addoption("--suite", choices=SUITES, default=default, help="what to measure")
    parser.addoption(
        "--deadline", type=float, default=float("inf"), help="seconds after which no case starts"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        suite = str(metafunc.config.getoption("--suite"))
        metafunc.parametrize("case", SUITES[suite](), ids=str)


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    deadline: float = request.config.option.deadline
    if time.monotonic() - START > deadline:
        OUT_OF_TIME.append(request.node.name)
        pytest.skip(f"not begun: --deadline={deadline:g} seconds had passed")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if "gpu" in str(request.config.getoption("--suite")) else "cpu"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    suite = str(config.getoption("--suite"))
    gpu = "gpu" in suite
    peers = LINEAR_PROVIDERS if "linear" in suite else PROVIDERS
    missing = {name: peer.missing() for name, peer in peers.items()}
    machine_info["hybrid_kernels"] = {
        "device": torch.cuda.get_device_name() if gpu else _cpu(),
        "driver": _driver() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "missing_peers": {name: reason for name, reason in missing.items() if reason},
        "out_of_time": OUT_OF_TIME,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
