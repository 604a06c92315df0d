"""The benchmark's summaries and reports, and whether the providers compute the same."""

import importlib
import json
import sys

import pytest
import torch

from bench import providers, report, summary
from bench.linear import LINEAR_PROVIDERS, LinearProblem
from bench.measure import gradient_error
from bench.providers import PROVIDERS, Problem
from bench.suites import INPUTS, SUITES


def entry(provider, times_ms, *, error=None, moved=3, n=4, v=100):
    info = {
        "op": PROVIDERS[provider].op,
        "provider": provider,
        "divergence": "reverse_kl",
        "inputs": "",
        "n": n,
        "v": v,
        "d": None,
        "dtype": "float32",
        "floor_bytes": moved * n * v * 4,
        "grad_error": error,
        "peak_mib": 10.0,
    }
    return {"extra_info": info, "stats": {"data": [t / 1e3 for t in times_ms]}}


def raw(*benchmarks):
    stamp = {
        "device": "a device",
        "torch": "2",
        "triton": "3",
        "missing_peers": {"Liger 0.8.5": "liger_kernel is not installed"},
    }
    return {
        "machine_info": {"hybrid_kernels": stamp},
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": list(benchmarks),
    }


def test_percentiles_and_the_fraction_of_the_floor():
    rows = summary.summarise(
        raw(
            entry("copy", [2.0, 2.0, 2.0], moved=2),
            entry("copy", [3.0, 3.0, 3.0], moved=2),
            entry("copy", [900.0] * 3, moved=2, n=400),
            entry("hybrid_kernels", [float(t) for t in range(101)], error=1e-7),
            entry("torch eager", [6.0, 5.0, 7.0], error=1e-6),
            entry("add", [4.0], moved=3),
        )
    )
    ours, eager, add = rows[3:]
    assert (ours["p20_ms"], ours["median_ms"], ours["p80_ms"]) == (20.0, 50.0, 80.0)
    assert ours["floor_fraction"] == pytest.approx(3.0 / 50.0)  # 3/2 of the best copy's 2 ms
    assert (eager["median_ms"], eager["floor_fraction"]) == (6.0, 0.5)
    assert (eager["add_fraction"], add["floor_fraction"]) == (round(4 / 6, 4), 0.75)
    assert ours["commit"] == "0123456789abcdef"
    fields = "op divergence n v d dtype provider median_ms p20_ms p80_ms floor_fraction peak_mib"
    assert {*fields.split(), "grad_error", "commit"} <= set(ours)


def test_a_wrong_gradient_is_no_result_and_a_missing_peer_is_named(tmp_path):
    results = raw(
        entry("copy", [1.0], moved=2),
        entry("hybrid_kernels", [2.0], error=1e-7),
        entry("torch eager", [4.0], error=1e-7),
        entry("torch.compile", [0.1], error=0.3),
        entry("hybrid_kernels", [2.0], error=1e-7, v=200),
    )
    results["machine_info"]["hybrid_kernels"]["out_of_time"] = ["bench_losses[late]"]
    (tmp_path / "raw.json").write_text(json.dumps(results))
    summary.write(tmp_path)
    text = report.render(tmp_path)
    assert "| hybrid_kernels | 2 | 2-2 | 0.50 | 75% | 10 | 1.00 | 1e-07 |" in text
    assert "| torch.compile |" not in text
    assert "- torch.compile (4, 100, float32, reverse_kl): gradient error 3e-01, no result" in text
    assert "- Liger 0.8.5: not measured, liger_kernel is not installed" in text
    assert "- bench_losses[late]: not measured, out of time" in text
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_nan_is_not_right():
    row = {"grad_error": float("nan"), "dtype": "float32"}
    assert not report.is_right(row)


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_name_providers_and_inputs_that_exist(suite):
    cases = SUITES[suite]()
    assert len({str(case) for case in cases}) == len(cases) > 0
    for case in cases:
        providers = LINEAR_PROVIDERS if case.size else PROVIDERS
        assert case.divergence in providers[case.provider].divergences
        assert case.inputs in INPUTS


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jeffreys", "jsd"])
def test_every_provider_computes_the_same_gradient(divergence, inputs):
    size = max(300, 3 * int(INPUTS[inputs].get("support", 0)))
    problem = Problem.random((8, size), torch.float32, divergence, **INPUTS[inputs])
    measured = 0
    for name, provider in PROVIDERS.items():
        for_supports = "top-K" in name
        skipped = provider.gpu_only or "compile" in name or (problem.mask is not None and measured)
        skipped = skipped or for_supports != (problem.top_k is not None)
        skipped = skipped or problem.divergence not in provider.divergences
        if provider.is_gradient and not skipped:
            assert gradient_error(problem, provider.make(problem)) < 1e-3
            measured += 1
    assert measured


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_every_provider_from_hidden_states_computes_the_same_gradient(divergence):
    problem = LinearProblem.random(8, 301, 24, torch.float32, divergence)
    measured = 0
    for name, provider in LINEAR_PROVIDERS.items():
        if provider.missing() or divergence not in provider.divergences:
            continue
        run = provider.make(problem)
        if provider.is_gradient:
            error = gradient_error(problem, run, provider.op)
            assert error < (0.2 if "bf16" in name else 1e-4)
            measured += 1
        else:
            assert run().isfinite().all()
    assert measured > 5


def test_the_gemms_alone_are_the_floor_of_hidden_states():
    def linear(provider, ms, size):
        benchmark = entry("hybrid_kernels", [ms])
        info = {"provider": provider, "op": LINEAR_PROVIDERS[provider].op, "d": size}
        benchmark["extra_info"] |= info
        return benchmark

    rows = summary.summarise(
        raw(
            linear("four GEMMs alone", 2.0, 16),
            linear("hybrid_kernels, dense + sparse", 2.5, 16),
            linear("hybrid_kernels, dense + sparse", 2.5, 32),
        )
    )
    assert [row["floor_fraction"] for row in rows] == [1.0, 0.8, None]
    assert report.table(rows[:2])[1] == "N=4, V=100, D=16, float32, reverse_kl"


def test_a_package_is_registered_without_its_init(tmp_path, monkeypatch):
    package = tmp_path / "heavy" / "losses"
    package.mkdir(parents=True)
    (tmp_path / "heavy" / "__init__.py").write_text("raise ImportError('servers')")
    (package / "__init__.py").write_text("raise ImportError('data sets')")
    (package / "fused.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("heavy", "heavy.losses")
    for name in (*names, "heavy.losses.fused"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    providers._without_init(*names)
    providers._without_init(*names)
    assert importlib.import_module("heavy.losses.fused").answer == 42
    assert PROVIDERS["torch eager"]._replace(needs="heavy").missing() is None


def test_a_peer_that_is_not_installed_says_so():
    peer = PROVIDERS["speculators 0.9.0"]._replace(needs="no_such_package")
    assert peer.missing() == "no_such_package is not installed"
