"""Two-digit addition: problems, a tokenizer and models, for the demo and `configs/tiny.yaml`.

The teacher has learned to add without carrying from the ones to the tens: it is right in the 55 %
of problems where nothing is carried, and wrong in the others. The student has seen noisy sums only.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Addends = tuple[int, int]
VOCABULARY = ("<pad>", "<eos>", "<unk>", *"0123456789", "+", "=", " ")
PAD, END = VOCABULARY.index("<pad>"), VOCABULARY.index("<eos>")
MAX_ANSWER = 4  # tokens: three digits and the end


def prompt(problem: Addends) -> str:
    return f"{problem[0]:02d}+{problem[1]:02d}="


def true_sum(problem: Addends) -> str:
    return f"{sum(problem):03d}"


def sum_without_carry(problem: Addends) -> str:
    """The biased teacher's answer: 27+48 is 65, because the 1 carried by 7+8 is dropped."""
    (tens_a, ones_a), (tens_b, ones_b) = (divmod(number, 10) for number in problem)
    return f"{(tens_a + tens_b) * 10 + (ones_a + ones_b) % 10:03d}"


def noisy_sum(problem: Addends, noise: random.Random) -> str:
    """The true sum, each digit replaced by a random one with probability 1/2."""
    return "".join(
        digit if noise.random() < 0.5 else noise.choice("0123456789") for digit in true_sum(problem)
    )


def all_problems(seed: int) -> list[Addends]:
    """The 10,000 pairs from 00 to 99, in a shuffled order that `seed` fixes."""
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(problems)
    return problems


def write_problems(path: Path, problems: Sequence[Addends]) -> None:
    """Writes a JSONL file with each `prompt` and the true `answer`."""
    rows = [{"prompt": prompt(problem), "answer": true_sum(problem)} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, 16 in all."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(seed: int, hidden_size: int = 64, layers: int = 2) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config)


def fit(
    model: Qwen2ForCausalLM,
    problems: Sequence[Addends],
    label: Callable[[Addends], str],
    *,
    steps: int,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Trains a model under supervision.

    Args:
        label: the answer to a problem; called each time that the problem is drawn.
        steps: the largest number of updates, on 128 problems each.
        stop: called every 10 steps; true ends the training.
    """
    tokenizer = make_tokenizer()
    order = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prompt_length = len(prompt((0, 0)))
    for step in range(1, steps + 1):
        batch = order.choices(problems, k=128)
        # All problems have the same number of characters, so no padding is needed.
        rows = [tokenizer(prompt(problem) + label(problem))["input_ids"] for problem in batch]
        ids = torch.tensor([[*row, END] for row in rows])
        answers = ids.clone()
        answers[:, :prompt_length] = -100
        loss = model(input_ids=ids, labels=answers).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if stop is not None and step % 10 == 0 and stop():
            return


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Writes an ordinary `transformers` checkpoint, including the tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tiny(folder: Path) -> None:
    """Writes two untrained models and a few problems, enough to try out a run."""
    for seed, name in enumerate(("student", "teacher")):
        save(make_model(seed, hidden_size=16, layers=1), folder / name)
    problems = all_problems(seed=0)
    write_problems(folder / "train.jsonl", problems[:64])
    write_problems(folder / "eval.jsonl", problems[64:96])


def right_digits(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]
) -> list[float]:
    """A reward: the share of the answer's digits that the completion has at the same place."""
    return [
        sum(a == b for a, b in zip(text, expected, strict=False)) / len(expected)
        for text, expected in zip(completions, answer, strict=True)
    ]
