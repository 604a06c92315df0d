"""Student, teachers and tokenizer from `transformers` checkpoints, as inputs of a loss."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hybrid_kernels import (
    HybridLoss,
    LinearTeacher,
    Mixture,
    OutputLayer,
    TokenTerms,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    output_layer,
    token_terms,
)
from train.config import TrainConfig, UserError
from train.data import Example
from train.rollout import Rollout, completion_hidden, completion_logits, vocabulary_of


@dataclass(frozen=True)
class LossInputs:
    """The student and its teachers on one rollout, for any number of losses.

    Attributes:
        student: logits `[B, T, V]` or, for the linear functions, hidden states `[B, T, D]` and the
            output layer.
        teacher: as the losses take it.
        temperature: that of the student.
    """

    student: tuple[Any, ...]
    teacher: Tensor | TopK | LinearTeacher | Mixture
    temperature: float

    @property
    def linear(self) -> bool:
        """Whether these are inputs of the linear functions."""
        return len(self.student) > 1

    def hybrid_loss(self, *arguments: Any, **options: Any) -> HybridLoss:
        function: Any = linear_hybrid_loss if self.linear else hybrid_loss
        options["temperature"] = self.temperature
        return function(*self.student, self.teacher, *arguments, **options)

    def token_terms(self, *arguments: Any, **options: Any) -> TokenTerms:
        function: Any = linear_token_terms if self.linear else token_terms
        options["temperature"] = self.temperature
        return function(*self.student, self.teacher, *arguments, **options)


@dataclass
class Models:
    """The student, the teachers that it is compared with, and the student's tokenizer.

    Attributes:
        student: fp32 weights.
        teachers: frozen.
        weights: one factor for the divergence from each teacher.
        tokenizer: the student's.
        vocab_size: how many tokens all models share; logits beyond are cut off.
        temperature: T of the student's policy, in sampling and in log-probabilities.
        teacher_temperature: T of the teachers' distributions.
        top_k: K, if the loss sees the teachers on a support of the K best tokens only; else None.
        top_k_support: whose K best: "student", "teacher" (the first) or "union".
        heads: the output layers of the student and of each teacher if losses are computed from
            hidden states; empty if they are computed from logits.
    """

    student: PreTrainedModel
    teachers: list[PreTrainedModel]
    weights: list[float]
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    temperature: float
    teacher_temperature: float
    top_k: int | None = None
    top_k_support: str = "student"
    heads: tuple[OutputLayer, ...] = ()

    @property
    def total_weight(self) -> float:
        """W = sum of the teachers' weights: a token costs W (log p(y) - mean log q(y))."""
        return sum(self.weights)

    def loss_inputs(self, rollout: Rollout, full: bool = False) -> LossInputs:
        """The student, which is differentiable, and its teachers, as a loss takes them.

        A teacher is given by its hidden states and output layer, by its log-probabilities on a
        top-K support, or by its logits. Several teachers, or one with a weight other than 1, are
        a `Mixture`.

        Args:
            full: take the teachers on the whole vocabulary, even if `top_k` is set.
        """
        vocab_size = self.vocab_size
        # A loss divides the logits of both sides by the student's temperature.
        teacher_factor = self.temperature / self.teacher_temperature
        by_top_k = self.top_k is not None and not full
        linear = bool(self.heads) and not by_top_k
        teachers: list[Any] = []
        if linear:
            # Teachers first, so that the student's activations are not held meanwhile.
            student_head, *teacher_heads = self.heads
            for model, head in zip(self.teachers, teacher_heads, strict=True):
                with torch.no_grad():
                    hidden = completion_hidden(model, rollout)
                head = _scaled_prefix(head, vocab_size, teacher_factor)
                teachers.append(LinearTeacher(hidden, head))
            hidden = completion_hidden(self.student, rollout)
            student = (hidden, _scaled_prefix(student_head, vocab_size))
        else:
            student = (completion_logits(self.student, rollout, vocab_size),)
            for model in self.teachers:
                with torch.no_grad():
                    teacher: Any = completion_logits(model, rollout, vocab_size)
                    teacher.mul_(teacher_factor)
                if by_top_k:
                    ids = teachers[0].ids if teachers else self._support(student[0], teacher)
                    teacher = TopK.from_logits(
                        teacher, ids=ids, token_ids=rollout.tokens, temperature=self.temperature
                    )
                teachers.append(teacher)
        teacher = teachers[0]
        if self.weights != [1.0]:
            teacher = Mixture(list(zip(self.weights, teachers, strict=True)))
        return LossInputs(student, teacher, self.temperature)

    def _support(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """`[B, T, K]` token ids, the K best of one side; up to 2 K ids if both sides choose."""
        assert self.top_k is not None
        size = min(self.top_k, self.vocab_size)
        sides = {"student": [student_logits], "teacher": [teacher_logits]}
        chosen = sides.get(self.top_k_support, [student_logits, teacher_logits])
        if len(chosen) * size > self.vocab_size:
            every_token = torch.arange(self.vocab_size, device=student_logits.device)
            return every_token.expand(student_logits.shape).contiguous()
        return torch.cat([side.detach().topk(size, dim=-1).indices for side in chosen], -1)


def _scaled_prefix(head: OutputLayer, vocab_size: int, factor: float = 1.0) -> OutputLayer:
    """The layer of `factor` times the first `vocab_size` logits."""
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    softcap = None if head.softcap is None else head.softcap * factor
    if len(weight) > vocab_size:
        weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    return OutputLayer(weight, bias, softcap, head.logit_scale * factor)


def load_models(config: TrainConfig, student_path: str | Path) -> Models:
    """Student, teachers and tokenizer, checked against each other.

    All models are in eval mode: with dropout, the trained policy would differ from the sampled one.
    Gradients flow in eval mode, too.

    Args:
        config: its `bf16` is the dtype of the teachers; the student keeps fp32 master weights.
        student_path: `config.student`, or the model of a checkpoint.

    Raises:
        UserError: a model can't be loaded, or two of them don't share their tokens.
    """
    tokenizer = _load("student", AutoTokenizer, str(student_path))
    student = _load("student", AutoModelForCausalLM, str(student_path), dtype=torch.float32)
    generation = student.generation_config
    if generation is not None and not generation.do_sample:
        # Sampling settings without do_sample load, but transformers refuses to save them again.
        sampling = (generation.temperature, generation.top_p, generation.top_k)
        generation.do_sample = any(value not in (None, 1.0, 50) for value in sampling) or None
    precision = torch.bfloat16 if config.bf16 else torch.float32
    teachers = []
    for entry in config.teachers:
        teacher = _load("teacher", AutoModelForCausalLM, entry.model, dtype=precision)
        _check_same_tokens(tokenizer, entry.model)
        teachers.append(teacher.eval().requires_grad_(False))
    student = student.eval()
    models = (student, *teachers) if config.fused_linear else ()
    heads = tuple(head for model in models if (head := output_layer(model)) is not None)
    if len(heads) < len(models):
        warnings.warn(
            "fused_linear: a model's output layer does more than multiply, scale and softcap; "
            "losses are computed from whole logits",
            stacklevel=2,
        )
        heads = ()
    return Models(
        student=student,
        teachers=teachers,
        weights=[entry.weight for entry in config.teachers],
        tokenizer=tokenizer,
        vocab_size=shared_vocabulary(config, student, *teachers),
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature or config.temperature,
        top_k=config.top_k_teacher,
        top_k_support=config.top_k_support,
        heads=heads,
    )


def _load(option: str, loader: type, path: str, **options):
    try:
        return loader.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}: can't load {path!r}: {reason}") from error


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """Checks that token ids mean the same to the teacher, which scores the student's ids."""
    try:
        teacher_ids = AutoTokenizer.from_pretrained(teacher).get_vocab()
    except (OSError, ValueError):
        warnings.warn(
            f"teacher: {teacher!r} has no tokenizer to compare; its token ids are assumed to be "
            "those of the student",
            stacklevel=2,
        )
        return
    for token, index in tokenizer.get_vocab().items():
        if teacher_ids.get(token, index) != index:
            raise UserError(
                f"teacher: token {token!r} has id {teacher_ids[token]} in {teacher!r}, but {index} "
                "in the student's tokenizer; student and teacher must share one tokenizer"
            )


def shared_vocabulary(
    config: TrainConfig, student: PreTrainedModel, *teachers: PreTrainedModel
) -> int:
    """How many tokens the models have in common; it is never guessed from different sizes.

    Raises:
        UserError: the models' output layers differ and `vocab_size` is not given, or is too large.
    """
    sizes = [vocabulary_of(model) for model in (student, *teachers)]
    teacher_sizes = ", ".join(map(str, sizes[1:]))
    if config.vocab_size is None:
        if len(set(sizes)) > 1:
            raise UserError(
                f"vocab_size: missing, and the student has {sizes[0]} logits, the teacher "
                f"{teacher_sizes}; if they differ in padding only, set vocab_size to the shared "
                "prefix (usually the tokenizer's length)"
            )
        return sizes[0]
    if config.vocab_size > min(sizes):
        raise UserError(
            f"vocab_size: got {config.vocab_size}, but the student has {sizes[0]} logits and the "
            f"teacher {teacher_sizes}; give at most {min(sizes)}"
        )
    return config.vocab_size


def check_lengths(config: TrainConfig, examples: list[Example], *models: PreTrainedModel) -> None:
    """Checks that the longest prompt and its response fit into every model's positions.

    Raises:
        UserError: they don't fit.
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
