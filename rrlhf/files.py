"""Small text files, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it; its folder is made, its permissions stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.touch()
    if path.is_file():
        beside.chmod(path.stat().st_mode)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless this is its content already."""
    if not (path.is_file() and path.read_bytes() == text.encode()):
        write(path, text)
