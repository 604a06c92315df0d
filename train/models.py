"""Student, teachers and tokenizer from `transformers` checkpoints, and what binds them."""

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
    TokenTerms,
    TopK,
    hybrid_loss,
    linear_hybrid_loss,
    linear_token_terms,
    token_terms,
)
from train.config import TrainConfig, UserError
from train.data import Example
from train.heads import OutputLayer, output_layer
from train.rollout import Rollout, completion_hidden, completion_logits, vocabulary_of


@dataclass(frozen=True)
class Comparison:
    """Both sides on one rollout, from hidden states or from logits, for any number of losses.

    Attributes:
        student: the leading arguments of a loss.
        teacher: as the losses take it.
        options: what the student's output layer adds to them.
        linear: whether the arguments are those of the linear functions.
    """

    student: tuple[Tensor, ...]
    teacher: Any
    options: dict[str, Any]
    linear: bool

    def hybrid_loss(self, *arguments: Any, **options: Any) -> HybridLoss:
        function: Any = linear_hybrid_loss if self.linear else hybrid_loss
        return function(*self.student, self.teacher, *arguments, **self.options, **options)

    def token_terms(self, *arguments: Any, **options: Any) -> TokenTerms:
        function: Any = linear_token_terms if self.linear else token_terms
        return function(*self.student, self.teacher, *arguments, **self.options, **options)


@dataclass
class Models:
    """The student that learns, the teachers that it is compared with, and their tokenizer.

    Attributes:
        student: fp32 weights.
        teachers: frozen.
        weights: of the teachers' divergences.
        tokenizer: the student's.
        vocab_size: the tokens that all know; logits beyond are cut off.
        temperature: T of the student's policy, in sampling and in log-probabilities.
        teacher_temperature: T of the teachers' distributions.
        top_k: how many entries of a side a teacher's support has; None for full teachers.
        top_k_support: whose they are: "student", "teacher" or "union".
        heads: the output layers of the student and of each teacher, where losses are computed from
            hidden states; empty where from logits.
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

    def compare(self, rollout: Rollout, full: bool = False) -> Comparison:
        """Both sides on a rollout; `full` for teachers on the whole vocabulary, whatever they tell
        the loss. The student's is differentiable."""
        if not self.heads or not (full or self.top_k is None):
            logits = self.student_logits(rollout)
            teacher = self.full_teacher(rollout) if full else self.teacher(rollout, logits)
            return Comparison((logits,), teacher, {}, linear=False)
        own, *theirs = self.heads
        weight, bias = own.tensors(self.vocab_size)
        options = {"student_bias": bias, "softcap": own.softcap, "logit_scale": own.logit_scale}
        teachers = [
            self._linear_teacher(model, head, rollout)
            for model, head in zip(self.teachers, theirs, strict=True)
        ]
        hidden = completion_hidden(self.student, rollout)
        return Comparison((hidden, weight), self._weighted(teachers), options, linear=True)

    @torch.no_grad()
    def _linear_teacher(
        self, model: PreTrainedModel, head: OutputLayer, rollout: Rollout
    ) -> LinearTeacher:
        # (With this factor on the logits as `teacher_logits` has it.)
        factor = self.temperature / self.teacher_temperature
        weight, bias = head.tensors(self.vocab_size)
        return LinearTeacher(
            completion_hidden(model, rollout),
            weight,
            bias,
            None if head.softcap is None else head.softcap * factor,
            head.logit_scale * factor,
        )

    def student_logits(self, rollout: Rollout) -> Tensor:
        """`[B, T, vocab_size]`, differentiable, not yet divided by the temperature."""
        return completion_logits(self.student, rollout, self.vocab_size)

    @property
    def total_weight(self) -> float:
        """W = sum of the teachers' weights: a token costs W (log p(y) - mean log q(y))."""
        return sum(self.weights)

    def teacher(self, rollout: Rollout, student_logits: Tensor) -> Tensor | TopK | Mixture:
        """What `hybrid_loss` takes as its teacher.

        Args:
            rollout: the sampled tokens.
            student_logits: `[B, T, vocab_size]`, whose best entries may be the support.
        """
        if self.top_k is None:
            return self.full_teacher(rollout)
        members: list[TopK] = []
        for model in self.teachers:
            logits = self.teacher_logits(model, rollout)
            ids = members[0].ids if members else self._support(student_logits, logits)
            member = TopK.from_logits(
                logits, ids=ids, token_ids=rollout.tokens, temperature=self.temperature
            )
            members.append(member)
        return self._weighted(members)

    def full_teacher(self, rollout: Rollout) -> Tensor | Mixture:
        """The teachers on the whole vocabulary, whatever they tell the loss."""
        return self._weighted([self.teacher_logits(model, rollout) for model in self.teachers])

    def _weighted(self, members: list) -> Any:
        if self.weights == [1.0]:
            return members[0]
        return Mixture(list(zip(self.weights, members, strict=True)))

    def _support(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        assert self.top_k is not None
        size = min(self.top_k, self.vocab_size)
        sides = {"student": [student_logits], "teacher": [teacher_logits]}
        chosen = sides.get(self.top_k_support, [student_logits, teacher_logits])
        if len(chosen) * size > self.vocab_size:
            everything = torch.arange(self.vocab_size, device=student_logits.device)
            return everything.expand(student_logits.shape).contiguous()
        return torch.cat([side.detach().topk(size, dim=-1).indices for side in chosen], -1)

    @torch.no_grad()
    def teacher_logits(self, teacher: PreTrainedModel, rollout: Rollout) -> Tensor:
        """`[B, T, vocab_size]`, scaled so that dividing by `temperature` (the student's, which the
        loss does to both sides) leaves softmax(w / teacher_temperature)."""
        logits = completion_logits(teacher, rollout, self.vocab_size)
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
    teachers = []
    for entry in config.teachers:
        teacher = _load("teacher", AutoModelForCausalLM, entry.model, dtype=precision)
        _check_same_tokens(tokenizer, entry.model)
        teachers.append(teacher.eval().requires_grad_(False))
    student = student.eval()
    found = [output_layer(model) for model in (student, *teachers)] if config.fused_linear else []
    heads = tuple(head for head in found if head is not None)
    if len(heads) < len(found):
        warnings.warn(
            "fused_linear: a model's output layer is not a product, scale and softcap; losses are "
            "computed from whole logits",
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
    config: TrainConfig, student: PreTrainedModel, *teachers: PreTrainedModel
) -> int:
    """How many tokens the models have in common: declared, never guessed.

    Raises:
        UserError: the models' output layers differ and `vocab_size` is not given, or is too large.
    """
    sizes = [vocabulary_of(model) for model in (student, *teachers)]
    others = ", ".join(f"{size}" for size in sizes[1:])
    if config.vocab_size is None:
        if len(set(sizes)) > 1:
            raise UserError(
                f"vocab_size: missing, and the student has {sizes[0]} logits, the teacher "
                f"{others}; where they only pad differently, set vocab_size to the shared prefix "
                "(the tokenizer's length, as a rule)"
            )
        return sizes[0]
    if config.vocab_size > min(sizes):
        raise UserError(
            f"vocab_size: got {config.vocab_size}, but the student has {sizes[0]} logits and the "
            f"teacher {others}; give at most {min(sizes)}"
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
