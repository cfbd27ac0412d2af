"""Ancestry: from a registered model up to the data set, read from the tags of MLflow's versions alone.

MLflow shows the direct inputs of a run; the way over several steps is put together here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence

from rrlhf.stages import DATA
from rrlhf.tracking import Version
from rrlhf.types import Json

SHOWN = 8  # hex digits of a digest that a person reads


def resolve(reference: str, versions: Sequence[Version]) -> Version:
    """Find "rrlhf-policy@candidate", "rrlhf-policy/3", or the start of a digest (6 hex digits or more).

    "@latest" is the newest version of a name. `versions` come newest first.

    Raises ValueError with the closest names when there is none, or more than one.
    """
    wanted = reference.removeprefix("models:/")
    named = {f"{version.name}@latest": version for version in reversed(versions)}
    named |= {name: version for version in reversed(versions) for name in _references(version)}
    if wanted in named:
        return named[wanted]
    if re.fullmatch("[0-9a-f]{6,64}", wanted):
        matching = {v.tags["rrlhf.digest"]: v for v in reversed(versions) if v.tags["rrlhf.digest"].startswith(wanted)}
        if len(matching) == 1:
            return next(iter(matching.values()))
        if matching:
            digests = ", ".join(digest[: len(wanted) + 6] for digest in matching)
            raise ValueError(f"{reference!r} begins several digests: {digests}")
    close = difflib.get_close_matches(wanted, named, n=3) or sorted(named)[:10]
    raise ValueError(f"no model {reference!r}; {'close: ' + ', '.join(close) if close else 'none is registered yet'}")


def tree(version: Version, versions: Sequence[Version]) -> str:
    """Draw a version with everything it was made from; what was drawn already is not drawn again."""
    return "\n".join(_drawn(version, versions, set()))


def as_json(version: Version, versions: Sequence[Version]) -> Json:
    """Return a version with everything it was made from, nested in `inputs`."""
    tags = version.tags
    inputs: dict[str, Json] = {}
    for name, digest in _inputs(version).items():
        parent = _made(digest, versions)
        if parent:
            inputs[name] = as_json(parent, versions)
        elif name == DATA:
            inputs[name] = {"dataset": tags.get("rrlhf.dataset_name"), "digest": digest}
        else:
            inputs[name] = {"registered": False, "digest": digest}
    known = ("node", "stage", "digest", "key", "git_commit")
    described: dict[str, Json] = {name: tags.get(f"rrlhf.{name}") for name in known}
    aliases: list[Json] = list(version.aliases)
    return {"model": version.name, "version": version.version, "aliases": aliases, **described, "inputs": inputs}


def _references(version: Version) -> list[str]:
    return [f"{version.name}/{version.version}", *(f"{version.name}@{alias}" for alias in version.aliases)]


def _inputs(version: Version) -> dict[str, str]:
    """Return the content digest of each input, the data set first."""
    inputs: dict[str, str] = json.loads(version.tags["rrlhf.inputs"])
    return dict(sorted(inputs.items(), key=lambda item: (item[0] != DATA, item[0])))


def _made(digest: str, versions: Sequence[Version]) -> Version | None:
    """Return the version with this content, the newest if several have it."""
    return next((version for version in versions if version.tags["rrlhf.digest"] == digest), None)


def _drawn(version: Version, versions: Sequence[Version], seen: set[str]) -> Iterator[str]:
    """Yield the lines of a version and, indented, of its inputs; `seen` collects the digests drawn, in place."""
    digest = version.tags["rrlhf.digest"]
    again = digest in seen
    seen.add(digest)
    yield _line(version) + (" (see above)" if again else "")
    inputs = {} if again else _inputs(version)
    for i, (name, source) in enumerate(inputs.items(), 1):
        branch, below = ("└── ", "    ") if i == len(inputs) else ("├── ", "│   ")
        parent = _made(source, versions)
        lines = _drawn(parent, versions, seen) if parent else iter([_leaf(name, source, version)])
        yield branch + next(lines)
        yield from (below + line for line in lines)


def _line(version: Version) -> str:
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    node, digest = version.tags["rrlhf.node"], version.tags["rrlhf.digest"]
    return f"{version.name} v{version.version}{aliases} · {node} · {digest[:SHOWN]}"


def _leaf(name: str, digest: str, child: Version) -> str:
    if name == DATA:
        dataset = child.tags.get("rrlhf.dataset_name")
        return f"data {dataset + ' ' if dataset else ''}md5:{digest.removeprefix('md5:')[:SHOWN]}"
    return f"{name} · {digest[:SHOWN]} (not registered)"
