"""What DVC wrote down about data sets, read without DVC: dvc.lock, its run cache, its cache of files.

DVC trusts its own files. Here they are held against each other: what dvc.lock says of a data set must be what the run
cache recorded, a record of the run cache is named by its own digest, and so is every file in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from rrlhf.files import write
from rrlhf.located import ParamsError, load_yaml, read
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.keys import Document, canonical

Entry = dict[str, Any]
PROJECTS = ("dvc.yaml", "large/dvc.yaml")  # what is declared for profiles
_SIZES = {"size", "nfiles"}  # not part of the digest that names a record


class Record(NamedTuple):
    """One data set that DVC made or brought back, by the file that says so."""

    path: Path
    entry: Entry

    @property
    def name(self) -> str:
        """The data set's folder in data/."""
        return Path(self.entry["outs"][0]["path"]).name

    @property
    def digest(self) -> str:
        """The version, as artifacts name it."""
        return f"md5:{self.entry['outs'][0]['md5']}"

    @property
    def document_md5(self) -> str:
        """The md5 of the key document that the data set was made from."""
        return str(self.entry["deps"][0]["md5"])


def lock_entry(root: Path, project: Path, stage: str, data: Path) -> Entry | None:
    """Return what a dvc.lock says of a stage that makes the folder `data`; None when it was not made yet.

    Raises TamperedError when the file is not one that DVC could have written after what its run cache recorded.
    """
    path = project.with_suffix(".lock")
    stages = _stages(path)
    out = data.relative_to(root).as_posix()
    other = next((name for name, entry in stages.items() if name != stage and _out(entry) == out), None)
    if stage not in stages:
        if other is not None:
            raise _changed(path, f"the stage that makes {out} is called {other!r}, in {project.name} {stage!r}")
        return None
    if problem := _entry_fault(root, stage, stages[stage], out):
        raise _changed(path, problem)
    return stages[stage]


def declared_in(root: Path, profile: str) -> Path | None:
    """Return the dvc.yaml that has a profile's stages; None when there is none.

    Raises ParamsError when one is not as this project has it: people name their profiles there.
    """
    for path in (root / project for project in PROJECTS if (root / project).is_file()):
        try:
            profiles = read(path, {}, [])["stages"]["prepare"]["foreach"]
            if profile in profiles:
                return path
        except (KeyError, TypeError):
            raise ParamsError(f"{path}: no list of profiles in stages, prepare, foreach: see what git has") from None
    return None


def lock_files(root: Path) -> list[Path]:
    """Return every dvc.lock: of the profiles, and of the variants that overrides made."""
    declared = [(root / project).with_suffix(".lock") for project in PROJECTS]
    return [*declared, *sorted((root / "data" / "variants").glob("*/dvc.lock"))]


def locks(root: Path) -> Iterator[Record]:
    """Yield the data sets of every dvc.lock. Raises TamperedError when one cannot be read."""
    for path in lock_files(root):
        for stage, entry in _stages(path).items():
            if _makes_data(stage) and _is_record(entry):
                yield Record(path, entry)


def lock_faults(root: Path, path: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a dvc.lock, and the name of the data set that it concerns, where it can be told."""
    try:
        stages = _stages(path)
    except TamperedError as error:
        yield str(error).partition("\n")[0], path.parent.name
        return
    is_variant = path.parent.parent.name == "variants"
    for stage, entry in stages.items():
        if not is_variant and stage.startswith(("key@", "pipeline@")):
            continue
        name = path.parent.name if is_variant else stage.removeprefix("prepare@")
        if stage != ("prepare" if is_variant else f"prepare@{name}"):
            yield f"{path} was changed: it has a stage {stage!r}, and none of that name makes data", name
        elif problem := _entry_fault(root, stage, entry, f"data/{name}"):
            yield f"{path} was changed: {problem}", name


def run_records(root: Path) -> list[Record]:
    """Return the records of DVC's run cache that are sound."""
    return [record for path in _run_files(root) if (record := _run_record(path))]


def broken_run_records(root: Path) -> Iterator[Path]:
    """Yield the files of DVC's run cache that are not what their names say."""
    return (path for path in _run_files(root) if _run_record(path) is None)


def listing(root: Path, digest: str) -> dict[str, str]:
    """Return the md5 of every file of a version, from DVC's cache; empty when it is not there."""
    try:
        content = cached(root, digest).read_bytes()
        listed: list[dict[str, Any]] = json.loads(content)
        return {item["relpath"]: item["md5"] for item in listed} if f"{md5(content)}.dir" == _bare(digest) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def files_of(root: Path, record: Record) -> dict[str, Path]:
    """Return where the files of a version lie, by name: in DVC's cache, or else in the folder; empty when gone."""
    listed = {name: cached(root, digest) for name, digest in listing(root, record.digest).items()}
    if listed and all(path.exists() for path in listed.values()):
        return listed
    folder = root / "data" / record.name
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digests = {name: md5(path.read_bytes()) for name, path in found.items()}
    return found if folder_digest(digests) == _bare(record.digest) else {}


def copy_faults(root: Path, digest: str, *, deep: bool = True) -> Iterator[str]:
    """Yield what is wrong with the copies in DVC's cache of a version; `deep`: with their content, too."""
    place, listed = cached(root, digest), listing(root, digest)
    if place.exists() and not listed:
        yield f"{place}: expected md5 {_bare(digest).removesuffix('.dir')}, found {md5(place.read_bytes())}"
    for name, expected in listed.items():
        path = cached(root, expected)
        found = "no file" if not path.is_file() else md5(path.read_bytes()) if deep else expected
        if found != expected:
            yield f"{path}, DVC's copy of {name}: expected md5 {expected}, found {found}"


def cached(root: Path, digest: str) -> Path:
    """Return where DVC's cache keeps the content with this md5."""
    name = _bare(digest)
    return root / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]


def keep_document(data: Path, document: Document) -> None:
    """Keep a key document by its md5, which is how DVC's records name it: a version's settings can be told later.

    data: the folder of the data sets.
    """
    text = canonical(document)
    write(data / "keys" / f"{md5(text.encode())}.json", text)


def kept_document(root: Path, digest: str) -> Document | None:
    """Return the key document with this md5, or None when it was not kept.

    Raises TamperedError when the file is not what its name says.
    """
    path = root / "data" / "keys" / f"{digest}.json"
    if not path.exists():
        return None
    content = path.read_bytes()
    if md5(content) != digest:
        raise TamperedError(
            f"{path}: expected md5 {digest}, found {md5(content)}\nit is written again with: rm {quote(str(path))}"
        )
    document: Document = json.loads(content)
    return document


def folder_digest(files: dict[str, str]) -> str:
    """Return DVC's digest of a folder: the md5 of the sorted list of its files' md5."""
    listed = [{"md5": digest, "relpath": name} for name, digest in sorted(files.items())]
    return md5(json.dumps(listed, sort_keys=True).encode()) + ".dir"


def md5(content: bytes) -> str:
    """Return the md5 of a content, in hex."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _bare(digest: str) -> str:
    return digest.removeprefix("md5:")


def _stages(path: Path) -> dict[str, Entry]:
    """Return the entries of a dvc.lock; none when there is no such file."""
    try:
        lock = load_yaml(path)
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _changed(path, f"it is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(lock, dict) or lock.keys() != {"schema", "stages"} or lock["schema"] != "2.0":
        raise _changed(path, "it does not have the form that DVC writes")
    stages: dict[str, Entry] = lock["stages"]
    if not isinstance(stages, dict):
        raise _changed(path, "it does not have the form that DVC writes")
    return stages


def _entry_fault(root: Path, stage: str, entry: Any, out: str) -> str | None:
    if not _is_record(entry) or _out(entry) != out:
        return f"what it says of {stage} does not have the form that DVC writes"
    said = Record(root, entry)
    known = [record for record in run_records(root) if _out(record.entry) == out]
    akin = [
        record.entry for record in known if record.document_md5 == said.document_md5 or record.digest == said.digest
    ]
    if akin and entry not in akin:  # what shares neither came from another machine, by git
        return f"what it says of {stage} is not what DVC's run cache recorded"
    return None


def _changed(path: Path, reason: str) -> TamperedError:
    return TamperedError(f"{path} was changed: {reason}\nto have DVC find its data sets again: rm {quote(str(path))}")


def _run_files(root: Path) -> list[Path]:
    return [path for path in sorted((root / ".dvc" / "cache" / "runs").glob("*/*/*")) if len(path.name) == 64]


def _run_record(path: Path) -> Record | None:
    try:
        entry = load_yaml(path)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not _is_record(entry):
        return None
    text = json.dumps(_without_sizes(entry), sort_keys=True)
    return Record(path, entry) if hashlib.sha256(text.encode()).hexdigest() == path.name else None


def _without_sizes(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_sizes(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_sizes(item) for name, item in value.items() if name not in _SIZES}
    return value


def _makes_data(stage: str) -> bool:
    return stage.partition("@")[0] == "prepare"


def _is_record(entry: Any) -> bool:
    try:
        return all(isinstance(entry[side][0][name], str) for side in ("deps", "outs") for name in ("path", "md5"))
    except (KeyError, IndexError, TypeError):
        return False


def _out(entry: Any) -> str | None:
    return str(entry["outs"][0]["path"]) if _is_record(entry) else None
