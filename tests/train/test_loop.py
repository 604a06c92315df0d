"""The gradient and the metrics of a step, and the checks and files of a run."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    END,
    REWARD,
    config,
    gradient,
    make_tokenizer,
    options,
    prepared,
    read_lines,
    save,
    write_prompts,
)
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_kernels import sparse_advantages
from train import loop, objective, report
from train.batch import MicroBatch
from train.config import NonFiniteError, UserError, make_config
from train.loop import train
from train.metrics import StepStatistics
from train.objective import ScheduledWeights, gradient_norms, micro_batch_loss, sampled_costs
from train.rollout import Rollout


def part(batch, rows):
    """Some responses of a micro-batch, still padded to its length."""
    fields = {
        name: None if value is None else value[rows] for name, value in vars(batch.rollout).items()
    }
    return MicroBatch(
        examples=batch.examples[rows],
        completions=batch.completions[rows],
        rollout=Rollout(**fields),
        mask=batch.mask[rows],
        scores={name: values[rows] for name, values in batch.scores.items()},
        reward=batch.reward[rows],
    )


def test_two_micro_batches_give_the_gradient_of_one(tmp_path):
    run, models, batch = prepared(tmp_path, per_device_train_batch_size=16)
    weights, count = ScheduledWeights(2.0, 0.9, 0.7), int(batch.mask.sum())
    micro_batch_loss(run, models, batch, weights, count).loss.backward()
    whole = gradient(models)
    halves = [part(batch, slice(0, 8)), part(batch, slice(8, 16))]
    assert halves[0].mask.sum() != halves[1].mask.sum()  # else local normalisers would pass, too
    for half in halves:
        micro_batch_loss(run, models, half, weights, count).loss.backward()
    torch.testing.assert_close(gradient(models), whole, atol=1e-6, rtol=0)
    assert whole.norm() > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sampled_kl", [True, False])
def test_gradient_equals_the_formula(tmp_path, temperature, sampled_kl):
    """Compares with autograd of the dense KL and of advantages from the objective's definition."""
    changes = {"temperature": temperature, "teacher_temperature": 2.0, "sampled_kl": sampled_kl}
    run, models, batch = prepared(tmp_path, **changes)
    weights, count = ScheduledWeights(2.0, 0.9, 0.7), int(batch.mask.sum())
    micro_batch_loss(run, models, batch, weights, count).loss.backward()
    got = gradient(models)

    rollout, mask = batch.rollout, batch.mask
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": rollout.attention_mask, "position_ids": positions}
    length = rollout.tokens.shape[1]
    log_p = models.student(rollout.input_ids, **inputs).logits[:, -length - 1 : -1] / temperature
    log_q = models.teachers[0](rollout.input_ids, **inputs).logits[:, -length - 1 : -1] / 2.0
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    log_prob = log_p.gather(2, rollout.tokens[..., None]).squeeze(2)
    teacher_log_prob = log_q.gather(2, rollout.tokens[..., None]).squeeze(2)
    costs = ((log_prob - teacher_log_prob) * mask).detach()
    returns = torch.zeros_like(costs)
    for t in reversed(range(length - 1)):
        returns[:, t] = 0.9 * (costs[:, t + 1] + returns[:, t + 1])
    total = 2.0 * batch.reward - costs[:, 0] - returns[:, 0]
    values = 2.0 * batch.reward[:, None] - returns - (0.3 if sampled_kl else 0.0) * costs
    groups = total.view(-1, 4)
    others = ((groups.sum(1, keepdim=True) - groups) / 3).view(-1, 1)
    loss = ((0.7 * kl - (values - others) * log_prob) * mask).sum() / count
    loss.backward()
    torch.testing.assert_close(got, gradient(models), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_same_teacher_twice_equals_one_with_the_total_weight(tmp_path, weight):
    """With weights of 1/2, that is one teacher with weight 1; with weights of 1, twice its KL."""
    run, models, batch = prepared(tmp_path)
    weights, count = ScheduledWeights(2.0, 0.9, 0.7), int(batch.mask.sum())
    if weight == 1.0:
        half = replace(weights, reward_weight=1.0)
        micro_batch_loss(run, models, batch, half, count).loss.backward()
        expected = 2 * gradient(models)
    else:
        micro_batch_loss(run, models, batch, weights, count).loss.backward()
        expected = gradient(models)
    heads = (*models.heads, models.heads[1])
    twice = replace(models, teachers=models.teachers * 2, weights=[weight, weight], heads=heads)
    result = micro_batch_loss(run, twice, batch, weights, count)
    result.loss.backward()
    torch.testing.assert_close(gradient(models), expected, atol=2e-6, rtol=1e-5)
    statistics = StepStatistics(run, twice.total_weight)
    statistics.add(batch, result)
    kl = float(result.divergence.sum()) / count
    assert statistics.means()["kl"] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_a_support_of_all_tokens_equals_the_full_teacher(tmp_path, support):
    run, models, batch = prepared(tmp_path, temperature=0.7, teacher_temperature=2.0)
    weights, count = ScheduledWeights(2.0, 0.9, 0.7), int(batch.mask.sum())
    micro_batch_loss(run, models, batch, weights, count).loss.backward()
    expected = gradient(models)
    size = models.vocab_size if support != "union" else models.vocab_size // 2
    with_top_k = replace(models, top_k=size, top_k_support=support)
    result = micro_batch_loss(run, with_top_k, batch, weights, count)
    result.loss.backward()
    if support != "union":
        torch.testing.assert_close(gradient(models), expected, atol=2e-6, rtol=1e-4)
    else:
        assert gradient(models).isfinite().all()
    statistics = StepStatistics(run, 1.0)
    statistics.add(batch, result)
    row = statistics.means()
    assert 0.5 < row["student_mass"] <= 1.0001
    assert 0.5 < row["teacher_mass"] <= 1.0001
    # The cost of a sampled token is known outside the support, too.
    costs = sampled_costs(result, 1.0).sum() / count
    assert row["kl"] == pytest.approx(float(costs), rel=1e-5)


def test_a_run_with_two_top_k_teachers(tmp_path):
    values = {"top_k_teacher": 3, "top_k_support": "union"}
    run = config(tmp_path, **values)
    other = replace(run.teachers[0], weight=0.5)
    run = replace(run, teachers=[*run.teachers, other], max_steps=2)
    train(run)
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [0 < row["student_mass"] < 1 for row in rows] == [True, True]
    assert make_config(run.as_options()) == run


def test_gradient_norms_of_the_two_parts(tmp_path):
    run, models, batch = prepared(tmp_path)
    norms = gradient_norms(run, models, batch, ScheduledWeights(2.0, 1.0, 1.0))
    assert all(weight.grad is None for weight in models.student.parameters())
    count = int(batch.mask.sum())
    inputs = replace(models, heads=()).loss_inputs(batch.rollout)
    log_p, log_q = inputs.student[0].log_softmax(-1), inputs.teacher.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (kl[batch.mask].sum() / count).backward()
    assert norms["grad_norm_dense"] == pytest.approx(float(gradient(models).norm()), rel=1e-3)
    micro_batch_loss(run, models, batch, ScheduledWeights(2.0, 1.0, 1.0), count).loss.backward()
    both = float(gradient(models).norm())
    dense_norm, sparse_norm = norms["grad_norm_dense"], norms["grad_norm_sparse"]
    assert abs(dense_norm - sparse_norm) <= both <= dense_norm + sparse_norm
    norms = gradient_norms(run, models, batch, ScheduledWeights(2.0, 1.0, 0.0))
    assert norms["grad_norm_dense"] == 0


def test_truncated_responses_leave_numerator_and_denominator(tmp_path):
    run, models, batch = prepared(
        tmp_path, mask_truncated_completions=True, per_device_train_batch_size=16
    )
    cut = batch.rollout.truncated
    assert cut.any()
    assert not cut.all()
    assert not batch.mask[cut].any()
    assert torch.equal(batch.mask[~cut], batch.rollout.mask[~cut])
    weights = ScheduledWeights(2.0, 1.0, 1.0)
    result = micro_batch_loss(run, models, batch, weights, int(batch.mask.sum()))
    statistics = StepStatistics(run, models.total_weight)
    statistics.add(batch, result)
    row = statistics.means()
    assert row["tokens"] == int(batch.mask.sum())
    assert row["truncated"] == pytest.approx(float(cut.float().mean()))
    assert row["completion_length"] == pytest.approx(float(batch.rollout.mask.sum()) / 16)


def test_cost_clip_bounds_the_returns_and_is_logged(tmp_path):
    run, models, batch = prepared(tmp_path, cost_clip=0.5)
    seen = []

    def spy(costs, *rest, **options):
        seen.append(costs)
        return sparse_advantages(costs, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "sparse_advantages", spy)
        result = micro_batch_loss(run, models, batch, ScheduledWeights(2.0, 1.0, 1.0), 10)
    assert seen[0].abs().max() == 0.5
    statistics = StepStatistics(run, models.total_weight)
    statistics.add(batch, result)
    beyond = (result.log_prob - result.teacher_log_prob).abs()[batch.mask] > 0.5
    assert 0 < statistics.means()["costs_clipped"] == pytest.approx(float(beyond.float().mean()))


def test_objective_is_reported_at_the_final_reward_weight(tmp_path):
    schedule = {"kind": "geometric", "start": 1, "end": 8}
    run, models, batch = prepared(tmp_path, reward_weight=schedule, max_steps=4)
    assert [ScheduledWeights.at(run, step).reward_weight for step in (0, 3)] == [1, 8]
    result = micro_batch_loss(run, models, batch, ScheduledWeights.at(run, 0), 10)
    statistics = StepStatistics(run, models.total_weight)
    statistics.add(batch, result)
    expected = float((result.divergence.sum(1) - 8 * batch.reward).mean())
    assert statistics.means()["objective"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_a_teacher_that_forbids_a_token(tmp_path, bounded, fused, monkeypatch):
    original = loop.load_models

    def load(*arguments):
        models = original(*arguments)
        bias = torch.zeros(models.vocab_size)
        bias[5] = -math.inf
        layer = models.teachers[0].get_output_embeddings()
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        return models

    monkeypatch.setattr(loop, "load_models", load)
    changes = {"teacher_floor": -30.0, "cost_clip": 5.0} if bounded else {}
    changes["fused_linear"] = fused
    run = config(tmp_path, per_device_train_batch_size=32, **changes)
    if bounded:
        summary = train(run)
        rows = read_lines(tmp_path / "run/metrics.jsonl")
        assert [row["teacher_forbidden"] > 0 for row in rows] == [True, True]
        assert [row["costs_clipped"] > 0 for row in rows] == [True, True]
        assert any("teacher_floor" in text for text in summary["warnings"])
    else:
        with pytest.raises(
            NonFiniteError, match=r"step 1: the loss is (inf|nan).*set teacher_floor"
        ):
            train(run)
        assert read_lines(tmp_path / "run/metrics.jsonl") == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_foreign_checkpoints_and_a_reward_from_a_file(tmp_path, family, plots):
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = [{"prompt": text} for text in ("a b c d e f", "g", "h i", "j k l m")]
    values = options(
        tmp_path,
        family,
        rewards=[{"function": f"{tmp_path}/reward.py:length", "weight": 2}],
        reward_weight=5,
        max_steps=12,
        per_device_train_batch_size=32,
        eval_steps=6,
        eval_file=str(write_prompts(tmp_path / "eval.jsonl", prompts)),
        report_to="tensorboard",
        learning_rate=1e-2,
    )
    summary = train(make_config(values))
    output = tmp_path / "run"
    rows = read_lines(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    names = "loss reward kl entropy grad_norm tokens tokens_per_second lr reward_weight gamma"
    names += " dense_weight completion_length truncated objective"
    assert set(names.split()) <= rows[0].keys()
    assert max(row["sampler_mismatch_max"] for row in rows) < 1e-5
    # The run learns: responses get longer, and the objective decreases.
    assert summary["train"]["reward"]["last"] > summary["train"]["reward"]["first"]
    assert summary["train"]["objective"]["last"] < summary["train"]["objective"]["first"]
    assert [row["step"] for row in read_lines(output / "eval.jsonl")] == [0, 6, 12]
    assert json.loads((output / "summary.json").read_text()) == summary
    pictures = {path.name for path in (output / "plots").iterdir()}
    assert pictures == {"reward.png", "kl.png", "gradient_norms.png", "objective.png"}
    assert list(output.glob("tensorboard/**/events.out.tfevents.*"))
    assert read_lines(output / "samples.jsonl")
    final = AutoModelForCausalLM.from_pretrained(output / "final")
    assert type(final).__name__.lower().startswith(family)
    assert (
        AutoTokenizer.from_pretrained(output / "final").get_vocab() == make_tokenizer().get_vocab()
    )


def test_vocabularies_of_two_sizes_must_be_declared(tmp_path):
    save(tmp_path / "teacher", "gpt2", 1, vocab=32)
    with pytest.raises(UserError, match="vocab_size: missing, and the student has 20 logits, the"):
        train(config(tmp_path))
    with pytest.raises(UserError, match="vocab_size: got 21, but the student has 20"):
        train(config(tmp_path, vocab_size=21))
    assert train(config(tmp_path, vocab_size=20, max_steps=1))["steps"] == 1


def test_tokenizers_must_agree(tmp_path):
    run = config(tmp_path)
    other = make_tokenizer()
    vocabulary = json.loads(other.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other.save_pretrained(tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="student and teacher must share one tokenizer"):
        train(run)


def test_lengths_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="exceeds the 64 positions"):
        train(config(tmp_path, max_completion_length=60))


def test_trackers_are_known_and_installed(tmp_path):
    with pytest.raises(UserError, match="report_to: got 'paper', expected one of"):
        train(config(tmp_path, report_to="paper"))
    with pytest.raises(UserError, match="report_to: dvclive is not installed"):
        train(config(tmp_path, report_to="dvclive"))


def test_an_old_run_is_not_overwritten(tmp_path):
    train(config(tmp_path, max_steps=1))
    with pytest.raises(UserError, match="holds a run already; continue it with"):
        train(config(tmp_path, max_steps=1))


def test_warnings_of_the_summary(tmp_path):
    rows = [
        {"step": i, "tokens": 1, "seconds": 1.0, "reward": i, "kl": 0, "entropy": 0, "objective": 0}
        for i in range(1, 21)
    ]
    rows = [{**row, "teacher_forbidden": 0} for row in rows]
    held_out = [{"step": step, "eval_reward": value} for step, value in ((0, 0.5), (20, 0.25))]
    summary = report.summarise(config(tmp_path), rows, held_out)
    (warning,) = summary["warnings"]
    assert "rose (1.500 to 19.500) while the held-out reward fell (0.500 to 0.250)" in warning
    assert report.summarise(config(tmp_path), rows, held_out[::-1])["warnings"] == []
    rows = [{**row, "sampler_mismatch": 0.05 * row["step"]} for row in rows]
    (warning,) = report.summarise(config(tmp_path), rows, held_out[::-1])["warnings"]
    assert "differ by 0.53 nats between sampling and training" in warning


def test_texts_from_outside_are_printed_as_they_are(tmp_path):
    texts = [r"\[x\] [b]", "[/b] :x:", "\\[red] a", "[bold]", "\x1b[2J\r\0\x9b"]
    rows = [
        {"step": 1, "split": "eval", "prompt": text, "completion": text, "reward": None}
        for text in texts
    ]
    console = Console(file=io.StringIO(), width=100)
    console.print(report._sample_table(rows))
    log = object.__new__(report.RunLog)
    log.console = console
    for text in texts:
        log.warn(text)
    lines = console.file.getvalue().splitlines()
    texts[-1] = repr(texts[-1])[1:-1]
    for text in texts:
        assert sum(line.count(text) == 2 for line in lines) == 1
        assert f"warning: {text}" in lines


def test_truncated_sampling_is_warned_about(tmp_path, capsys):
    train(config(tmp_path, max_steps=1, top_k=5))
    assert "drawn from a truncated distribution" in " ".join(capsys.readouterr().out.split())


def test_end_token_is_trained(tmp_path):
    """Learning a reward for immediate ends needs a gradient on the EOS token."""
    (tmp_path / "reward.py").write_text(
        "def brief(prompts, completions):\n    return [float(not text) for text in completions]\n"
    )
    run = config(
        tmp_path,
        rewards=[f"{tmp_path}/reward.py:brief"],
        reward_weight=20,
        max_steps=15,
        per_device_train_batch_size=64,
        learning_rate=2e-2,
    )
    summary = train(run)
    assert summary["train"]["reward"]["last"] > summary["train"]["reward"]["first"] + 0.3
    assert END not in make_tokenizer()("a b")["input_ids"]
