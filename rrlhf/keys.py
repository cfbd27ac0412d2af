"""Identity: the key of a stage's result is a small JSON document and its sha256.

Two results with equal keys are interchangeable. The document holds the stage, its settings, the digests of its
inputs, the digests of the code it imports and of the reward functions it calls, and what changes numerics; never a
path, a time or a host name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any

from rrlhf.hardware import device_kind, dtype_name
from rrlhf.modules import Modules, changed_definitions
from rrlhf.sourcecode import code_behind
from rrlhf.stages import Node

PACKAGE = Path(__file__).parent

GROUPS = ("params", "inputs", "code", "functions", "numerics")  # in which order differences are told
LONGEST = 60  # characters of a setting in such a text

Document = dict[str, Any]


def key_document(node: Node, inputs: Mapping[str, str], modules: Modules | None = None) -> Document:
    """Return the key document of a node, given the content digest of each of its inputs.

    modules: the package in which the stages are, this one if left out.
    """
    modules = modules or our_modules()
    settings = node.settings
    numerics = {"torch": _installed("torch"), "transformers": _installed("transformers")}
    if settings.get("trunk", settings.get("reward", {})).get("trunk") == "lora":
        numerics["peft"] = _installed("peft")
    model = settings.get("model")
    if model:
        model["device"] = device_kind(model["device"])
        model["dtype"] = dtype_name(model["dtype"], model["device"])
    document = {
        "stage": node.stage,
        "params": settings,
        "inputs": dict(sorted(inputs.items())),
        "code": modules.closure(f"{modules.package.name}.{node.stage}"),
        "numerics": numerics,
    }
    return _with_functions(document, node.functions, modules) if node.functions else document


def _with_functions(document: Document, functions: Sequence[str], modules: Modules) -> Document:
    """Add the code of reward functions: the user's files, the modules of this package and the distributions in use."""
    found = [code_behind(path.partition(":")[0], Path.cwd()) for path in functions]
    ours = [name for code in found for name in code.ours if modules.exists(name)]
    return document | {
        "code": reduce(or_, map(modules.closure, ours), document["code"]),
        "functions": reduce(or_, (code.sources for code in found)),
        "numerics": reduce(or_, (code.versions for code in found), document["numerics"]),
    }


@cache
def _installed(distribution: str) -> str:
    return version(distribution)  # takes milliseconds, a hundred stages ask the same


def canonical(document: Document) -> str:
    """Return the one JSON text of a document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_digest(document: Document) -> str:
    """Return the sha256 of the canonical document, in hex."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def differences(
    old: Document, new: Document, *, then: Mapping[str, str] | None = None, now: Mapping[str, str] | None = None
) -> list[str]:
    """Say in words what changed from one key document to another: settings, inputs, code, versions.

    then, now: the definitions in the modules of both, where known, as `Modules.definitions` returns them.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))
    changed = [path for path in (after | before) if _text(before, path) != _text(after, path)]
    changed.sort(key=lambda path: GROUPS.index(path[0]) if path[0] in GROUPS else len(GROUPS))
    return [_in_words(path, before, after, then or {}, now or {}) for path in changed]


@cache
def our_modules(memory: Path | None = None) -> Modules:
    """Return the modules of this package; `memory`: a file that remembers them from one process to the next."""
    return Modules(PACKAGE, memory)


def code_digests(module: str) -> dict[str, str]:
    """Return, per module of this package that `module` imports (itself included), a digest of its syntax tree."""
    return our_modules().closure(module)


def _flatten(document: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _text(values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> str | None:
    """Return a value as a key sees it: 1, 1.0 and true are three, and null is not the same as nothing."""
    return json.dumps(values[path]) if path in values else None


def _in_words(
    path: tuple[str, ...],
    before: Mapping[tuple[str, ...], Any],
    after: Mapping[tuple[str, ...], Any],
    then: Mapping[str, str],
    now: Mapping[str, str],
) -> str:
    group, name = path[0], ".".join(path[1:])
    if group in {"code", "functions"}:
        file = f"{name.replace('.', '/')}.py"
        if path not in before or path not in after:
            return f"{file} {'now' if path in after else 'no longer'} imported"
        known = group == "code" and name in then and name in now
        return f"{file}: {changed_definitions(then[name], now[name])}" if known else f"{file} changed"
    if group == "inputs":
        return f"input {name} {'changed' if path in before and path in after else 'added' if path in after else 'gone'}"
    old, new = (_shown(values[path]) if path in values else "unset" for values in (before, after))
    return f"{name} {old} -> {new}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
