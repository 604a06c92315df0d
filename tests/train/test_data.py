"""Prompt files, their order, and the rewards that are computed from them."""

import pytest
from helpers import make_tokenizer, write_prompts

from train.config import RewardConfig, UserError
from train.data import PromptStream, read_examples
from train.rewards import Scorer, exact_match, numeric_answer


def read(tmp_path, rows):
    return read_examples(
        "train_file", str(write_prompts(tmp_path / "x.jsonl", rows)), make_tokenizer()
    )


def test_columns_and_token_ids(tmp_path):
    rows = [{"prompt": "a b", "answer": "c", "level": 3}, {"prompt": "d", "answer": "e"}]
    first, second = read(tmp_path, rows)
    assert first.token_ids == [4, 5]
    assert first.columns == {"answer": "c", "level": 3}
    assert second.columns == {"answer": "e", "level": None}


def test_chat_messages_go_through_the_template(tmp_path):
    tokenizer = make_tokenizer()
    path = write_prompts(tmp_path / "x.jsonl", [{"prompt": [{"role": "user", "content": "a b"}]}])
    with pytest.raises(
        UserError, match="line 1: chat messages, but the student's tokenizer has no"
    ):
        read_examples("train_file", str(path), tokenizer)
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %} p{% endif %}"
    )
    (example,) = read_examples("train_file", str(path), tokenizer)
    assert tokenizer.decode(example.token_ids) == "<s> a b p"
    assert example.prompt == [{"role": "user", "content": "a b"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object with the key `prompt`"),
        ('{"prompt": 3}', "line 2: `prompt` must be text or a list of chat messages"),
        ('{"prompt": ""}', "line 2: the prompt has no tokens"),
        ('{"prompt": "a", "completions": 1}', "'completions' is what rewards receive"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_examples("train_file", str(path), make_tokenizer())
    assert message in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="eval_file: can't read"):
        read_examples("eval_file", str(tmp_path / "none"), make_tokenizer())
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_examples("train_file", str(tmp_path / "empty"), make_tokenizer())


def test_order_is_shuffled_complete_and_resumable(tmp_path):
    examples = read(tmp_path, [{"prompt": "a", "n": n} for n in range(10)])

    def numbers(stream, count):
        return [example.columns["n"] for example in stream.take(count)]

    whole = numbers(PromptStream(examples, seed=4), 25)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    assert whole[:10] != list(range(10))
    assert whole != numbers(PromptStream(examples, seed=5), 25)
    resumed = PromptStream(examples, seed=4)
    resumed.position = 7
    assert numbers(resumed, 10) + numbers(resumed, 8) == whole[7:]


def test_answer_rewards():
    texts = ["42", " 42\n", "43", "so 1,042.5", "none"]
    assert exact_match([""] * 5, texts, ["42", "42", 42, "x", ""]) == [1, 1, 0, 0, 0]
    answers = [42, "42.0", "42", "= 1042.5", "7"]
    assert numeric_answer([""] * 5, texts, answers) == [1, 1, 0, 1, 0]


USER_FILE = """
def named(prompts, completions, level):
    return [l + len(c) for l, c in zip(level, completions)]
def everything(prompts, completions, **columns):
    return [len(columns)] * len(prompts)
def optional(prompts, completions, absent=None):
    return [0.0 if absent is None else 1.0] * len(prompts)
def wanting(prompts, completions, absent):
    return [0.0] * len(prompts)
def short(prompts, completions):
    return [1.0]
def text(prompts, completions):
    return ["x"] * len(prompts)
def infinite(prompts, completions):
    return [float("inf")] * len(prompts)
"""


def scorer(tmp_path, *names):
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE)
    return Scorer(
        "rewards", [RewardConfig(f"{file}:{name}", 1.0 + i) for i, name in enumerate(names)]
    )


def test_user_rewards_get_their_columns_and_weights(tmp_path):
    examples = read(
        tmp_path, [{"prompt": "a", "level": 1, "answer": "b"}, {"prompt": "c", "level": 2}]
    )
    rewards = scorer(tmp_path, "named", "everything", "optional")
    scores = rewards.score(examples, ["xx", "yyy"])
    assert scores == {"named": [3, 5], "everything": [2, 2], "optional": [0, 0]}
    assert rewards.total(scores, 2) == [3 + 2 * 2, 5 + 2 * 2]
    assert Scorer("rewards", []).total({}, 2) == [0, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wanting", "reward wanting: wants the column 'absent', which the data lacks"),
        ("short", "reward short: returned 1 numbers for 2 completions"),
        ("text", "expected a list of 2 numbers"),
        ("infinite", "reward infinite: returned inf, expected finite numbers"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_wrong_rewards_are_named(tmp_path, name, message):
    examples = read(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UserError) as error:
        scorer(tmp_path, name).score(examples, ["x", "y"])
    assert message in str(error.value)


def test_wrong_reward_paths_are_named():
    for path, message in [
        ("no_colon", "expected `module:function`"),
        ("no.such.module:f", "can't import 'no.such.module'"),
        ("no/such.py:f", "there is no file 'no/such.py'"),
    ]:
        with pytest.raises(UserError) as error:
            Scorer("rewards", [RewardConfig(path)])
        assert message in str(error.value)
    with pytest.raises(UserError, match="two functions named 'exact_match'"):
        Scorer("rewards", [RewardConfig("train.rewards:exact_match")] * 2)
