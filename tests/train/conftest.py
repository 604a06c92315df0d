"""Plots take longer than a few steps, so they are drawn only in tests with the fixture `plots`."""

import pytest


@pytest.fixture
def plots():
    pass


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("train.report.draw_plots", lambda *_: None)
