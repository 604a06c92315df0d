"""Rewards: any Python callable `(prompts, completions, **columns) -> one number each`.

`prompts` are the examples' prompts as in the file, `completions` are texts, and each other column
of the file is passed as a keyword argument, a list in the same order. A function gets only the
columns that it names as parameters, or all of them if it has `**columns`.
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
    """1 if the completion equals the `answer` column up to surrounding white space, else 0."""
    return [
        float(text.strip() == str(expected).strip())
        for text, expected in zip(completions, answer, strict=True)
    ]


def numeric_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the last number in the completion equals the last one in the `answer` column, else 0."""
    return [
        float(_last_number(text) is not None and _last_number(text) == _last_number(str(expected)))
        for text, expected in zip(completions, answer, strict=True)
    ]


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


class Scorer:
    """Several rewards with their names and weights."""

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
            UserError: a reward needs a column that the data lacks, or does not return that.
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
        """The weighted sum of the scores of `count` completions; 0 if there are no rewards."""
        weights = self.weights
        return [sum(weights[name] * scores[name][i] for name in weights) for i in range(count)]


def load_function(option: str, path: str) -> Callable[..., Any]:
    """The function at `package.module:name` or `path/to/file.py:name`.

    Raises:
        UserError: there is no such file, module or function. The message names `option`.
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
    # The digest keeps two files called rewards.py from sharing an entry of sys.modules.
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
    required = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    for column in required:
        if required[column] and column not in columns:
            available = ", ".join(columns) or "none"
            raise UserError(
                f"reward {name}: wants the column {column!r}, which the data lacks (it has: "
                f"{available})"
            )
    return {key: value for key, value in columns.items() if key in required}


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
