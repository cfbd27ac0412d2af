"""Small text files written whole or not at all, folders made empty, and both on the disk."""

import os
import shutil
from pathlib import Path

CHECKPOINT = "checkpoint"  # sub-folder in which a stage keeps what it needs to go on after an interruption


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


def clear(folder: Path) -> Path:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def sync(path: Path) -> None:
    """Have a file or a folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
