"""A data set by its digest: where it lies, and the key document that it was made from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from rrlhf.pipeline.keys import Document
from rrlhf.pipeline.versioning.datasets import Place, prepared
from rrlhf.pipeline.versioning.records import lock_files
from rrlhf.types import Dataset


def find_data(root: Path, digest: str) -> tuple[Dataset, Document]:
    """Return a data set that DVC recorded under this digest, checked, with its key document.

    Raises ValueError that names what is here when there is none, and TamperedError for a changed file.
    """
    here = []
    for place in _places(root):
        document = json.loads(place.key.read_bytes()) if place.key.is_file() else None
        dataset = prepared(root, place, document) if document else None
        if document and dataset and dataset.digest == digest:
            return dataset, document
        here += [f"data/{dataset.name} is {dataset.digest}"] if dataset else []
    raise ValueError(
        f"the data set {digest} is not here ({'; '.join(here) or 'there is none'}): `rrlhf run` with the profile and "
        "settings that it was made with brings it back"
    )


def _places(root: Path) -> Iterator[Place]:
    """Yield every place that DVC has a record of: the profiles' and those of variants."""
    for lock in lock_files(root):
        if not lock.is_file():
            continue
        for stage, entry in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].items():
            if stage.partition("@")[0] == "prepare":
                name = Path(entry["outs"][0]["path"]).name
                key, data = root / "data" / f"{name}.key.json", root / "data" / name
                yield Place(name, key, data, lock.with_suffix(".yaml"), stage)
