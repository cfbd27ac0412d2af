"""The part of the audit that looks at data sets: DVC's records and cache, the folders in data/, key documents, rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rrlhf.pipeline.ancestry import Product
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.versioning.datasets import declaration, fault
from rrlhf.pipeline.versioning.records import (
    Record,
    broken_run_records,
    cached,
    copy_faults,
    listing,
    lock_faults,
    lock_files,
    locks,
    md5,
    run_records,
)


def record_faults(root: Path) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with DVC's records and with key documents, and the data set's name where it can be told."""
    for path in broken_run_records(root):
        yield f"{path}: not the record that its name says", ""
    for record in run_records(root):
        if problem := _size_fault(root, record):
            yield f"{record.path}: {problem}", record.name
    for lock in lock_files(root):
        yield from lock_faults(root, lock)
    for path in sorted((root / "data" / "variants").glob("*/dvc.yaml")):
        if path.read_text(encoding="utf-8", errors="replace") != declaration(path.parent.name):
            yield f"{path}: not what was written for {path.parent.name}", path.parent.name
    documents = sorted((root / "data" / "keys").glob("*.json"))
    for path in documents:
        if md5(path.read_bytes()) != path.stem:
            yield f"{path}: expected md5 {path.stem}, found {md5(path.read_bytes())}", ""
    for path in sorted((root / "data").glob("*.key.json")) if documents else []:
        if md5(path.read_bytes()) not in {known.stem for known in documents}:
            yield f"{path}: no such key document was written here", path.name.removesuffix(".key.json")


def data_faults(root: Path, product: Product, *, deep: bool) -> Iterator[str | Path]:
    """Yield what is wrong with one version of a data set, and every file that was read."""
    listed = listing(root, product.digest)
    here = [root / "data" / name for name in product.names if _is_present(root, product, name)]
    for folder in here:
        yield from _files(folder)
        if problem := fault(root, folder, product.digest.removeprefix("md5:"), deep=deep):
            yield problem
            return
    if not listed and not here and not cached(root, product.digest).exists():
        yield f"{product.title} {product.digest}: its files are neither in data/ nor in DVC's cache"
    yield from (cached(root, digest) for digest in listed.values())
    yield from copy_faults(root, product.digest, deep=deep)
    if deep:
        yield from _row_faults(root, listed)


def _row_faults(root: Path, listed: dict[str, str]) -> Iterator[str]:
    """Compare the stored hashes of rows with the rows."""
    from rrlhf.data.fingerprints import FILE, fingerprint, hashes

    files = {name: cached(root, digest) for name, digest in listed.items()}
    if FILE not in files or not all(path.is_file() for path in files.values()):
        return
    try:
        stored = hashes(files)
        counted = hashes({name: path for name, path in files.items() if name != FILE})
    except (OSError, ValueError):
        return  # a broken file, which its md5 told already
    for name, rows in counted.items():
        if fingerprint(rows) != fingerprint(stored.get(name, [])):
            yield f"{files[FILE]}: its hashes are not those of the rows in {name}"


def _size_fault(root: Path, record: Record) -> str | None:
    """Compare the sizes that a record tells, which are not part of the digest that names it."""
    files = [cached(root, digest) for digest in listing(root, record.digest).values()]
    out = record.entry["outs"][0]
    if files and all(path.is_file() for path in files):
        found = len(files), sum(path.stat().st_size for path in files)
        if (out.get("nfiles"), out.get("size")) != found:
            return f"expected nfiles and size {found}, found {(out.get('nfiles'), out.get('size'))}"
    path = root / "data" / "keys" / f"{record.document_md5}.json"
    size = record.entry["deps"][0].get("size")
    if path.is_file() and size != path.stat().st_size:
        return f"expected size {path.stat().st_size} of {path.name}, found {size}"
    return None


def _is_present(root: Path, product: Product, name: str) -> bool:
    """Return whether a lock file says that the folder of this name holds this version now."""
    if not (root / "data" / name).is_dir():
        return False
    try:
        return any((record.digest, record.name) == (product.digest, name) for record in locks(root))
    except TamperedError:
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
