"""Rewards: how they are called, what they may return, and what becomes of a missing score."""

import functools
import json
import math
import sys
import types
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from helpers import config, gradient, make_tokenizer, prepared, write_prompts

from hybrid_kernels import sparse_advantages
from train import objective, report
from train.config import FIGURES, RewardConfig, UserError
from train.data import Example, read_examples
from train.evaluate import evaluate
from train.loop import train
from train.metrics import StepStatistics
from train.objective import ScheduledWeights, micro_batch_loss
from train.rewards import Scorer, exact_match, load_function, numeric_answer
from train.rollout import Sampler

NAN = math.nan
MODULE = types.ModuleType("rewards_under_test")
sys.modules[MODULE.__name__] = MODULE


def paths(**functions):
    """Options for these functions, the first with the weight 1, the second with 2, and so on."""
    for name, function in functions.items():
        setattr(MODULE, name, function)
    names = [f"{MODULE.__name__}:{name}" for name in functions]
    return [{"function": name, "weight": weight} for weight, name in enumerate(names, start=1)]


def scorer(**functions):
    return Scorer("rewards", [RewardConfig(**path) for path in paths(**functions)])


TEXTS = ["a", "bb", "ccc"]
IDS = [[4, 2], [5, 5, 2], [6, 6, 6, 2]]
ANSWERS = ["a", "", "c"]


def examples():
    rows = [{"answer": answer, "tags": [answer]} for answer in ANSWERS]
    return [Example(f"prompt {row}", [1], columns) for row, columns in enumerate(rows)]


def score(function):
    return scorer(f=function).score(examples(), TEXTS, IDS)["f"]


def lengths(values):
    return [len(value) for value in values]


def swapped(completions, prompts):
    return lengths(completions)


def keyword_only(*, answer, completions):
    return [len(text + right) for text, right in zip(completions, answer, strict=True)]


def positional_only(completions, prompts, absent=7, answer=None, /):
    return [absent + len(right) for right in answer]


async def waiting(completions, **kwargs):
    return lengths(completions)


@functools.wraps(swapped)
def wrapper(*args, **kwargs):
    return swapped(*args, **kwargs)


class Lengths:
    def __call__(self, completions, **kwargs):
        return lengths(completions)

    def method(self, completions, prompts):
        return lengths(completions)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda prompts, completions, answer: lengths(map(str.__add__, completions, answer)), 224),
        (swapped, 123),
        (lambda completions, **kwargs: lengths(completions), 123),
        (lambda completions, answer, **kwargs: lengths(answer), 101),
        (lambda completion_ids, **kwargs: lengths(completion_ids), 234),
        (lambda **kwargs: lengths(kwargs["completion_ids"]), 234),
        (lambda **kwargs: [len(kwargs)] * 3, 555),
        (lambda *args, **kwargs: [len(args) + len(kwargs)] * 3, 555),
        (lambda completions, answer=None, absent=5: [absent + len(a) for a in answer], 656),
        (lambda completions, trainer_state=None, log_metric=None: lengths(completions), 123),
        (keyword_only, 224),
        (positional_only, 878),
        (waiting, 123),
        (wrapper, 123),
        (Lengths(), 123),
        (Lengths().method, 123),
        (functools.partial(lambda scale, completions: [scale] * len(completions), 4), 444),
        (functools.partial(lambda completions, scale: [scale] * len(completions), scale=4), 444),
    ],
)
def test_rewards_are_called_by_name(function, expected):
    assert score(function) == [int(digit) for digit in str(expected)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda data_source, solution_str, ground_truth, extra_info=None: 1.0, "'data_source'"),
        (lambda queries, prompts, labels: [1.0] * 3, "'queries'"),
        (lambda prompt, completions: [1.0] * 3, "'prompt'"),
        (lambda completions, log_metric, **kwargs: [1.0] * 3, "'log_metric'"),
        (len, "'obj'; the loop and eval_file have lists of prompts, completions, completion_ids, "),
        (lambda completions, *columns: [1.0] * 3, "rewards: 'rewards_under_test:f' takes *args"),
        (Lengths, "rewards: 'rewards_under_test:f' is a class; name a function, or an instance"),
        (max, "rewards: 'rewards_under_test:f' does not say which parameters it has"),
        (functools.partial(lambda answer: answer, answer=[]), "'answer' is set by functools.part"),
    ],
)
def test_other_signatures_are_named_before_a_run(function, message):
    with pytest.raises(UserError) as error:
        scorer(f=function).check("eval_file", examples())
    assert message in str(error.value)


@pytest.mark.parametrize("option", ["train_file", "eval_file", "eval_metrics"])
def test_signatures_are_checked_before_the_first_response(tmp_path, option, monkeypatch):
    monkeypatch.setattr("train.batch.generate", None)
    monkeypatch.setattr("train.evaluate.generate", None)
    wanting = paths(f=lambda completions, answer: lengths(completions))
    kinds = {"rewards": wanting} if option != "eval_metrics" else {"eval_metrics": wanting}
    run = config(tmp_path, **{"rewards": [], **kinds})
    without_answers = write_prompts(tmp_path / "other.jsonl", [{"prompt": "a"}])
    source = "train_file" if option == "train_file" else "eval_file"
    run = replace(run, **{source: str(without_answers)})
    with pytest.raises(UserError, match=f"reward f: .* 'answer'; the loop and {source} have lists"):
        train(run)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 2.5, True), [1, 2.5, 1]),
        ((value for value in (1, 2, 3)), [1, 2, 3]),
        ({"a": 1, "b": 2, "c": 3}.values(), [1, 2, 3]),
        (torch.tensor([1, 2, 3], dtype=torch.bfloat16), [1, 2, 3]),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [1, 2, 3]),
        (np.array([True, False, True]), [1, 0, 1]),
        ([torch.tensor(1.0), np.float32(2), np.bool_(True)], [1, 2, 1]),
        ([Decimal("0.5"), -3e38, None], [0.5, -3e38, NAN]),
        ([NAN, None, np.float64(NAN)], [NAN, NAN, NAN]),
    ],
)
def test_numbers_that_come_back(values, expected):
    scores = score(lambda completions: values)
    assert scores == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert {type(value) for value in scores} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0}, "returned {0: 1.0, 1: 2.0, 2: 3.0} (dict), expected a list of"),
        ({0: 1.0, 1: 2.0, 2: 3.0}.keys(), "(dict_keys), expected a list of 3 numbers"),
        ({3.0, 1.0, 2.0}, "(set), expected a list of 3 numbers"),
        ("123", "returned '123' (str), expected a list of 3 numbers"),
        (b"123", "(bytes), expected a list of 3 numbers"),
        (None, "returned None (NoneType), expected a list of 3 numbers"),
        (1.0, "returned 1.0 (float), expected a list of 3 numbers"),
        (torch.tensor(1.0), "returned tensor(1.) (Tensor), expected a list of 3 numbers"),
        ([1.0], "returned 1 numbers for 3 completions"),
        (torch.ones(3, 1), "returned [1.0] for completion 0, of the prompt 'prompt 0'"),
        (np.ones((3, 1)), "returned [1.0] for completion 0, of the prompt 'prompt 0'"),
        (np.ones(3) + 1j, "returned (1+1j) for completion 0"),
        (
            [1.0, torch.ones(1), 1.0],
            "returned tensor([1.]) for completion 1, of the prompt 'prompt 1",
        ),
        (
            [1.0, 2.0, "3"],
            "returned '3' for completion 2, of the prompt 'prompt 2'; expected a numb",
        ),
        ([1.0, b"2", 3.0], "returned b'2' for completion 1"),
        ([1j, 2.0, 3.0], "returned 1j for completion 0"),
        ([1.0, math.inf, 2.0], "returned inf for completion 1"),
        ([1.0, -1e39, 2.0], "returned -1e+39 for completion 1"),
        ([1, 2, 10**400], "returned 1000"),
    ],
)
def test_what_is_not_a_number_for_each_completion_is_named(values, message):
    with pytest.raises(UserError, match=r"^reward f: ") as error:
        score(lambda completions: values)
    assert message in str(error.value)


def test_an_exception_in_a_reward_is_named_with_its_place():
    def of_messages(completions, **kwargs):
        return [float(messages[0]["content"] == "x") for messages in completions]

    def late(completions):
        yield 1.0
        raise KeyError("missing")

    with pytest.raises(
        UserError, match=r"reward f: raised TypeError: .* texts, not messages"
    ) as error:
        score(of_messages)
    assert isinstance(error.value.__cause__, TypeError)
    assert 'test_rewards.py", line' in str(error.value)
    assert 'messages[0]["content"]' in str(error.value)
    with pytest.raises(UserError, match="reward f: raised KeyError: 'missing'"):
        score(late)


def test_rewards_do_not_change_what_others_get():
    def changing(prompts, completions, completion_ids, answer, tags):
        prompts[0][0]["content"] = "changed"
        tags[0].append("changed")
        for values in (prompts, completions, completion_ids, answer, *completion_ids):
            values.clear()
        return [1.0] * 3

    seen = []

    def looking(**kwargs):
        seen.append(kwargs)
        return [1.0] * 3

    data = [replace(e, prompt=[{"role": "user", "content": e.prompt}]) for e in examples()]
    ids = [list(row) for row in IDS]
    rewards = scorer(changing=changing, looking=looking)
    for _ in range(2):
        rewards.score(data, TEXTS, ids)
    for kwargs in seen:
        assert kwargs == {
            "prompts": [[{"role": "user", "content": f"prompt {row}"}] for row in range(3)],
            "completions": ["a", "bb", "ccc"],
            "completion_ids": [[4, 2], [5, 5, 2], [6, 6, 6, 2]],
            "answer": ["a", "", "c"],
            "tags": [["a"], [""], ["c"]],
        }


def test_responses_to_one_prompt_do_not_share_a_value():
    def changing(completions, tags):
        tags[0].append("changed")
        return lengths(tags)

    rewards = scorer(changing=changing)
    assert rewards.score([examples()[0]] * 3, TEXTS, IDS) == {"changing": [2, 1, 1]}


def test_totals_leave_out_what_could_not_be_scored():
    rewards = scorer(a=lambda completions: [1, None, None], b=lambda completions: [4, 5, None])
    scores = rewards.score(examples(), TEXTS, IDS)
    assert rewards.total(scores, 3) == pytest.approx([9, 10, NAN], nan_ok=True)
    assert Scorer("rewards", []).total({}, 2) == [0, 0]


def test_answer_rewards():
    texts = ["42", " 42\n", "43", "so 1,042.5", "none", "None"]
    exact = exact_match([""] * 6, texts, ["42", "42", 42, "x", "", None])
    assert exact == pytest.approx([1, 1, 0, 0, 0, NAN], nan_ok=True)
    answers = [42, "42.0", "42", "= 1042.5", "7", None]
    numeric = numeric_answer([""] * 6, texts, answers)
    assert numeric == pytest.approx([1, 1, 0, 1, 0, NAN], nan_ok=True)
    # In float64, these are equal.
    assert numeric_answer([""] * 2, [str(2**53 + 1), "1" * 400], [2**53, "2" * 400]) == [0, 0]


def test_user_rewards_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def named(prompts, completions, level):\n    return level\n")
    path = write_prompts(tmp_path / "x.jsonl", [{"prompt": "a", "level": 1}, {"prompt": "c"}])
    data = read_examples("train_file", str(path), make_tokenizer())
    rewards = Scorer("rewards", [RewardConfig(f"{file}:named")])
    scores = rewards.score(data, TEXTS[:2], IDS[:2])
    assert scores == {"named": pytest.approx([1, NAN], nan_ok=True)}


def test_wrong_reward_paths_are_named(tmp_path):
    (tmp_path / "empty.py").touch()
    for path, message in [
        ("no_colon", "expected `module:function`"),
        ("no.such.module:f", "can't import 'no.such.module'"),
        ("no/such.py:f", "there is no file 'no/such.py'"),
        (f"{tmp_path}/empty.py:nothing", "has no function 'nothing'"),
        (".relative:f", "expected `module:function`"),
        ("os.path.missing:f", "can't import 'os.path.missing'"),
    ]:
        with pytest.raises(UserError) as error:
            Scorer("rewards", [RewardConfig(path)])
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("\0", "SyntaxError: source code"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def __getattr__(name):\n    raise KeyError(name)", "KeyError: 'f'"),
        ("class E(Exception):\n    __str__ = None\nraise E", ".E: <exception str() failed>"),
    ],
)
@pytest.mark.parametrize("option", ["rewards", "setup"])
def test_code_that_raises_when_it_is_imported_is_named(tmp_path, option, code, message):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(UserError) as error:
        load_function(option, f"{file}:f")
    first, *lines = str(error.value).split("\n")
    assert first.startswith(f"{option}: {str(file)!r}: raised ")
    assert message in first
    # Where it happened, without our own lines and those of the importing machinery.
    assert lines[0].startswith(("Traceback", f'  File "{file}"', "SyntaxError"))
    assert not any("rewards.py" in line or "importlib" in line for line in lines)


SAME, OTHER = "train.rewards:exact_match", "mine.py:exact_match"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [SAME, OTHER]}, f"rewards: two functions named 'exact_match', '{SAME}' of re"),
        ({"rewards": [SAME, SAME]}, "rewards: two functions named 'exact_match'"),
        ({"eval_metrics": [SAME, SAME]}, "eval_metrics: two functions named 'exact_match'"),
        (
            {"rewards": [SAME], "eval_metrics": [OTHER]},
            f"'{SAME}' of rewards and '{OTHER}'; rename",
        ),
        *(
            ({option: f"mine.py:{name}"}, f"{option}: 'mine.py:{name}' would be logged as '{name}'")
            for name in ("reward", "kl", "completion_length")
            for option in ("rewards", "eval_metrics")
        ),
    ],
)
def test_names_that_would_collide_in_the_logs_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        config(tmp_path, **{"rewards": [], **changes})
    assert message in str(error.value)
    assert "rename" in str(error.value)


def test_rewards_of_a_micro_batch(tmp_path):
    seen = []

    def ids(completion_ids, completions):
        seen.extend(completion_ids)
        return [None if row % 3 == 0 else row for row in range(len(completions))]

    _, _, batch = prepared(tmp_path, rewards=paths(zero=lambda prompts: [0] * 8, ids=ids))
    tokens, lengths = batch.rollout.tokens.tolist(), batch.rollout.mask.sum(1).tolist()
    assert seen == [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    assert len(set(lengths)) > 1
    expected = torch.tensor([NAN, 1, 2, NAN, 4, 5, NAN, 7])
    torch.testing.assert_close(batch.scores["ids"], expected, equal_nan=True)
    torch.testing.assert_close(batch.reward, 2 * expected.nan_to_num(), equal_nan=True)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(tmp_path, dtype, default_dtype):
    rewards = paths(third=lambda completions: [len(text) / 3 for text in completions])
    losses, batches = [], []
    for each in (torch.float32, dtype):  # the first writes the checkpoints
        default_dtype(each)
        run, models, batch = prepared(tmp_path, rewards=rewards)
        result = micro_batch_loss(run, models, batch, ScheduledWeights(2.0, 0.9, 0.7), 10)
        losses.append(result.loss.detach())
        batches.append(batch)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert batches[1].scores["third"].dtype == torch.float32
    assert torch.equal(batches[1].scores["third"], batches[0].scores["third"])
    assert batches[1].reward.dtype == torch.float32
    assert torch.equal(batches[1].reward, batches[0].reward)


def test_advantages_get_each_reward_with_its_weight(tmp_path, monkeypatch):
    given = []

    def spy(costs, rewards, *rest, **options):
        given.append(rewards)
        return sparse_advantages(costs, torch.zeros(8), *rest, **options)

    monkeypatch.setattr(objective, "sparse_advantages", spy)
    two = paths(
        some=lambda completions: [None] * 4 + [1] * 4, all=lambda completions: lengths(completions)
    )
    for rewards in (two, []):
        run, models, batch = prepared(tmp_path, rewards=rewards)
        micro_batch_loss(run, models, batch, ScheduledWeights(2.0, 1.0, 1.0), 10)
    assert {name: weight for name, (_, weight) in given[0].items()} == {"some": 1, "all": 2}
    assert given[0]["some"][0].isnan().tolist() == [True] * 4 + [False] * 4
    assert given[0]["all"][0].isfinite().all()
    assert torch.equal(given[1], torch.zeros(8, dtype=torch.float32))


def test_metrics_are_means_over_what_could_be_scored(tmp_path):
    named = paths(some=lambda prompts: [1.0] * 8, all=lambda prompts: [1.0] * 8)
    run, models, batch = prepared(tmp_path, rewards=named, reward_weight=3.0)
    result = micro_batch_loss(run, models, batch, ScheduledWeights(2.0, 1.0, 1.0), 10)
    kl = float(result.divergence.sum()) / 8
    for scored, mean in ((0, NAN), (2, (6 + 7) / 2), (8, 3.5)):
        statistics = StepStatistics(run, models.total_weight)
        # Two micro-batches; the second has no score, and leaves the mean alone.
        for missing in (8 - scored, 8):
            values = torch.arange(8.0)
            values[:missing] = NAN
            scores = {"some": values, "all": torch.ones(8)}
            reward = values.nan_to_num() + 2
            statistics.add(replace(batch, scores=scores, reward=reward), result)
        row = statistics.means()
        assert row["reward/some"] == pytest.approx(mean, nan_ok=True)
        assert row["reward"] == pytest.approx(mean + 2, nan_ok=True)
        assert row["reward/all"] == 1
        assert row["unscored"] == (16 - scored) / 32
        assert row["objective"] == pytest.approx(kl - 3 * (mean + 2), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("zero", ["reward_weight", "weight"])
def test_zero_times_an_unknown_reward_is_zero(tmp_path, zero):
    (never,) = paths(never=lambda completions: [None] * 8)
    run, models, batch = prepared(
        tmp_path,
        rewards=[{**never, "weight": float(zero != "weight")}],
        reward_weight=float(zero != "reward_weight"),
    )
    result = micro_batch_loss(run, models, batch, ScheduledWeights(0.0, 1.0, 1.0), 10)
    statistics = StepStatistics(run, models.total_weight)
    statistics.add(batch, result)
    row = statistics.means()
    assert row["objective"] == pytest.approx(float(result.divergence.sum()) / 8, rel=1e-5)
    assert row["reward"] == pytest.approx(0.0 if zero == "weight" else NAN, nan_ok=True)


def test_evaluation_is_a_mean_over_what_could_be_scored(tmp_path):
    run, models, _ = prepared(tmp_path)
    data = read_examples("train_file", run.train_file, models.tokenizer)
    sampler = Sampler.create(run, models.student, models.tokenizer, models.vocab_size)
    rewards = scorer(
        even=lambda prompts: [None if len(text) % 4 == 1 else 2 for text in prompts],
        all=lambda prompts: [5] * len(prompts),
    )
    metrics = scorer(never=lambda prompts: [None] * len(prompts))
    result, rows = evaluate(models, data, sampler, rewards, metrics, batch_size=3)
    missing = [len(example.prompt) % 4 == 1 for example in data]
    assert 0 < sum(missing) < len(data)
    assert [math.isnan(row["even"]) for row in rows] == missing
    assert result["eval_even"] == 2
    assert result["eval_reward"] == 2 + 2 * 5
    assert [row["reward"] for row in rows] == [10 if absent else 12 for absent in missing]
    assert math.isnan(result["eval_never"])
    assert result["eval_unscored"] == (sum(missing) + len(data)) / (3 * len(data))
    assert (
        evaluate(models, data, sampler, Scorer("", []), Scorer("", []), 8)[0]["eval_unscored"] == 0
    )


def test_a_reward_that_is_a_metric_too_is_computed_once(tmp_path):
    calls = []

    def noisy(completions):
        calls.append(completions)
        return [len(calls)] * len(completions)

    run, models, _ = prepared(tmp_path)
    data = read_examples("train_file", run.train_file, models.tokenizer)
    sampler = Sampler.create(run, models.student, models.tokenizer, models.vocab_size)
    result, rows = evaluate(
        models,
        data,
        sampler,
        scorer(noisy=noisy),
        scorer(noisy=noisy, none=lambda prompts: [None] * 8),
        8,
    )
    assert result["eval_noisy"] == result["eval_reward"] == 1
    assert result["eval_unscored"] == 1 / 2
    assert {row["noisy"] for row in rows} == {row["reward"] for row in rows} == {1}


def strict(path):
    """The rows of a JSONL file, which has nothing but JSON in it."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_files_of_a_run_whose_metric_is_never_scored(tmp_path):
    held_out = str(write_prompts(tmp_path / "eval.jsonl"))
    never = paths(never=lambda completions: [None] * len(completions))
    run = config(tmp_path, eval_file=held_out, eval_metrics=never, max_steps=1)
    summary = train(run)
    output = tmp_path / "run"
    assert [row["eval_never"] for row in strict(output / "eval.jsonl")] == [None, None]
    samples = [row for row in strict(output / "samples.jsonl") if row["split"] == "eval"]
    assert {row["never"] for row in samples} == {None}
    assert strict(output / "metrics.jsonl")[0]["unscored"] == 0
    # No function has the name of another figure in these files.
    evaluation, *_ = strict(output / "eval.jsonl")
    names = {name.removeprefix("eval_") for name in evaluation}.union(*samples)
    assert names == {*FIGURES, "never", "exact_match"}
    assert json.loads((output / "summary.json").read_text(), parse_constant=pytest.fail) == summary


def test_the_summary_leaves_out_steps_without_a_reward(tmp_path):
    rewards = [None, 1.0, *[None] * 16, None, None]
    row = {"tokens": 1, "seconds": 1.0, "kl": 0, "entropy": 0, "teacher_forbidden": 0}
    rows = [{**row, "step": i, "reward": r, "objective": r} for i, r in enumerate(rewards, start=1)]
    held_out = [{"step": 0, "eval_reward": 1.0}, {"step": 20, "eval_reward": None}]
    summary = report.summarise(config(tmp_path), rows, held_out)
    assert summary["train"]["reward"] == {"first": 1.0, "last": None}
    assert summary["warnings"] == []


def test_gradient_with_responses_that_could_not_be_scored(tmp_path):
    """Compares with autograd of advantages from their definition, w_j s_ij (r_ij - m_ij)."""
    missing = [[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]]
    first, second = (
        lambda completions, row=row: [
            None if absent else len(text) for text, absent in zip(completions, row, strict=True)
        ]
        for row in missing
    )
    run, models, batch = prepared(tmp_path, rewards=paths(first=first, second=second))
    weights, count = ScheduledWeights(2.0, 1.0, 1.0), int(batch.mask.sum())
    result = micro_batch_loss(run, models, batch, weights, count)
    result.loss.backward()
    got = gradient(models)

    costs = (result.log_prob - result.teacher_log_prob).detach().double() * batch.mask
    texts = [len(text) for text in batch.completions]
    total = torch.zeros(8, dtype=torch.float64)
    for weight, row in enumerate(missing, start=1):
        for i in range(8):
            group = range(i // 4 * 4, i // 4 * 4 + 4)
            others = [texts[k] for k in group if k != i and not row[k]]
            mean = sum(others) / len(others) if others else 0.0
            total[i] += 0.0 if row[i] else weight * (texts[i] - mean)
    cost = costs.sum(1)
    others = (cost.view(2, 4).sum(1, keepdim=True) - cost.view(2, 4)) / 3
    future = costs.flip(1).cumsum(1).flip(1) - costs
    advantage = 2.0 * total[:, None] - future + others.view(8, 1)
    inputs = replace(models, heads=()).loss_inputs(batch.rollout)
    log_p, log_q = (x.double().log_softmax(-1) for x in (inputs.student[0], inputs.teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    log_prob = log_p.gather(2, batch.rollout.tokens[..., None]).squeeze(2)
    (((kl - advantage * log_prob) * batch.mask).sum() / count).backward()
    torch.testing.assert_close(got, gradient(models), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("share", ["some", "none"])
def test_a_run_with_responses_that_could_not_be_scored(tmp_path, share, capsys):
    def some(completions):
        return [None if share == "none" or row % 3 else row for row in range(len(completions))]

    held_out = str(write_prompts(tmp_path / "eval.jsonl"))
    run = config(tmp_path, rewards=paths(some=some), eval_file=held_out, eval_steps=1)
    summary = train(run)
    rows = strict(tmp_path / "run/metrics.jsonl")
    expected = None if share == "none" else 3.0  # the mean of 0, 3 and 6
    assert [row["reward"] for row in rows] == [expected] * 2
    assert [row["unscored"] for row in rows] == [1.0 if share == "none" else 5 / 8] * 2
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert summary["train"]["reward"] == {"first": expected, "last": expected}
    assert None in {row["reward"] for row in strict(tmp_path / "run/samples.jsonl")}
    assert "none" in capsys.readouterr().out
