"""Data sets as earlier versions of this package left them, in data/, made artifacts under the key that they had."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import HISTORY, Store
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.progress import say
from rrlhf.types import SUMMARY


def former_data(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the data sets in data/ that DVC's records say were made by the key document beside them."""
    locks = (root / "dvc.lock", root / "large" / "dvc.lock", *(root / "data" / "variants").glob("*/dvc.lock"))
    recorded = "".join(path.read_text(encoding="utf-8") for path in locks if path.is_file())
    for path in sorted((root / "data").glob("*.key.json")):
        folder = path.with_name(path.name.removesuffix(".key.json"))
        made_by = _md5(path.read_bytes())
        if folder.is_dir() and made_by in recorded and former_digest(folder).removeprefix("md5:") in recorded:
            yield folder, json.loads(path.read_bytes())


def take_over(store: Store) -> None:
    """Make an artifact of every such data set, unless it is one."""
    root = store.root.parent
    for folder, document in former_data(root):
        key = key_digest(document)
        with store.locked(key):
            if store.find("prepare", key):
                continue
            staged = store.staging("former", key)
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(folder, staged, copy_function=os.link)
            told = json.loads((folder / SUMMARY).read_bytes())
            numbers = {name: value for name, value in told.items() if isinstance(value, int | float)}
            (staged / HISTORY).write_text(json.dumps({"step": 0, **numbers}) + "\n", encoding="utf-8")
            made = store.publish(
                DATA, document, staged, seconds=0.0, profile=folder.name, formerly=former_digest(folder)
            )
        dvc.keep(root, made.path)
        say(f"{DATA}  data/{folder.name} is now {made.path.relative_to(root)}")


def former_digest(folder: Path) -> str:
    """Return the digest by which results made from a data set in data/ name it."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": _md5(path.read_bytes()), "relpath": name} for name, path in files]
    return f"md5:{_md5(json.dumps(listed, sort_keys=True).encode())}.dir"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
