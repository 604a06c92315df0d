"""Runs draw no plots, which take longer than a few steps, but for tests that ask for `plots`."""

import pytest


@pytest.fixture
def plots():
    pass


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("train.report.draw_plots", lambda *_: None)
