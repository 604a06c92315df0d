"""Plots take longer than a few steps, so they are drawn only in tests with the fixture `plots`."""

from pathlib import Path

import pytest
from helpers import rows, run_options

from train.config import make_config
from train.loop import train


@pytest.fixture
def plots():
    pass


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("train.report.draw_plots", lambda *_: None)


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> Path:
    """The output of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    train(make_config(run_options(folder)))
    assert [row["step"] for row in rows(folder / "run")] == list(range(1, 7))
    return folder / "run"
