"""YAML files whose keys remember their lines, so that a mistake found later can say where it is."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

LOADER: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
LOADER.yaml_implicit_resolvers = {  # a date is text: JSON has no other
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

Where = dict[tuple[str, ...], str]  # path of a key -> "params.yaml:12"


class MendableError(Exception):
    """What a person can mend, as the message says; a command ends with it and this exit code."""

    exit_code = 1


class UsageError(MendableError, ValueError):
    """What a person typed cannot be meant: a name, a file, an option."""

    exit_code = 2


class ParamsError(UsageError):
    """Every mistake in the settings, one line each: where, what, and what to do."""


def read(path: Path, where: Where, mistakes: list[str]) -> dict[str, Any]:
    """Parse one YAML mapping and note the line of every key in `where`."""
    try:
        node, content = parse(path.read_text(encoding="utf-8"), path.name)
    except FileNotFoundError:
        raise ParamsError(f"{path.name}: not found in {path.parent}; run rrlhf in the project's folder") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name}: not UTF-8 (byte {error.start})") from None
    if not isinstance(node, yaml.MappingNode):
        raise ParamsError(f"{path.name}: expected a mapping of sections")
    _note_lines(node, (), path.name, where, mistakes)
    return {**content}


def parse(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """Parse YAML. Raises ParamsError, which begins with the name and, where it is known, the line."""
    try:
        node = yaml.compose(text, Loader=LOADER)
        content = None if node is None else SafeConstructor().construct_document(node)
        json.dumps(content)  # which refuses sets, bytes, and what holds itself
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ParamsError(f"{name}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    # PyYAML says several of these of `!!int x`.
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ParamsError(f"{name}: not valid YAML: {error}") from None
    return node, content


def _note_lines(node: yaml.Node, path: tuple[str, ...], file: str, where: Where, mistakes: list[str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        here = (*path, str(key.value))
        line = f"{file}:{key.start_mark.line + 1}"
        if key.value in seen:
            mistakes.append(f"{line}: {'.'.join(here)} is given twice")
        seen.add(key.value)
        where[here] = line
        _note_lines(value, here, file, where, mistakes)


def place(path: tuple[str, ...], where: Where) -> str:
    """Return the line of a path, or of the nearest section above it."""
    while path and path not in where:
        path = path[:-1]
    return where.get(path, "params.yaml")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the one it resembles, or all that are known."""
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
