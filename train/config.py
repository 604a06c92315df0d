"""All options of a run: one dataclass, read from a YAML file and `key=value` overrides."""

import difflib
import operator
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
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
# What eval.jsonl (after `eval_`) and samples.jsonl hold besides the scores, which have the names of
# their functions.
FIGURES = (
    *("step", "split", "prompt", "completion", "reward", "unscored"),
    *("kl", "entropy", "completion_length", "truncated"),
)
# A key in a run's config.yaml that informs the reader and is not an option.
ENVIRONMENT = "environment"
_ONE = Schedule(1.0)
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line feeds


class UserError(ValueError):
    """Something that the user can correct: an option, a file, a reward. The message says how."""


def printable(text: str) -> str:
    """A text from outside with escapes for control characters, which would act on the terminal."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class NonFiniteError(FloatingPointError):
    """A run's numbers are infinite or NaN. The message says what is intact, and what helps."""


# The kinds of bounds that an option can have: in words, and as a check of a value.
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "at_most": ("at most", operator.le),
    "choices": ("one of", lambda value, choices: value in choices),
}


def option(default: Any, *, expected: str | None = None, **bounds: Any) -> Any:
    """A field with bounds, which `make_config` checks.

    Args:
        expected: the bounds in words, for error messages; a single one is put into words here.
        bounds: any of the keys of `_BOUNDS`. For a schedule, they must hold at every step.
    """
    if expected is None:
        ((kind, bound),) = bounds.items()
        expected = f"{_BOUNDS[kind][0]} {', '.join(bound) if kind == 'choices' else bound}"
    return field(default=default, metadata={"bounds": bounds, "expected": expected})


@dataclass(frozen=True)
class RewardConfig:
    """One reward: where its function is, and its weight in the sum.

    Attributes:
        function: `package.module:function` or `path/to/file.py:function`; `train/rewards.py` says
            how it is called.
        weight: the factor of its value.
    """

    function: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The function's name, under which logs have its values; not one of `FIGURES`."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class TeacherConfig:
    """One teacher: its checkpoint, and the weight of the divergence from it.

    Attributes:
        model: a local `transformers` directory or a hub name.
        weight: above 0.
    """

    model: str
    weight: float = option(1.0, above=0)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a run.

    `{output_dir}` in `student`, `teachers`, `train_file` and `eval_file` stands for that folder,
    and `~` at the start of a path for the home folder.
    """

    output_dir: str
    student: str  # a local `transformers` directory or a hub name; where a new run begins
    teachers: list[TeacherConfig]  # `teacher: path` is short for one
    train_file: str  # JSONL: `prompt` (text, or chat messages) and the columns of the rewards
    eval_file: str | None = None  # held-out prompts; None skips every evaluation
    setup: str | None = None  # `module:function`, called with {output_dir}/assets to fill it, once

    # The objective: KL(student || teacher) - reward_weight * reward.
    rewards: list[RewardConfig] = field(default_factory=list)
    eval_metrics: list[RewardConfig] = field(default_factory=list)  # on eval_file only
    reward_weight: Schedule = option(_ONE, at_least=0)  # lambda
    gamma: Schedule = option(  # discount of future KL costs in the sparse term
        _ONE, at_least=0, at_most=1, expected="in [0, 1]"
    )
    dense_weight: Schedule = option(_ONE, at_least=0)  # eta: the dense term's share of the KL
    sampled_kl: bool = True  # charge 1 - dense_weight of each token's KL on the sample
    entropy_weight: float = option(0.0, at_least=0)  # of an entropy bonus
    divergence: str | dict = "reverse_kl"  # a name, or {name: jsd, beta: 0.3}
    baseline: str = option("leave_one_out", choices=BASELINES)
    cost_clip: float | None = option(None, above=0)  # bounds |log p - log q| in the returns, nats
    teacher_floor: float | None = option(  # nats; lower teacher log-probabilities are raised to it
        None, at_most=0, expected="a log-probability, at most 0"
    )
    vocab_size: int | None = option(None, above=0)  # the shared prefix, if models pad differently
    top_k_teacher: int | None = option(  # K: the loss sees the teachers on K tokens only
        None, at_least=1, at_most=MAX_TOP_K, expected=f"a number from 1 to {MAX_TOP_K}"
    )
    top_k_support: str = option("student", choices=SUPPORTS)  # whose K best; of teachers, the first
    tail: str = option("bucket", choices=TAILS)  # what stands for the tokens beyond the K best
    fused_linear: bool = True  # losses from hidden states, with logits in chunks; not for top-K

    # Rollouts.
    num_generations: int = option(8, at_least=1)  # responses per prompt
    max_completion_length: int = option(128, at_least=1)  # tokens
    temperature: float = option(  # of the policy: sampling and log-probabilities
        1.0, at_least=1e-3, at_most=1e3, expected="from 0.001 to 1000"
    )
    teacher_temperature: float | None = option(  # None: the same as `temperature`
        None, at_least=1e-3, at_most=1e3, expected="from 0.001 to 1000"
    )
    top_p: float = option(1.0, above=0, at_most=1, expected="a number in (0, 1]")  # 1: no limit
    top_k: int = option(0, at_least=0)  # 0: no limit
    mask_truncated_completions: bool = False  # don't train on responses without an end

    # Optimisation.
    max_steps: int = option(100, at_least=1)
    per_device_train_batch_size: int = option(32, at_least=1)  # completions in a micro-batch
    gradient_accumulation_steps: int = option(1, at_least=1)  # micro-batches in a step
    learning_rate: float = option(1e-5, at_least=0, at_most=1e3, expected="from 0 to 1000")
    lr_scheduler_type: str = option("constant", choices=LR_SCHEDULERS)
    warmup_steps: int = option(0, at_least=0)
    weight_decay: float = option(0.0, at_least=0)
    max_grad_norm: float = option(1.0, at_least=0)  # 0: no clipping
    bf16: bool = False
    seed: int = option(  # NumPy's generator takes 32 bits
        0, at_least=0, at_most=2**32 - 1, expected="a number from 0 to 4294967295"
    )

    # Logs, evaluations and checkpoints.
    logging_steps: int = option(1, at_least=1)  # progress and trackers; metrics.jsonl has each step
    eval_steps: int = option(0, at_least=0)  # 0: only before and after the run
    per_device_eval_batch_size: int = option(64, at_least=1)
    save_steps: int = option(0, at_least=0)  # 0: only at the end
    # `latest`, or a checkpoint's folder: the last one of output_dir, whose run goes on, or one from
    # elsewhere, with which a new run starts. All options are the new ones, `student` excepted.
    resume_from_checkpoint: str | None = None
    report_to: str = "tensorboard"  # any tracker that accelerate knows, or `none`

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
    """The config of a YAML file with `key=value` overrides, whose values are YAML, too.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or out of bounds.
    """
    options: dict[str, Any] = {}
    if path is not None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"--config: can't read {str(path)!r}: {error.strerror}") from error
        loaded = _from_yaml(f"--config: can't read {str(path)!r}", content)
        if not isinstance(loaded, dict):
            raise UserError(f"--config: {str(path)!r} holds no `key: value` lines")
        options.update(loaded)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, such as learning_rate=1e-4")
        options[key] = _from_yaml(f"{key}: can't read {text!r}", text)
    return make_config(options)


class _Loader(yaml.SafeLoader):
    """YAML whose keys are texts, each given once: of two, one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                problem = "found a key that is not text; put it in quotes"
            elif key.value in seen:
                problem = f"found the key {key.value!r} twice; leave one out"
            else:
                seen.add(key.value)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _from_yaml(failure: str, content: bytes | str) -> Any:
    try:
        return yaml.load(content, _Loader)
    except Exception as error:  # of whatever type: that depends on the tags, and on what they tag
        raise UserError(f"{failure}: {error}") from error


def make_config(options: dict[str, Any]) -> TrainConfig:
    """The config with these options, checked.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of bounds.
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
            raise UserError(f"{key}: unknown option{_suggestion(str(key), list(specs))}")
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


def _suggestion(key: str, options: list[str]) -> str:
    close = difflib.get_close_matches(key, options, n=1)
    return f"; did you mean {close[0]}?" if close else "; the options are in train/config.py"


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of the field, or a ValueError with the field's name."""
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
        return value if isinstance(value, int) else int(result)
    if dict in choices and isinstance(value, dict):
        return value
    if str in choices:
        return _text(name, value)
    if typing.get_args(hint) == (TeacherConfig,):
        return _weighted(name, value, TeacherConfig, "model", "a checkpoint")
    return _weighted(name, value, RewardConfig, "function", "`module:function`, `file.py:function`")


def _text(name: str, value: Any) -> str:
    """A text, which may be a path or part of one, with the home folder in place of `~`."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}: got {value!r} ({type(value).__name__}), expected text")
    if "\0" in value or value.encode("utf-8", "replace").decode() != value:
        raise UserError(f"{name}: got {value!r}, which has characters that no file name can have")
    text = os.path.expanduser(value)
    if text.startswith("~"):
        raise UserError(
            f"{name}: got {value!r}, but that user has no home folder here; for a folder of that "
            f"name, write ./{value}"
        )
    return text


def _weighted(name: str, value: Any, kind: type, key: str, form: str) -> list:
    """Entries of one kind, given as mappings with a weight or as texts, whose weight is 1."""
    entries = value if isinstance(value, list | tuple) else [value]
    parsed = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {key: entry}
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise UserError(
                f"{name}: got {entry!r}, expected {form}, or {{{key}: ..., weight: ...}}"
            )
        if unknown := [other for other in entry if other not in (key, "weight")]:
            raise UserError(f"{name}: unknown key {unknown[0]!r}; use {key} and weight")
        weight = number(f"{name}: weight of {entry[key]}", entry.get("weight", 1.0))
        parsed.append(kind(_text(name, entry[key]), weight))
    return parsed


def _check(config: TrainConfig) -> None:
    for spec in fields(config):
        _check_bounds(spec.name, getattr(config, spec.name), spec, config.max_steps)
    if not config.teachers:
        raise UserError("teachers: got an empty list; give at least one checkpoint")
    for teacher in config.teachers:
        for spec in fields(teacher):
            name = f"teachers: {spec.name} of {teacher.model}"
            _check_bounds(name, getattr(teacher, spec.name), spec, config.max_steps)
    parse_divergence(config.divergence)
    _check_names(config)
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


def _check_names(config: TrainConfig) -> None:
    """Checks that each name in the logs stands for one figure."""
    taken: dict[str, tuple[str, str]] = {}
    entries = [("rewards", spec) for spec in config.rewards]
    entries += [("eval_metrics", spec) for spec in config.eval_metrics]
    for option, spec in entries:
        if spec.name in FIGURES:
            raise UserError(
                f"{option}: {spec.function!r} would be logged as {spec.name!r}, which is a figure "
                f"of the run; rename the function (names in use: {', '.join(FIGURES)})"
            )
        other, function = taken.get(spec.name, (None, spec.function))
        # A reward may be a metric, too: it is computed once.
        if other == option or function != spec.function:
            raise UserError(
                f"{option}: two functions named {spec.name!r}, {function!r} of {other} and "
                f"{spec.function!r}; rename one, or leave one out if they are the same"
            )
        taken[spec.name] = (option, spec.function)


def _check_bounds(name: str, value: Any, spec: Field, max_steps: int) -> None:
    """Checks an option against the bounds of its field; None and unbounded fields pass."""
    if value is None or not spec.metadata:
        return
    reached = {f"got {value!r}": value}
    if isinstance(value, Schedule):
        # Every kind of schedule is monotone, so its two ends bound it.
        ends = (value.at(step, max_steps) for step in (0, max(0, max_steps - 1)))
        reached = {f"reaches {end:g}": end for end in ends}
    for text, item in reached.items():
        for kind, bound in spec.metadata["bounds"].items():
            if not _BOUNDS[kind][1](item, bound):
                raise UserError(f"{name}: {text}, expected {spec.metadata['expected']}")


def parse_divergence(value: str | dict) -> Divergence:
    """The `Divergence` that the option's value describes.

    Raises:
        UserError: an unknown name or parameter.
    """
    params: dict[str, Any] = dict(value) if isinstance(value, dict) else {"name": value}
    name = params.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"divergence: got {value!r}, expected a name, or {{name: jsd, beta: 0.3}}")
    try:
        values = {str(key): number(f"divergence: {key}", item) for key, item in params.items()}
        return Divergence(name, **values)
    except ValueError as error:
        raise UserError(str(error)) from error
