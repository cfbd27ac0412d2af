"""Where the graph comes from: MLflow's registered versions, and the artifacts in the folder.

MLflow knows the models of everybody who shares its server; the folder knows what is not registered (evaluations), and
the settings and numbers of what it holds. Both tell a product by the digest of its content and its key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.seal import opened
from rrlhf.pipeline.stages import profile_of
from rrlhf.pipeline.tracking import Tracker, Version

Identity = tuple[str, str]  # digest of the content, key


def graph_of(versions: Sequence[Version], profile: str = "default", here: Iterable[Product] = ()) -> Graph:
    """Return the graph of registered versions, which come newest first, and of what is `here` in the store.

    profile: whose names stand first, where a model has those of several.
    """
    makings: dict[Identity, list[Version]] = {}
    for version in versions:
        makings.setdefault((version.digest, version.key), []).append(version)
    products = {identity: _product(same, profile) for identity, same in makings.items()}
    for product in here:
        identity = product.digest, product.key
        known = products.get(identity, product)
        products[identity] = replace(product, names=known.names, aliases=known.aliases)
    known_data = {*products, *((product.formerly, "") for product in products.values())}
    elsewhere = [data for data in _named_data_sets(versions) if (data.digest, data.key) not in known_data]
    return Graph([*products.values(), *elsewhere])


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
    named: dict[Identity, str] = {}
    for version in versions:
        if digest := version.made["inputs"].get(DATA):
            made = digest, version.made["input_keys"].get(DATA, "")
            named[made] = named.get(made) or version.tags.get("rrlhf.data", "")
    return [
        Product(digest, DATA, "prepare" if key else "", key, names=(name,) if name else ())
        for (digest, key), name in named.items()
    ]
