"""Prompt files, and the order of their prompts."""

import pytest
from helpers import make_tokenizer, write_prompts
from tokenizers.processors import TemplateProcessing

from train.config import UserError
from train.data import PromptStream, read_examples


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
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[0].name.first }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_named(tmp_path, template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    path = write_prompts(tmp_path / "x.jsonl", [{"prompt": [{"role": "user", "content": "a b"}]}])
    with pytest.raises(UserError, match=rf"line 1: the student's tokenizer can't.* {message}"):
        read_examples("train_file", str(path), tokenizer)


@pytest.mark.parametrize("text", ["a b", ""])
def test_what_the_tokenizer_appends_is_left_out(tmp_path, text):
    tokenizer = make_tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    path = str(write_prompts(tmp_path / "x.jsonl", [{"prompt": text}]))
    with pytest.warns(UserWarning, match="train_file: the student's tokenizer appends '</s>'"):
        (example,) = read_examples("train_file", path, tokenizer)
    assert tokenizer.decode(example.token_ids) == f"<s> {text}".strip()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: can't read this JSON: Expecting"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 2: can't read this JSON: Exceeds"),
        ("[" * 100_000, "line 2: can't read this JSON: maximum recursion"),
        ('{"prompt": "a", "n": {"m": 1, "m": 2}}', "the key 'm' is given twice; leave one out"),
        (b'{"prompt": "\xe9"}', "line 2: not UTF-8 text"),
        (b"\x1f\x8b\x08", "line 2: not UTF-8 text"),
        (
            r'{"prompt": "a \ud800"}',
            "line 2: the student's tokenizer can't read this prompt: Unicode",
        ),
        ("[1]", "line 2: expected an object with the key `prompt`"),
        ('{"prompt": 3}', "line 2: `prompt` must be text or a list of chat messages"),
        ('{"prompt": ""}', "line 2: the prompt has no tokens"),
        ('{"prompt": "a", "completions": 1}', "'completions' is what rewards receive"),
        ('{"prompt": "a", "prompts": 1}', "'prompts' is what rewards receive"),
        ('{"prompt": "a", "completion_ids": 1}', "'completion_ids' is what rewards receive"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
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
