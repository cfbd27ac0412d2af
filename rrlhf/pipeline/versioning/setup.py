"""DVC with git where there is one, and without it in a copy that has none: .dvc/config cannot say "if"."""

from __future__ import annotations

import re
from pathlib import Path

from rrlhf.files import write_if_new

SECTION = "[core]\n"
WITH_GIT = "    no_scm = false\n"
SETTING = re.compile(r"^[ \t]*no_scm[ \t]*=[ \t]*(\w+)[ \t]*\n?", re.MULTILINE)


def follow_git(root: Path) -> None:
    """Have DVC compare commits (`dvc metrics diff`) in a project under git, by .dvc/config.local.

    .dvc/config says no_scm = true, without which no DVC command works in a copy that git does not know. A no_scm = true
    in config.local is the user's own and stays.
    """
    path = root / ".dvc" / "config.local"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = SETTING.search(before)
    if is_under_git(root) and found is None:
        after = before.replace(SECTION, SECTION + WITH_GIT, 1) if SECTION in before else before + SECTION + WITH_GIT
    elif not is_under_git(root) and found and found[1].lower() == "false":
        after = before[: found.start()] + before[found.end() :]
    else:
        return
    if path.parent.is_dir():
        write_if_new(path, after)


def is_under_git(root: Path) -> bool:
    """Whether the folder or one above it is a working tree of git."""
    return any((folder / ".git").exists() for folder in (root, *root.parents))
