"""Rewards: any Python callable `(prompts, completions, **columns) -> one number each`.

`prompts` are the examples' prompts as they stand in the file, `completions` are texts, and every
further column of the file arrives as a keyword list in the same order. A function that names its
columns gets those alone; one with `**columns` gets them all.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.config import RewardConfig, UserError
from train.data import Example

_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")


def exact_match(prompts: Sequence, completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 where the completion is the `answer` column, white space around both aside; else 0."""
    return [
        float(text.strip() == str(expected).strip())
        for text, expected in zip(completions, answer, strict=True)
    ]


def numeric_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 where the last number in the completion equals the one in the `answer` column; else 0."""
    return [
        float(_last_number(text) is not None and _last_number(text) == _last_number(str(expected)))
        for text, expected in zip(completions, answer, strict=True)
    ]


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class Scorer:
    """Several rewards, by name, with their weights."""

    def __init__(self, option: str, specs: Sequence[RewardConfig]) -> None:
        self._functions: dict[str, tuple[Callable, float]] = {}
        for spec in specs:
            name = spec.function.rpartition(":")[2]
            if name in self._functions:
                raise UserError(f"{option}: two functions named {name!r}; rename one")
            self._functions[name] = (load_function(option, spec.function), spec.weight)

    @property
    def weights(self) -> dict[str, float]:
        return {name: weight for name, (_, weight) in self._functions.items()}

    def score(
        self, examples: Sequence[Example], completions: Sequence[str]
    ) -> dict[str, list[float]]:
        """Each reward of each completion.

        Args:
            examples: the example behind each completion.
            completions: texts, without special tokens.

        Returns:
            name -> one finite number per completion, not weighted.

        Raises:
            UserError: a reward wants a column that is not there, or returns something else.
        """
        columns = {
            key: [example.columns.get(key) for example in examples] for key in examples[0].columns
        }
        prompts = [example.prompt for example in examples]
        scores = {}
        for name, (function, _) in self._functions.items():
            values = function(prompts, list(completions), **_columns_for(name, function, columns))
            scores[name] = _checked(name, values, len(completions))
        return scores

    def total(self, scores: dict[str, list[float]], count: int) -> list[float]:
        """The weighted sum of `score`'s result, for `count` completions; 0 without any reward."""
        weights = self.weights
        return [sum(weights[name] * scores[name][i] for name in weights) for i in range(count)]


def load_function(option: str, path: str) -> Callable[..., Any]:
    """The function at `package.module:name` or `path/to/file.py:name`.

    Raises:
        UserError: there is no such file, module or function; names `option`.
    """
    location, colon, name = path.rpartition(":")
    if not colon or not location or not name:
        raise UserError(
            f"{option}: got {path!r}, expected `module:function` or `path/to/file.py:function`"
        )
    if location.endswith(".py"):
        module = _module_from_file(option, Path(location))
    else:
        try:
            module = importlib.import_module(location)
        except ModuleNotFoundError as error:
            raise UserError(f"{option}: can't import {location!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{option}: {location!r} has no function {name!r}")
    return function


def _module_from_file(option: str, file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"{option}: there is no file {str(file)!r}")
    # A name of its own, so that two files called rewards.py don't meet in sys.modules.
    digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    name = f"user_rewards_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _columns_for(name: str, function: Callable, columns: dict[str, list]) -> dict[str, list]:
    parameters = list(inspect.signature(function).parameters.values())[2:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    wanted = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    for column, required in wanted.items():
        if required and column not in columns:
            have = ", ".join(columns) or "none"
            raise UserError(
                f"reward {name}: wants the column {column!r}, which the data lacks (it has: {have})"
            )
    return {key: value for key, value in columns.items() if key in wanted}


def _checked(name: str, values: Any, count: int) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {name}: returned {values!r}, expected a list of {count} numbers"
        ) from error
    if len(numbers) != count:
        raise UserError(f"reward {name}: returned {len(numbers)} numbers for {count} completions")
    for value in numbers:
        if not math.isfinite(value):
            raise UserError(f"reward {name}: returned {value}, expected finite numbers")
    return numbers
