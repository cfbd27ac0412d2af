"""Where the graph comes from: MLflow's registered versions, artifacts in the folder, and DVC's data sets.

MLflow knows the models of everybody who shares its server; the folder knows what is not registered (evaluations), and
the settings and numbers of what it holds. Both tell a product by the digest of its content and its key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import Artifact, Store, TamperedError
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.seal import opened
from rrlhf.pipeline.stages import profile_of
from rrlhf.pipeline.tracking import Tracker, Version
from rrlhf.pipeline.versioning.records import Record, cached, kept_document, locks, run_records

Identity = tuple[str, str]  # digest of the content, key


def from_versions(versions: Sequence[Version], profile: str = "default") -> Graph:
    """Return the graph of registered versions alone; they come newest first.

    profile: whose names stand first, where a model has those of several.
    """
    return Graph([*_registered(versions, profile).values(), *_named_data_sets(versions)])


def load(root: Path, versions: Sequence[Version], profile: str = "default", *, strict: bool = True) -> Graph:
    """Return the graph of registered versions, of the folder's artifacts and of its data sets.

    profile: whose names stand first, where a model has those of several. strict: raise TamperedError when a record of a
    data set was changed, instead of going without it.
    """
    products = _registered(versions, profile)
    for product in Store(root).products():
        identity = product.digest, product.key
        known = products.get(identity, product)
        products[identity] = replace(product, names=known.names, aliases=known.aliases)
    datasets = data_sets(root, profile, strict=strict)
    here = {product.digest for product in datasets}
    elsewhere = [product for product in _named_data_sets(versions) if product.digest not in here]
    return Graph([*products.values(), *datasets, *elsewhere])


def described(graph: Graph, wanted: Collection[Product], tracker: Tracker, versions: Iterable[Version]) -> Graph:
    """Return the graph with the settings and numbers of what is wanted and not in the folder: MLflow is asked."""
    kept = {(version.digest, version.key): version for version in versions}

    def asked(product: Product) -> Product:
        version = kept.get((product.digest, product.key))
        if product.document or version is None or product not in wanted:
            return product
        told = Artifact(Path(), opened(tracker.manifest(version))).product
        return replace(told, names=product.names, aliases=product.aliases)

    return Graph(map(asked, graph.products))


def data_sets(root: Path, profile: str = "default", *, strict: bool = True) -> list[Product]:
    """Return the data sets that DVC knows in this folder: those of its lock files first, then earlier ones."""
    records: list[Record] = []
    with nullcontext() if strict else suppress(TamperedError):
        records += [*locks(root)]
    versions: dict[str, list[Record]] = {}
    for record in [*records, *run_records(root)]:
        versions.setdefault(record.digest, []).append(record)
    return [_data_set(root, same, profile, strict=strict) for same in versions.values()]


def _registered(versions: Iterable[Version], profile: str) -> dict[Identity, Product]:
    """Return one product for all versions of one content and key, as their tags tell it."""
    same: dict[Identity, list[Version]] = {}
    for version in versions:
        same.setdefault((version.digest, version.key), []).append(version)
    return {identity: _product(each, profile) for identity, each in same.items()}


def _product(versions: Sequence[Version], profile: str) -> Product:
    """Return what several versions are, the newest first."""
    version, made = versions[0], versions[0].made
    ours_first = sorted(versions, key=lambda each: profile_of(each.name, made["stage"]) != profile)
    return Product(
        digest=version.digest,
        key=version.key,
        node=version.tags["rrlhf.node"],
        stage=made["stage"],
        inputs=made["inputs"],
        input_keys=made["input_keys"],
        names=tuple(f"{each.name}/{each.version}" for each in ours_first),
        aliases=tuple(f"{each.name}@{alias}" for each in versions for alias in each.aliases),
        commit=made["git_commit"] or "",
        created=datetime.fromtimestamp(version.created / 1000, UTC).isoformat() if version.created else "",
    )


def _named_data_sets(versions: Iterable[Version]) -> list[Product]:
    """Return the data sets that versions name as their inputs, the newest first."""
    named: dict[str, str] = {}
    for version in versions:
        if digest := version.made["inputs"].get(DATA):
            named[digest] = named.get(digest) or version.tags.get("rrlhf.data", "")
    return [Product(digest, DATA, "prepare", names=(name,) if name else ()) for digest, name in named.items()]


def _data_set(root: Path, records: Sequence[Record], profile: str, *, strict: bool) -> Product:
    """Return the data set of records with one digest, which several profiles may have."""
    record, document = records[0], None
    names = sorted(dict.fromkeys(each.name for each in records), key=lambda name: name != profile)
    with nullcontext() if strict else suppress(TamperedError):
        document = kept_document(root, record.document_md5)
    listing = cached(root, record.digest)
    made = datetime.fromtimestamp(listing.stat().st_mtime, UTC) if listing.exists() else None
    return Product(
        digest=record.digest,
        node=DATA,
        stage="prepare",
        inputs=document["inputs"] if document else {},
        names=tuple(names),
        document=document,
        created=made.isoformat(timespec="seconds") if made else "",
    )
