"""Identity: the key of a stage's result is a small JSON document and its sha256.

Two results with equal keys are interchangeable. The document holds the stage, its settings, the digests of its
inputs, the digests of the code it imports and of the reward functions it calls, and what changes numerics; never a
path, a time or a host name.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.hardware import device_kind, dtype_name
from rrlhf.sourcecode import code_behind, tree_digest
from rrlhf.stages import Node

PACKAGE = Path(__file__).parent

# Modules whose every effect on a result is already in the key (as settings), or that only show or store things.
WITHOUT_EFFECT = {
    "rrlhf.artifacts",
    "rrlhf.checks",
    "rrlhf.config",
    "rrlhf.hardware",
    "rrlhf.located",
    "rrlhf.progress",
    "rrlhf.sourcecode",
    "rrlhf.sources",
    "rrlhf.types",
}

Document = dict[str, Any]


class Change(NamedTuple):
    """One difference of two key documents; None where a value is missing."""

    path: tuple[str, ...]  # ("params", "ppo", "kl_weight")
    old: Any
    new: Any


def key_document(node: Node, inputs: Mapping[str, str]) -> Document:
    """Return the key document of a node, given the content digest of each of its inputs."""
    settings = node.settings
    numerics = {"torch": version("torch"), "transformers": version("transformers")}
    if settings.get("trunk", settings.get("reward", {})).get("trunk") == "lora":
        numerics["peft"] = version("peft")
    model = settings.get("model")
    if model:
        model["device"] = device_kind(model["device"])
        model["dtype"] = dtype_name(model["dtype"], model["device"])
    document = {
        "stage": node.stage,
        "params": settings,
        "inputs": dict(sorted(inputs.items())),
        "code": code_digests(f"rrlhf.{node.stage}"),
        "numerics": numerics,
    }
    return _with_functions(document, node.functions) if node.functions else document


def _with_functions(document: Document, functions: Sequence[str]) -> Document:
    """Add the code of reward functions: the user's files, the modules of this package and the distributions in use."""
    found = [code_behind(path.partition(":")[0], Path.cwd()) for path in functions]
    ours = [name for code in found for name in code.ours if _source(name).exists()]
    return document | {
        "code": reduce(or_, map(code_digests, ours), document["code"]),
        "functions": reduce(or_, (code.sources for code in found)),
        "numerics": reduce(or_, (code.versions for code in found), document["numerics"]),
    }


def canonical(document: Document) -> str:
    """Return the one JSON text of a document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_digest(document: Document) -> str:
    """Return the sha256 of the canonical document, in hex."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


def differences(old: Document, new: Document) -> list[str]:
    """Say in words what changed from one key document to another, upstream causes first."""
    return [_in_words(*change) for change in changes(old, new)]


def changes(old: Document, new: Document) -> list[Change]:
    """Return what changed from one key document to another: its place, the old value and the new one."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    paths = [path for path in (before | after) if before.get(path) != after.get(path)]
    return [Change(path, before.get(path), after.get(path)) for path in paths]


@cache
def code_digests(module: str) -> dict[str, str]:
    """Return, per module of this package that `module` imports (itself included), a digest of its syntax tree.

    Comments, docstrings and formatting are not part of a syntax tree, so editing them changes nothing.
    """
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name in WITHOUT_EFFECT:
            continue
        tree = ast.parse(_source(name).read_text(encoding="utf-8"))
        found[name] = tree_digest(tree)
        waiting += _imports(tree)
    return dict(sorted(found.items()))


def _source(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of this package that a syntax tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in candidates if name.startswith("rrlhf.") and _source(name).exists())


def _flatten(document: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _in_words(path: tuple[str, ...], old: Any, new: Any) -> str:
    group, name = path[0], ".".join(path[1:])
    if group in {"code", "functions"}:
        return f"{name.replace('.', '/')}.py changed"
    if group == "inputs":
        return f"input {name} changed"
    return f"{name} {old} -> {new}"
