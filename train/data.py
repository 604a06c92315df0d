"""Prompts from JSONL files, and the order in which they are drawn."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from train.config import UserError

# What rewards get besides the columns of the file.
GIVEN_TO_REWARDS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class Example:
    """One line of a prompt file.

    Attributes:
        prompt: text, or chat messages `{"role": ..., "content": ...}`, as in the file.
        token_ids: the prompt's tokens, including the chat template's generation prompt.
        columns: the line's other keys and values, for the rewards.
    """

    prompt: str | list[dict[str, str]]
    token_ids: list[int]
    columns: dict[str, Any]


def read_examples(option: str, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of a JSONL file. Lines that lack a column of other lines get None for it.

    Args:
        option: the option that names the file, for error messages.

    Raises:
        UserError: no such file, a line that is not a JSON object with a `prompt`, an empty
            prompt, or messages without a chat template.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{option}: can't read {path!r}: {error.strerror}") from error
    rows = []
    for count, line in enumerate(lines, start=1):
        where = f"{option}: {path} line {count}"
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text: {error}") from error
        if text.strip():
            rows.append((where, text))
    if not rows:
        raise UserError(f"{option}: {path!r} holds no prompts")
    appended = _appended(tokenizer)
    examples = [_example(where, line, tokenizer, len(appended)) for where, line in rows]
    if appended and any(isinstance(example.prompt, str) for example in examples):
        warnings.warn(
            f"{option}: the student's tokenizer appends {tokenizer.decode(appended)!r} to texts; "
            "it is left out, because a response could not go on from there",
            stacklevel=2,
        )
    names = sorted({key for example in examples for key in example.columns})
    for example in examples:
        for name in names:
            example.columns.setdefault(name, None)
    return examples


def _appended(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts behind a text, such as an EOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    end = len(full)
    while end and full[:end][-len(bare) :] != bare:
        end -= 1
    return full[end:] if end else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice; leave one out")
    return row


def _example(where: str, line: str, tokenizer: PreTrainedTokenizerBase, appended: int) -> Example:
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: of numbers with too many digits, too
        raise UserError(f"{where}: can't read this JSON: {error}") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise UserError(f"{where}: expected an object with the key `prompt`")
    prompt = row.pop("prompt")
    for reserved in GIVEN_TO_REWARDS:
        if reserved in row:
            raise UserError(f"{where}: {reserved!r} is what rewards receive; rename the column")
    is_chat = isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt)
    if not isinstance(prompt, str) and not is_chat:
        raise UserError(f"{where}: `prompt` must be text or a list of chat messages")
    if is_chat and not tokenizer.chat_template:
        raise UserError(f"{where}: chat messages, but the student's tokenizer has no template")
    try:
        token_ids = _tokenize(prompt, tokenizer, appended)
    except Exception as error:  # of whatever type: a template is a program, and may raise its own
        raise UserError(
            f"{where}: the student's tokenizer can't read this prompt: {type(error).__name__}: "
            f"{error}"
        ) from error
    if not token_ids:
        raise UserError(f"{where}: the prompt has no tokens; give it at least one")
    return Example(prompt, token_ids, row)


def _tokenize(
    prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, appended: int
) -> list[int]:
    json.dumps(prompt, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    if isinstance(prompt, str):
        token_ids = list(tokenizer(prompt)["input_ids"])
        return token_ids[: len(token_ids) - appended]
    # The template contains the special tokens. The tokenizer would add a second BOS, which the
    # model has never seen.
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class PromptStream:
    """An endless stream of examples, shuffled differently in each epoch.

    The seed and the position determine everything that follows.

    Attributes:
        position: how many examples have been drawn. Set it to resume.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._shuffled: tuple[int, list[int]] | None = None
        self.position = 0

    def take(self, count: int) -> list[Example]:
        """The next `count` examples."""
        taken = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Example:
        epoch, index = divmod(position, len(self._examples))
        if self._shuffled is None or self._shuffled[0] != epoch:
            # With torch's global generator, sampling would depend on the number of epochs so far.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._examples), generator=generator).tolist()
            self._shuffled = (epoch, order)
        return self._examples[self._shuffled[1][index]]


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as one batch, padded on the left: all completions start at the same index.

    Returns:
        input_ids `[B, P]` int64, and the attention mask `[B, P]` int64 (0 on padding).
    """
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask
