"""Rewards: any Python callable that returns one number for each completion.

It is called by name, and gets what its parameters name (all of it, if it takes `**kwargs`):

- `prompts`: the prompts as in the file, texts or chat messages,
- `completions`: texts, also where the prompts are chat messages,
- `completion_ids`: each completion's token ids, up to and including its EOS,
- every other column of the file by its name,

each a list with one entry per completion. Reward functions of TRL have these parameters, too, and
may be `async`.

It returns a list, tensor or array of numbers in the order of the completions. None or NaN says that
a completion could not be scored: it counts in no mean, and this reward neither favours nor
disfavours it.
"""

import asyncio
import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

from train.config import RewardConfig, UserError
from train.data import GIVEN_TO_REWARDS, Example

_HINT = " (each argument is a list; completions are texts, not messages)"
# Files whose lines say nothing to the user about an error of their own.
_NOT_THE_USERS = (str(Path(__file__).parent), "<frozen importlib")
_NUMBER = re.compile(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?")


def exact_match(prompts: Sequence, completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the completion equals the `answer` column up to surrounding white space, else 0.

    NaN where the column is None.
    """
    return [
        math.nan if expected is None else float(text.strip() == str(expected).strip())
        for text, expected in zip(completions, answer, strict=True)
    ]


def numeric_answer(prompts: Sequence, completions: Sequence[str], answer: Sequence) -> list[float]:
    """1 if the last number in the completion equals the last one in the `answer` column, else 0.

    NaN where the column is None.
    """
    return [
        math.nan if expected is None else float(_same_number(text, str(expected)))
        for text, expected in zip(completions, answer, strict=True)
    ]


def _same_number(text: str, expected: str) -> bool:
    number = _last_number(text)
    return number is not None and number == _last_number(expected)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


class Scorer:
    """Several rewards with their names and weights."""

    def __init__(self, option: str, specs: Sequence[RewardConfig]) -> None:
        self._functions: dict[str, Callable] = {}
        self.weights: dict[str, float] = {}
        for spec in specs:
            self._functions[spec.name] = _load_reward(option, spec.function)
            self.weights[spec.name] = spec.weight

    def check(self, option: str, examples: Sequence[Example]) -> None:
        """Checks that the rewards can be called with the columns of a file.

        Args:
            option: the option that names the file, for error messages.

        Raises:
            UserError: a reward needs a parameter that is neither given nor a column.
        """
        names = dict.fromkeys((*GIVEN_TO_REWARDS, *examples[0].columns))
        for name, function in self._functions.items():
            _arguments(name, function, names, option)

    def score(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        known: Collection[str] = (),
    ) -> dict[str, list[float]]:
        """Each reward of each completion.

        Args:
            examples: the example behind each completion.
            completions: texts, without special tokens.
            completion_ids: the tokens of each, including its EOS.
            known: names of rewards that are left out.

        Returns:
            name -> one number per completion, not weighted; NaN where it could not be scored.

        Raises:
            UserError: a reward can't be called, raises an exception, or returns something else.
        """
        scores = {}
        for name, function in self._functions.items():
            if name in known:
                continue
            # Made anew for each reward, so that none can change what another one gets.
            given = {
                "prompts": [copy.deepcopy(example.prompt) for example in examples],
                "completions": list(completions),
                "completion_ids": [list(ids) for ids in completion_ids],
            }
            for key in examples[0].columns:
                given[key] = [copy.deepcopy(example.columns.get(key)) for example in examples]
            positional, by_name = _arguments(name, function, given, "the data")
            with users_code(f"reward {name}", "raised", _HINT):
                values = _call(function, positional, by_name)
            with users_code(f"reward {name}", f"returned {type(values).__name__}, which raised"):
                scores[name] = _checked(name, values, examples)
        return scores

    def total(self, scores: dict[str, list[float]], count: int) -> list[float]:
        """The weighted sum of the scores of each of `count` completions.

        A score of NaN is left out. The sum is NaN if all are, and 0 if there are no rewards.
        """
        totals = []
        for i in range(count):
            scored = [name for name in scores if not math.isnan(scores[name][i])]
            total = sum(self.weights[name] * scores[name][i] for name in scored)
            totals.append(total if scored or not scores else math.nan)
        return totals


def mean_total(weights: Mapping[str, float], means: Mapping[str, float]) -> float:
    """The mean of the weighted sum, sum_j w_j m_j, with m_j over the responses that have reward j.

    So a response that could not be scored counts in no mean; in the mean of the sums of what is
    there, it would count as 0. NaN if a reward of nonzero weight has no mean.
    """
    return sum((weight * means[name] for name, weight in weights.items() if weight), 0.0)


def load_function(option: str, path: str) -> Callable[..., Any]:
    """The function at `package.module:name` or `path/to/file.py:name`.

    Raises:
        UserError: there is no such file, module or function. The message names `option`.
    """
    location, _, name = path.rpartition(":")
    if not location or not name or location.startswith("."):
        raise UserError(
            f"{option}: got {path!r}, expected `module:function` or `path/to/file.py:function`"
        )
    with users_code(f"{option}: {location!r}"):
        if location.endswith(".py"):
            module = _module_from_file(option, Path(location))
        else:
            module = _module(option, location)
        function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{option}: {location!r} has no function {name!r}")
    return function


@contextmanager
def users_code(what: str, verb: str = "raised", hint: str = "") -> Iterator[None]:
    """Runs code of the user's such that it can't end the run without a word, or change its course.

    The code has random numbers of torch's of its own, which a number of the run's seeds; so it may
    seed them, too. The working directory and torch's defaults are restored.

    Args:
        what, verb: the beginning of the error message, which goes on with the exception.
        hint: what else to say.

    Raises:
        UserError: it raised anything but a KeyboardInterrupt, `SystemExit` included. The message
            has the lines where that happened.
    """
    folder = os.open(".", os.O_RDONLY)
    grad, dtype, device = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    seed = int(torch.randint(2**62, (), device="cpu"))
    try:
        with torch.random.fork_rng(devices):
            # Those that are restored, of which `torch.manual_seed` would change more.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            yield
        if sys.stdout.closed or sys.stderr.closed:
            raise UserError(f"{what}: closed the output of the run")
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = f"{what}: {verb} {traceback.format_exception_only(error)[-1].rstrip()}{hint}"
        own = error.__traceback__
        while own and own.tb_frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            own = own.tb_next
        if own or isinstance(error, SyntaxError):
            text += "\n" + "".join(traceback.format_exception(type(error), error, own)).rstrip()
        raise UserError(text) from error
    finally:
        os.fchdir(folder)
        os.close(folder)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)


def _module(option: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # of another module, which this one imports
        raise UserError(f"{option}: can't import {name!r}: {error}") from error


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


def _load_reward(option: str, path: str) -> Callable[..., Any]:
    function = load_function(option, path)
    if inspect.isclass(function):
        raise UserError(f"{option}: {path!r} is a class; name a function, or an instance of it")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{option}: {path!r} does not say which parameters it has; call it in a function of "
            "your own, such as `def is_right(completions, answer)`"
        ) from error
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError(
            f"{option}: {path!r} takes *args, but rewards are called by name; list its parameters, "
            "or add **kwargs"
        )
    return function


def _arguments(
    name: str, function: Callable, given: dict[str, Any], source: str
) -> tuple[list, dict[str, Any]]:
    """The arguments of a reward by position, for parameters that have no other way, and by name."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    for key in bound:
        if key in given:
            raise UserError(
                f"reward {name}: {key!r} is set by functools.partial, but the loop and {source} "
                f"have lists of {', '.join(given)}; rename one of the two"
            )
    positional: list[Any] = []
    by_name: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            by_name = given | by_name
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name not in given and parameter.default is parameter.empty:
            raise UserError(
                f"reward {name}: nothing to give to its parameter {parameter.name!r}; the loop and "
                f"{source} have lists of {', '.join(given)}. Rename the parameter, give it a "
                "default, or add a column"
            )
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(given.get(parameter.name, parameter.default))
        elif parameter.name in given:
            by_name[parameter.name] = given[parameter.name]
    return positional, by_name


def _call(function: Callable, positional: list, by_name: dict[str, Any]) -> Any:
    values = function(*positional, **by_name)
    if inspect.iscoroutine(values):
        values = asyncio.run(values)
    # What a generator raises belongs here, too.
    return list(values) if isinstance(values, Iterator) else values


def _checked(name: str, values: Any, examples: Sequence[Example]) -> list[float]:
    """What a reward returned as finite numbers, or NaN for what could not be scored."""
    count = len(examples)
    listed = _plain(values)
    # These can be iterated over, but not into numbers in the order of the completions.
    other = isinstance(listed, (str, bytes, bytearray, Mapping, Set))
    if other or not isinstance(listed, Iterable):
        raise UserError(
            f"reward {name}: returned {values!r:.200} ({type(values).__name__}), expected a list "
            f"of {count} numbers"
        )
    entries = list(listed)
    if len(entries) != count:
        raise UserError(f"reward {name}: returned {len(entries)} numbers for {count} completions")
    scores = []
    for index, entry in enumerate(entries):
        score = _number(entry)
        if score is None:
            raise UserError(
                f"reward {name}: returned {entry!r:.200} for completion {index}, of the prompt "
                f"{examples[index].prompt!r:.200}; expected a number within the range of fp32, or "
                "None if it can't be scored"
            )
        scores.append(score)
    return scores


def _number(entry: Any) -> float | None:
    """An entry as a finite fp32 number, NaN for None, or None for anything else."""
    entry = _plain(entry)
    if entry is None:
        return math.nan
    if not isinstance(entry, numbers.Number):
        return None
    try:
        score = float(entry)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):  # complex numbers, huge integers
        return None
    return None if abs(score) > torch.finfo(torch.float32).max else score


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists of lists, or as numbers if they have no dimension."""
    return value.tolist() if hasattr(value, "tolist") else value
