"""Reward functions of the user: rules and verifiers in Python, named by import path, "module:function".

A function is called as TRL's GRPOTrainer calls its reward functions, so that those people have work as they are: with
keywords, and one number per response in return.
"""

import asyncio
import copy
import inspect
import math
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rrlhf.located import ParamsError, did_you_mean
from rrlhf.sourcecode import code_behind
from rrlhf.types import Json, Message

# What a function may ask for besides columns of the data. `prompts`: lists of messages; `completions`: lists of one
# message, the response; `completion_ids`: its tokens, the end of sequence included; `finished`: whether it came to an
# end by itself.
OFFERED = ("prompts", "completions", "completion_ids", "finished")

Columns = Mapping[str, Sequence[Json]]  # what the data's rows have beside those of their format, a value per response
NO_COLUMNS: Columns = MappingProxyType({})


class RewardFunction(NamedTuple):
    """A function that was found and can be called with what is offered."""

    path: str  # "module:function"
    call: Callable[..., object]
    takes: tuple[str, ...] | None  # names of its arguments; None: whatever there is
    needs: tuple[str, ...]  # columns of the data that it cannot do without

    def values(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[str],
        tokens: Sequence[list[int]],
        finished: Sequence[bool],
        columns: Columns = NO_COLUMNS,
    ) -> list[float]:
        """Return one number per response; None, "not applicable", counts as 0, as in TRL's sum.

        columns: a value per response, as TRL hands on the columns of its data; a name that is offered anyway is not. A
        coroutine function is awaited. Raises ValueError, with the function's name, when it fails or returns
        anything else.
        """
        offered: dict[str, object] = {name: [None] * len(responses) for name in self.needs}  # these rows have none
        offered |= {name: copy.deepcopy([*values]) for name, values in columns.items() if self._takes(name)}
        offered |= {
            "prompts": [[Message(**turn) for turn in prompt] for prompt in prompts],  # its own, to do with as it likes
            "completions": [[Message(role="assistant", content=text)] for text in responses],
            "completion_ids": [[*ids] for ids in tokens],
            "finished": [*finished],
        }
        try:
            returned = self.call(**{name: values for name, values in offered.items() if self._takes(name)})
            if inspect.iscoroutine(returned):
                returned = asyncio.run(returned)
        except Exception as error:
            raise ValueError(f"reward function {self.path} raised {_in_words(error)}") from error
        return self._checked(returned, responses)

    def _takes(self, name: str) -> bool:
        return self.takes is None or name in self.takes

    def _checked(self, returned: object, responses: Sequence[str]) -> list[float]:
        listed = returned.tolist() if hasattr(returned, "tolist") else returned  # a tensor or an array
        if not isinstance(listed, list | tuple):
            kind = type(returned).__name__
            raise ValueError(f"reward function {self.path} returned {kind}: expected a list of one number per response")
        if len(listed) != len(responses):
            raise ValueError(
                f"reward function {self.path} returned {len(listed)} values for {len(responses)} responses"
            )
        values = [_number(value) for value in listed]
        for i, value in enumerate(values):
            if not math.isfinite(value):
                what = f"value {listed[i]!r} of response {i} ({responses[i][:60]!r})"
                raise ValueError(f"reward function {self.path}: {what} is no finite number")
        return values


def load_functions(paths: Iterable[str], columns: Collection[str] | None = None) -> list[RewardFunction]:
    """Import the functions, each once, in the order of their paths; the project's folder can be imported from.

    columns: of the data; None: not known yet. Raises ParamsError with every mistake: no such module or function, an
    import that fails, an argument that neither a response nor the data has.
    """
    found, mistakes = [], []
    for path in sorted(set(paths)):
        try:
            found.append(_load(path, columns))
        except ParamsError as error:
            mistakes.append(f"reward function {path}: {error}")
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return found


def metric_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the metric of each function: function_<name>, with its module where two have the same name."""
    unique = sorted(set(paths))
    names = Counter(path.partition(":")[2] for path in unique)
    return {
        path: f"function_{path.replace(':', '.') if names[path.partition(':')[2]] > 1 else path.partition(':')[2]}"
        for path in unique
    }


def _load(path: str, columns: Collection[str] | None) -> RewardFunction:
    name, _, wanted = path.partition(":")
    code_behind(name, Path.cwd())  # what is imported now is what keys will name
    try:
        module = import_module(name)
    except (Exception, SystemExit) as error:
        raise ParamsError(f"importing {name} raised {_in_words(error)}") from error
    if not hasattr(module, wanted):
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ParamsError(f"{name} has no function {wanted}{did_you_mean(wanted, known) if known else ''}")
    call = getattr(module, wanted)
    if not callable(call):
        raise ParamsError(f"{wanted} is {type(call).__name__}, not a function")
    takes, needs = _arguments(call)
    if columns is not None and (missing := [name for name in needs if name not in columns]):
        there = f"the columns {', '.join(sorted(columns))}" if columns else "no columns beside those of its format"
        raise ParamsError(f"it needs {', '.join(missing)}; there are {', '.join(OFFERED)}, and the data has {there}")
    return RewardFunction(path, call, takes, needs)


def _arguments(call: Callable[..., object]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return which names a function takes (None: all), and those without which it cannot be called but a column has."""
    parameters = inspect.signature(call).parameters.values()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    needs = tuple(each.name for each in named if each.default is each.empty and each.name not in OFFERED)
    return None if takes_all else tuple(each.name for each in named), needs


def _number(value: object) -> float:
    """Return a value as a number: None as 0, what is no number as nan."""
    if value is None:
        return 0.0
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _in_words(error: BaseException) -> str:
    """Name an error with the line it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
