"""Every option of a run: one dataclass, read from a YAML file and `key=value` overrides."""

import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hybrid_kernels import Divergence
from train.schedules import Schedule, number, parse_schedule

BASELINES = ("none", "leave_one_out", "group_mean", "per_token_leave_one_out")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
SUPPORTS = ("student", "teacher", "union")
TAILS = ("bucket", "renormalize", "mask")
MAX_TOP_K = 512  # of each side; the kernels hold a union of twice as many
# Written into a run's config.yaml for the reader; not an option.
ENVIRONMENT = "environment"
_ONE = Schedule(1.0)


class UserError(ValueError):
    """Something the user can mend: an option, a file, a reward. The message says how."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward: where its function is, and its weight in the sum.

    Attributes:
        function: `package.module:function` or `path/to/file.py:function`.
        weight: the factor of its value.
    """

    function: str
    weight: float = 1.0


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher: its checkpoint, and the weight of its divergence.

    Attributes:
        model: a local `transformers` directory or a hub name.
        weight: above 0.
    """

    model: str
    weight: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run. `{output_dir}` in the four paths below stands for that folder."""

    output_dir: str
    student: str  # a local `transformers` directory or a hub name
    teachers: list[TeacherConfig]  # `teacher: path` is short for one
    train_file: str  # JSONL: `prompt` (text, or chat messages) and the columns of the rewards
    eval_file: str | None = None  # held out; None skips every evaluation
    setup: str | None = None  # `module:function`, called once with {output_dir}/assets to fill it

    # The objective: KL(student || teacher) - reward_weight * reward.
    rewards: list[RewardConfig] = field(default_factory=list)
    eval_metrics: list[RewardConfig] = field(default_factory=list)  # on eval_file only
    reward_weight: Schedule = _ONE  # lambda
    gamma: Schedule = _ONE  # discount of future KL costs in the sparse term
    dense_weight: Schedule = _ONE  # eta: the share of the KL that the dense term charges
    sampled_kl: bool = True  # charge 1 - dense_weight of each token's KL on the sample
    entropy_weight: float = 0.0
    divergence: str | dict = "reverse_kl"  # a name, or {name: jsd, beta: 0.3}
    baseline: str = "leave_one_out"
    cost_clip: float | None = None  # bounds |log p(y) - log q(y)| where it enters the returns, nats
    teacher_floor: float | None = None  # teacher log-probabilities below are raised to it, nats
    vocab_size: int | None = None  # the shared prefix, where the models pad differently
    top_k_teacher: int | None = None  # K: teachers tell their log-probabilities on a support only
    top_k_support: str = "student"  # whose best K: student, teacher (the first) or union
    tail: str = "bucket"  # what stands for the rest: bucket, renormalize or mask
    fused_linear: bool = True  # losses from hidden states: logits exist in chunks only (not top-K)

    # Rollouts.
    num_generations: int = 8  # responses per prompt
    max_completion_length: int = 128  # tokens
    temperature: float = 1.0  # of the policy: sampling and log-probabilities alike
    teacher_temperature: float | None = None  # None: the same as `temperature`
    top_p: float = 1.0
    top_k: int = 0
    mask_truncated_completions: bool = False

    # Optimisation.
    max_steps: int = 100
    per_device_train_batch_size: int = 32  # completions in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    bf16: bool = False
    seed: int = 0

    # Watching and keeping.
    logging_steps: int = 1  # progress line and trackers; metrics.jsonl has every step
    eval_steps: int = 0  # 0: before and after only
    per_device_eval_batch_size: int = 64
    save_steps: int = 0  # 0: at the end only
    resume_from_checkpoint: str | None = None  # a checkpoint's folder, or `latest`
    report_to: str = "tensorboard"  # any tracker that accelerate knows, or `none`

    @property
    def prompts_per_step(self) -> int:
        return (
            self.per_device_train_batch_size
            * self.gradient_accumulation_steps
            // self.num_generations
        )

    def as_options(self) -> dict[str, Any]:
        """Plain values that `make_config` reads back into an equal config."""
        options = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Schedule):
                value = value.as_option()
            elif isinstance(value, list):
                value = [dict(vars(item)) for item in value]
            options[spec.name] = value
        return options


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a YAML file with `key=value` overrides; values are read as YAML, too.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or range.
    """
    options: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config: can't read {str(path)!r}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise UserError(f"--config: {str(path)!r} is not YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"--config: {str(path)!r} holds no `key: value` lines")
        options.update(loaded)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, such as learning_rate=1e-4")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {text!r} is not a YAML value: {error}") from error
    return make_config(options)


def make_config(options: dict[str, Any]) -> TrainConfig:
    """The checked config of plain values.

    Raises:
        UserError: as in `load_config`.
    """
    options = {key: value for key, value in options.items() if key != ENVIRONMENT}
    teacher = options.pop("teacher", None)
    if teacher is not None:
        if options.get("teachers") is not None:
            raise UserError("teachers: given together with teacher; keep one of the two")
        options["teachers"] = teacher
    specs = {spec.name: spec for spec in fields(TrainConfig)}
    for key in options:
        if key not in specs:
            raise UserError(f"{key}: unknown option{_suggestion(key, list(specs))}")
    for key in ("output_dir", "student", "teachers", "train_file"):
        if options.get(key) is None:
            name = "teacher" if key == "teachers" else key
            raise UserError(f"{name}: missing; add it to the file or the command line")
    hints = typing.get_type_hints(TrainConfig)
    try:
        values = {key: _typed(key, value, hints[key]) for key, value in options.items()}
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    folder = values["output_dir"]
    for key in ("student", "train_file", "eval_file"):
        if values.get(key) is not None:
            values[key] = values[key].replace("{output_dir}", folder)
    values["teachers"] = [
        TeacherConfig(item.model.replace("{output_dir}", folder), item.weight)
        for item in values["teachers"]
    ]
    config = TrainConfig(**values)
    _check(config)
    return config


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; the options are in train/config.py"


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of the field, or a ValueError that names it."""
    is_list = typing.get_origin(hint) is list
    choices = (hint,) if is_list else typing.get_args(hint) or (hint,)
    if value is None and type(None) in choices:
        return None
    if Schedule in choices:
        return parse_schedule(name, value)
    if bool in choices:
        if isinstance(value, bool):
            return value
        raise UserError(f"{name}: got {value!r}, expected true or false")
    if float in choices:
        return number(name, value)
    if int in choices:
        result = number(name, value)
        if result != int(result):
            raise UserError(f"{name}: got {value!r}, expected a whole number")
        return int(result)
    if dict in choices and isinstance(value, dict):
        return value
    if str in choices:
        if isinstance(value, str):
            return value
        raise UserError(f"{name}: got {value!r} ({type(value).__name__}), expected text")
    if typing.get_args(hint) == (TeacherConfig,):
        return _weighted(name, value, TeacherConfig, "model", "a checkpoint")
    return _weighted(name, value, RewardConfig, "function", "`module:function`, `file.py:function`")


def _weighted(name: str, value: Any, kind: type, key: str, form: str) -> list:
    """Entries that may be given with a weight or, as the text alone, without one."""
    entries = value if isinstance(value, list) else [value]
    found = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {key: entry}
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise UserError(
                f"{name}: got {entry!r}, expected {form}, or {{{key}: ..., weight: ...}}"
            )
        if unknown := sorted(set(entry) - {key, "weight"}):
            raise UserError(f"{name}: unknown key {unknown[0]!r}; use {key} and weight")
        weight = number(f"{name}: weight of {entry[key]}", entry.get("weight", 1.0))
        found.append(kind(entry[key], weight))
    return found


def _check(config: TrainConfig) -> None:
    at_least = {
        "num_generations": 1,
        "max_completion_length": 1,
        "top_k": 0,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0,
        "warmup_steps": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "entropy_weight": 0,
        "logging_steps": 1,
        "eval_steps": 0,
        "per_device_eval_batch_size": 1,
        "save_steps": 0,
        "seed": 0,
    }
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise UserError(f"{name}: got {getattr(config, name)}, expected at least {least}")
    for name in ("temperature", "teacher_temperature", "cost_clip", "vocab_size"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"{name}: got {value}, expected more than 0")
    if not config.teachers:
        raise UserError("teachers: got an empty list; give at least one checkpoint")
    for teacher in config.teachers:
        if teacher.weight <= 0:
            raise UserError(
                f"teachers: weight of {teacher.model}: got {teacher.weight}, expected more than 0"
            )
    if config.top_k_teacher is not None and not 1 <= config.top_k_teacher <= MAX_TOP_K:
        raise UserError(
            f"top_k_teacher: got {config.top_k_teacher}, expected a number from 1 to {MAX_TOP_K}"
        )
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p: got {config.top_p}, expected a number in (0, 1]")
    if config.teacher_floor is not None and config.teacher_floor > 0:
        raise UserError(
            f"teacher_floor: got {config.teacher_floor}, expected a log-probability, at most 0"
        )
    choices_of = {
        "baseline": BASELINES,
        "lr_scheduler_type": LR_SCHEDULERS,
        "top_k_support": SUPPORTS,
        "tail": TAILS,
    }
    for name, choices in choices_of.items():
        if getattr(config, name) not in choices:
            raise UserError(
                f"{name}: got {getattr(config, name)!r}, expected one of {', '.join(choices)}"
            )
    for name, high in (("reward_weight", None), ("gamma", 1.0), ("dense_weight", None)):
        schedule = getattr(config, name)
        # Every kind is monotone, so its two ends bound it.
        for value in (
            schedule.at(0, config.max_steps),
            schedule.at(config.max_steps - 1, config.max_steps),
        ):
            if value < 0 or (high is not None and value > high):
                bound = "at least 0" if high is None else f"in [0, {high:g}]"
                raise UserError(f"{name}: reaches {value:g}, expected {bound}")
    parse_divergence(config.divergence)
    if config.per_device_train_batch_size % config.num_generations:
        raise UserError(
            f"per_device_train_batch_size: got {config.per_device_train_batch_size} completions, "
            f"not a multiple of num_generations={config.num_generations}; the responses to one "
            "prompt stay in one micro-batch"
        )
    if config.warmup_steps and config.lr_scheduler_type == "constant":
        raise UserError(
            f"warmup_steps: got {config.warmup_steps}, but lr_scheduler_type=constant has no "
            "warm-up; use constant_with_warmup"
        )
    if config.num_generations == 1 and config.baseline != "none":
        raise UserError(
            f"num_generations: got 1, but baseline={config.baseline} compares responses to one "
            "prompt; use at least 2, or baseline=none"
        )


def parse_divergence(value: str | dict) -> Divergence:
    """The `Divergence` that the option stands for.

    Raises:
        UserError: an unknown name or parameter.
    """
    params: dict[str, Any] = dict(value) if isinstance(value, dict) else {"name": value}
    name = params.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"divergence: got {value!r}, expected a name, or {{name: jsd, beta: 0.3}}")
    try:
        return Divergence(name, **params)
    except ValueError as error:
        raise UserError(str(error)) from error
