"""What identifies a source data set."""

from __future__ import annotations

import os
from pathlib import Path

from rrlhf.config import Prepare
from rrlhf.data.files import is_hub_id, source_files
from rrlhf.located import ParamsError
from rrlhf.memo import Memo
from rrlhf.models.sources import files_digest, path_digest, pinned_commit


def source_digest(prepare: Prepare, memo: Memo) -> str:
    """Return what identifies the source data's content. Raises ParamsError when it cannot be had."""
    source = prepare.source
    if source == "written":
        return "written"
    if is_hub_id(source):
        return f"hub:{source}@{pinned_commit(source, prepare.revision, setting='prepare.revision', kind='dataset')}"
    try:
        files = source_files(source)
    except ValueError as error:
        raise ParamsError(f"prepare.source {error}") from None
    of_the_hub = [name for name in ("revision", "config", "split") if getattr(prepare, name) is not None]
    if of_the_hub:
        told = [
            f"prepare.{name} belongs to a hub data set, and {source} lies here: set it to null" for name in of_the_hub
        ]
        raise ParamsError("\n".join(told))
    if len(files) == 1 and Path(source).expanduser().is_file():
        return path_digest(files[0], memo)
    return files_digest(files, Path(os.path.commonpath([path.parent for path in files])), memo)
