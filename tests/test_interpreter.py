"""The Triton kernels, on the CPU: every test that takes a backend, in a process of its own.

Triton decides when it is imported whether it interprets, and this process has imported it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


# In processes of their own, which run side by side under xdist. The last takes what is not named.
PARTS = {
    "forms": ["test_forms.py"],
    "edges": ["test_edges.py", "test_precision.py"],
    "teachers": ["test_teachers.py"],
    "sharded": ["test_sharded.py"],
    "meeting": ["test_meeting.py", "test_lean.py"],
    "others": [],
}


def files_of(part):
    named = {name for names in PARTS.values() for name in names}
    others = {path.name for path in TESTS.glob("test_*.py")} - named
    return [str(TESTS / name) for name in PARTS[part] or sorted(others)]


@pytest.mark.interpreter
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_pass_in_the_interpreter(part):
    options = ["--backend=triton", "-m", "not interpreter", "-q", "-W", "ignore::RuntimeWarning"]
    # numpy warns of overflows that are meant; what is skipped is no news here.
    options += ["-o", "addopts=--strict-markers"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files_of(part)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0, "see the output below"
    assert " passed" in run.stdout
