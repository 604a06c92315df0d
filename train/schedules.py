"""Schedules of weights and of the learning rate over the optimizer steps."""

import math
from dataclasses import dataclass
from typing import Any

_LARGEST = (2 - 2**-23) * 2.0**127  # of fp32

# The options of each kind. None marks a required option; the others may be left out.
_OPTIONS: dict[str, dict[str, float | None]] = {
    "linear": {"start": None, "alpha": None, "cap": None},
    "geometric": {"start": None, "end": None, "steps": math.nan},
    "cosine": {"start": None, "end": None, "steps": math.nan},
}


@dataclass(frozen=True)
class Schedule:
    """A number that depends on the step t = 0, 1, ...

    ============  ====================================================================
    kind          value at step t
    ============  ====================================================================
    ``constant``  start
    ``linear``    start (1 + alpha t), until it reaches `cap`
    ``geometric`` start (end / start)^(t / steps), then end
    ``cosine``    end + (start - end) (1 + cos(pi t / steps)) / 2, then end
    ============  ====================================================================

    Without `steps`, the value reaches `end` at the last update of the run.
    """

    start: float
    kind: str = "constant"
    end: float | None = None
    alpha: float | None = None
    cap: float | None = None
    steps: int | None = None

    def at(self, step: int, max_steps: int) -> float:
        """The value at update number `step`, counted from 0, in a run of `max_steps` updates."""
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            assert self.alpha is not None
            assert self.cap is not None
            value = self.start * (1.0 + self.alpha * step)
            return min(value, self.cap) if self.start * self.alpha >= 0 else max(value, self.cap)
        assert self.end is not None
        progress = min(1.0, step / max(1, self.steps or max_steps - 1))
        if progress == 1.0:
            return self.end
        if self.kind == "geometric":
            return self.start * (self.end / self.start) ** progress
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0

    def as_option(self) -> Any:
        """The number or mapping from which `parse_schedule` makes an equal schedule."""
        if self.kind == "constant":
            return self.start
        names = ("kind", "start", "end", "alpha", "cap", "steps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def learning_rate_factor(kind: str, step: int, warmup_steps: int, max_steps: int) -> float:
    """The learning rate's factor at update number `step`, counted from 0.

    That of `transformers.get_scheduler`, as a function: a resumed run has no scheduler to restore.

    Args:
        kind: one of `LR_SCHEDULERS`.
    """
    if step < warmup_steps:
        return step / warmup_steps
    decay_steps = max(1, max_steps - warmup_steps)
    if kind == "linear":
        return (max_steps - step) / decay_steps
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * ((step - warmup_steps) / decay_steps)))
    return 1.0


def parse_schedule(name: str, value: Any) -> Schedule:
    """The schedule that an option's value describes: a number, or a mapping with `kind`.

    Raises:
        ValueError: an unknown kind or key, a missing key, or a value of the wrong type.
    """
    if not isinstance(value, dict):
        return Schedule(number(name, value))
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _OPTIONS:
        raise ValueError(
            f"{name}: unknown schedule kind {kind!r}; use a number for a constant, or one of "
            + ", ".join(_OPTIONS)
        )
    options = _OPTIONS[kind]
    required = [key for key, default in options.items() if default is None]
    given = {key: number(f"{name}.{key}", item) for key, item in value.items() if key != "kind"}
    if unknown := [key for key in given if key not in options]:
        raise ValueError(f"{name}: {kind} got {unknown[0]!r}; it takes {', '.join(options)}")
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{name}: {kind} needs {', '.join(required)}; {missing[0]} is missing")
    if kind == "geometric" and not given["start"] * given["end"] > 0:
        raise ValueError(f"{name}: geometric needs start and end of one sign, neither of them 0")
    steps = given.pop("steps", None)
    if steps is not None and not (steps >= 1 and steps == int(steps)):
        raise ValueError(f"{name}.steps: got {steps:g}, expected a whole number of at least 1")
    return Schedule(kind=kind, steps=None if steps is None else int(steps), **given)


def number(name: str, value: Any) -> float:
    """`value` as a finite float. Strings are converted, because YAML reads 1e-3 as a string.

    Raises:
        ValueError: it is not a number, or not one that tensors in fp32 can be multiplied by.
    """
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            result = float(value)
        except (ValueError, OverflowError):
            result = math.nan
        if abs(result) <= _LARGEST:
            return result
    raise ValueError(
        f"{name}: got {value!r:.100}, expected a finite number within the range of fp32"
    )
