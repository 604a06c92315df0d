"""Student, teachers and tokenizer from `transformers` checkpoints, as inputs of a loss."""

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
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

# A teacher's folder may hold a PEFT adapter, and the name of the model that it belongs to.
_ADAPTER, _BASE = "adapter_config.json", "base_model_name_or_path"


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


def load_tokenizer(config: TrainConfig, student_path: str | Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer, checked against the teachers'.

    Raises:
        UserError: it can't be loaded, or a teacher's gives a token another id.
    """
    if (Path(student_path) / _ADAPTER).exists():
        raise UserError(
            f"student: {str(student_path)!r} holds a PEFT adapter, not a whole model; merge it "
            "into its base model (PEFT's merge_and_unload), and save that"
        )
    tokenizer = _load("student", AutoTokenizer, str(student_path))
    if _is_empty(tokenizer):
        raise UserError(f"student: {str(student_path)!r} has no tokenizer; save it there, too")
    for entry in config.teachers:
        _check_same_tokens(tokenizer, entry.model)
    return tokenizer


def check_prompts(
    config: TrainConfig, student_path: str | Path, examples: Sequence[Example]
) -> None:
    """Checks that every model knows the prompts' tokens, and has positions for the longest one and
    its response. Reads the models' configs, not their weights.

    Raises:
        UserError: they don't fit, or a model has no config.
    """
    longest = max(len(example.token_ids) for example in examples)
    largest = max(max(example.token_ids) for example in examples)
    paths = [("student", str(student_path)), *(("teacher", spec.model) for spec in config.teachers)]
    for option, path in paths:
        model = _load(option, AutoConfig, _base(option, path)).get_text_config()
        limit = getattr(model, "max_position_embeddings", None)
        # Some models without a limit have -1.
        if limit is not None and 0 < limit < longest + config.max_completion_length:
            raise UserError(
                f"max_completion_length: {config.max_completion_length} after a prompt of "
                f"{longest} tokens exceeds the {limit} positions of {path!r}; shorten one of the "
                "two"
            )
        known = getattr(model, "vocab_size", None)
        if known is not None and largest >= known:
            raise UserError(
                f"{option}: the student's tokenizer has the id {largest} in a prompt, but the "
                f"vocabulary of {path!r} has {known} entries; resize the model's embeddings (with "
                "resize_token_embeddings), or leave such tokens out"
            )


def _base(option: str, path: str) -> str:
    """The model that a PEFT adapter belongs to; of any other folder, the folder."""
    adapter = Path(path) / _ADAPTER
    if not adapter.exists():
        return path
    try:
        return str(dict(json.loads(adapter.read_text(encoding="utf-8")))[_BASE])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{option}: {str(adapter)!r} names no model in {_BASE!r}") from error


def load_models(
    config: TrainConfig, student_path: str | Path, tokenizer: PreTrainedTokenizerBase
) -> Models:
    """Student and teachers, checked against each other.

    All models are in eval mode: with dropout, the trained policy would differ from the sampled one.
    Gradients flow in eval mode, too.

    Args:
        config: its `bf16` is the dtype of the teachers; the student keeps fp32 master weights.
        student_path: `config.student`, or the model of a checkpoint.
        tokenizer: the student's.

    Raises:
        UserError: a model can't be loaded, or its vocabulary is not that of the others.
    """
    student = _load_model("student", str(student_path), torch.float32)
    _check_generation_config(Path(student_path), student.generation_config)
    precision = torch.bfloat16 if config.bf16 else torch.float32
    teachers = []
    for entry in config.teachers:
        teacher = _load_model("teacher", entry.model, precision)
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


def _check_generation_config(folder: Path, generation: GenerationConfig | None) -> None:
    """Checks what would otherwise fail when responses are drawn or a checkpoint is saved.

    Sampling settings without `do_sample`, which many models have, load, but transformers does not
    save them again, so it is set.
    """
    if (folder / "generation_config.json").exists():
        # The model's loader takes defaults in place of a file that it can't read.
        _load("student", GenerationConfig, str(folder))
    if generation is None:
        return
    name = f"student: generation_config.json of {str(folder)!r}"
    ids: Any = generation.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(index) is int for index in listed):
        raise UserError(f"{name}: eos_token_id is {ids!r}, expected a token id, or a list of them")
    with tempfile.TemporaryDirectory() as somewhere:
        try:
            generation.save_pretrained(somewhere)
        except ValueError:
            generation.do_sample = True
            try:
                generation.save_pretrained(somewhere)
            except ValueError as error:
                reason = " ".join(str(error).split("\n")[:2])
                raise UserError(f"{name}: {reason}") from error


def _load(option: str, loader: type, path: str, **options):
    if path.startswith(("/", ".")) and not Path(path).is_dir():
        raise UserError(f"{option}: there is no folder {path!r}")
    try:
        return loader.from_pretrained(path, **options)
    except Exception as error:  # of whatever type: that depends on what is in the folder
        reason = " ".join(str(error).split("\n")[:2])
        raise UserError(
            f"{option}: can't load {path!r}: {type(error).__name__}: {reason}"
        ) from error


def _load_model(option: str, path: str, dtype: torch.dtype) -> PreTrainedModel:
    model, info = _load(
        option,
        AutoModelForCausalLM,
        path,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed in `info`; otherwise, in a report on the terminal
    )
    mismatched = [f"{name} ({tuple(got)})" for name, got, _ in info["mismatched_keys"]]
    missing = sorted([*info["missing_keys"], *mismatched])
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{option}: {path!r} lacks {len(missing)} weights that its config.json asks for, which "
            f"would be random numbers: {some}. Give a whole checkpoint of a causal language model"
        )
    return model


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has special tokens only, as what transformers makes of a folder without one."""
    return set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, teacher: str) -> None:
    """Checks that token ids mean the same to the teacher, which scores the student's ids."""
    reason = f"{teacher!r} has no tokenizer"
    teacher_ids: dict[str, int] = {}
    try:
        other = _load("teacher", AutoTokenizer, teacher)
        teacher_ids = {} if _is_empty(other) else other.get_vocab()
    except UserError as error:
        reason = str(error).removeprefix("teacher: ")
    if not teacher_ids:
        warnings.warn(
            f"teacher: its token ids are assumed to be those of the student, because {reason}",
            stacklevel=2,
        )
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
