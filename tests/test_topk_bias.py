"""What the README says about top-K losses, at a small size."""

import importlib

import pytest

from experiments import topk_bias
from experiments.__main__ import EXPERIMENTS


@pytest.fixture(scope="module", params=list(topk_bias.SHOWN))
def variants(request):
    rows = topk_bias.measure(request.param, 32, vocabulary=2000)
    return {row["variant"]: row for row in rows}


def test_only_the_corrected_bucket_is_unbiased(variants):
    bias = {name: row["bias"] for name, row in variants.items()}
    assert bias["bucket + sampled tail"] < 1e-9
    assert bias["bucket"] < bias["renormalised"] < bias["truncated"]
    assert bias["truncated"] > 5 * bias["bucket"] > 1e-4


def test_the_truncated_loss_moves_a_student_that_equals_its_teacher(variants):
    moved = {name: row["at_p_equals_q"] for name, row in variants.items()}
    assert moved.pop("truncated") > 0.1
    assert max(moved.values()) < 1e-9


def test_masking_leaves_the_row_sum(variants):
    sums = {name: row["row_sum"] for name, row in variants.items()}
    assert sums.pop("masked") > 1e-3
    assert max(sums.values()) < 1e-9


def test_the_bucket_leaves_less_to_sample(variants):
    noise = {name: row["sampled_variance"] for name, row in variants.items()}
    assert noise["truncated"] > 3 * noise["bucket + sampled tail"] > 0
    assert noise["bucket"] is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_module(name):
    assert callable(importlib.import_module(EXPERIMENTS[name]).main)


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(topk_bias, "VOCABULARY", 500)
    small = dict.fromkeys(topk_bias.SHOWN, 16)
    monkeypatch.setattr(topk_bias, "SHOWN", small)
    monkeypatch.setattr(topk_bias, "SIZES", (8, 16))
    rows = [r for name in small for k in (8, 16) for r in topk_bias.measure(name, k, 500)]
    text = topk_bias.table(rows)
    assert text.count("| bucket + sampled tail | 1.0000 |") == 2
    topk_bias.plot(rows, tmp_path / "topk.png")
    assert (tmp_path / "topk.png").stat().st_size > 10_000
