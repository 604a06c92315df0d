"""Student, teacher and tokenizer from `transformers` checkpoints, and what binds them together."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train.config import TrainConfig, UserError
from train.data import Example
from train.rollout import Rollout, completion_logits, vocabulary_of


@dataclass
class Models:
    """The student that learns, the teacher that it is compared with, and their tokenizer.

    Attributes:
        student: fp32 weights.
        teacher: frozen.
        tokenizer: the student's.
        vocab_size: the tokens that both know; logits beyond are cut off.
        temperature: T of the student's policy, in sampling and in log-probabilities.
        teacher_temperature: T of the teacher's distribution.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    temperature: float
    teacher_temperature: float

    def student_logits(self, rollout: Rollout) -> Tensor:
        """`[B, T, vocab_size]`, differentiable, not yet divided by the temperature."""
        return completion_logits(self.student, rollout, self.vocab_size)

    @torch.no_grad()
    def teacher_logits(self, rollout: Rollout) -> Tensor:
        """`[B, T, vocab_size]`, scaled so that dividing by `temperature` (the student's, which the
        loss does to both sides) leaves softmax(w / teacher_temperature)."""
        logits = completion_logits(self.teacher, rollout, self.vocab_size)
        if self.teacher_temperature != self.temperature:
            logits.mul_(self.temperature / self.teacher_temperature)
        return logits


def load_models(config: TrainConfig, student_path: str | Path) -> Models:
    """Student, teacher and tokenizer, checked against each other.

    Both models are in eval mode: dropout would make the sampled and the trained policy two
    different ones. Gradients flow all the same.

    Args:
        config: `bf16` halves the teacher; the student keeps fp32 master weights.
        student_path: `config.student`, or the model of a checkpoint.
    """
    tokenizer = _load("student", AutoTokenizer, str(student_path))
    student = _load("student", AutoModelForCausalLM, str(student_path), dtype=torch.float32)
    generation = student.generation_config
    if generation is not None and not generation.do_sample:
        # Sampling settings without do_sample load, but transformers refuses to save them again.
        sampling = (generation.temperature, generation.top_p, generation.top_k)
        generation.do_sample = any(value not in (None, 1.0, 50) for value in sampling) or None
    precision = torch.bfloat16 if config.bf16 else torch.float32
    teacher = _load("teacher", AutoModelForCausalLM, config.teacher, dtype=precision)
    _check_same_tokens(tokenizer, config.teacher)
    return Models(
        student=student.eval(),
        teacher=teacher.eval().requires_grad_(False),
        tokenizer=tokenizer,
        vocab_size=shared_vocabulary(config, student, teacher),
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature or config.temperature,
    )


def _load(option: str, loader: type, path: str, **options):
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}: can't load {path!r}: {reason}") from error


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """The teacher scores the student's token ids, so an id must mean the same to both."""
    try:
        theirs = AutoTokenizer.from_pretrained(teacher).get_vocab()
    except (OSError, ValueError):
        warnings.warn(
            f"teacher: {teacher!r} has no tokenizer to compare; its token ids are taken to be the "
            "student's",
            stacklevel=2,
        )
        return
    for token, index in tokenizer.get_vocab().items():
        if theirs.get(token, index) != index:
            raise UserError(
                f"teacher: token {token!r} has id {theirs[token]} in {teacher!r}, and {index} in "
                "the student's tokenizer; student and teacher must share one tokenizer"
            )


def shared_vocabulary(
    config: TrainConfig, student: PreTrainedModel, teacher: PreTrainedModel
) -> int:
    """How many tokens the two models have in common: declared, never guessed.

    Raises:
        UserError: the models' output layers differ and `vocab_size` is not given, or is too large.
    """
    sizes = [vocabulary_of(model) for model in (student, teacher)]
    if config.vocab_size is None:
        if sizes[0] != sizes[1]:
            raise UserError(
                f"vocab_size: missing, and the student has {sizes[0]} logits, the teacher "
                f"{sizes[1]}; where they only pad differently, set vocab_size to the shared prefix "
                "(the tokenizer's length, as a rule)"
            )
        return sizes[0]
    if config.vocab_size > min(sizes):
        raise UserError(
            f"vocab_size: got {config.vocab_size}, but the student has {sizes[0]} logits and the "
            f"teacher {sizes[1]}; give at most {min(sizes)}"
        )
    return config.vocab_size


def check_lengths(config: TrainConfig, examples: list[Example], *models: PreTrainedModel) -> None:
    """The longest prompt and its response fit into every model's positions.

    Raises:
        UserError: they don't.
    """
    longest = max(len(example.token_ids) for example in examples)
    for model in models:
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest + config.max_completion_length > limit:
            raise UserError(
                f"max_completion_length: {config.max_completion_length} after a prompt of "
                f"{longest} tokens exceeds the {limit} positions of {model.name_or_path!r}; "
                "shorten one of the two"
            )
