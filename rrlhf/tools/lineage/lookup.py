"""What there is, registered with MLflow or here in the store, and what a person means by a reference to it.

MLflow knows the models of everybody who shares its server; the store knows what is not registered (evaluations), and
the settings and numbers of what it holds. Both tell a product by the digest of its content and its key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rrlhf.config import Params
from rrlhf.located import UsageError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, CopyError, read_artifact, unsealed
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import profile_of

if TYPE_CHECKING:
    from rrlhf.pipeline.tracking.tracker import Tracker, Version

JUDGES = ("reward", "given", "ensemble")  # stages whose models score any text
Identity = tuple[str, str]  # digest of the content, key


class Lookup:
    """The products of a project: those in its store, and those that MLflow knows, which is asked when it has to be."""

    def __init__(self, root: Path, profile: str, params: Params) -> None:
        self.root, self.profile, self.params = root, profile, params
        self.project = Project(root, profile, params)
        self.store = self.project.store

    @cached_property
    def tracker(self) -> Tracker:
        """MLflow."""
        from rrlhf.pipeline.tracking.tracker import Tracker

        return Tracker(self.root, self.params.tracking.experiment)

    @cached_property
    def versions(self) -> list[Version]:
        """Everything that is registered, the newest first."""
        return self.tracker.versions()

    @cached_property
    def graph(self) -> Graph:
        """Everything that is registered or here."""
        return graph_of(self.versions, self.profile, self.store.products())

    def described(self, wanted: Collection[Product]) -> Graph:
        """Return the graph with the settings and numbers of what is wanted and not in the folder: MLflow is asked."""
        kept = {(version.digest, version.key): version for version in self.versions}

        def asked(product: Product) -> Product:
            version = kept.get((product.digest, product.key))
            if product.document or version is None or product not in wanted:
                return product
            told = Artifact(Path(), unsealed(self.tracker.manifest(version))).product
            return replace(told, names=product.names, aliases=product.aliases)

        return Graph(map(asked, self.graph.products))

    def product(self, reference: str) -> Product:
        """Return what a reference means (`Graph.find`), by the names that it has for the profile."""
        return self.graph.find(reference, self.profile)

    def find(self, reference: str) -> Artifact:
        """Return the artifact of "rrlhf-ensemble@latest", "rrlhf-ensemble/3", a digest's or key's start, or a folder.

        Every file is checked, and the signature where there is a key; what is registered and not here is brought back.
        Raises UsageError with the closest names when there is none, or more than one, and TamperedError when a file is
        not what its manifest says.
        """
        folder = Path(reference)
        if folder.is_dir():
            if not (folder / MANIFEST).is_file():
                raise UsageError(f"{folder}: not the folder of an artifact, for it has no {MANIFEST}")
            self.store.verify(artifact := read_artifact(folder))
            return artifact
        try:
            found = Graph(self.store.products()).find(reference, self.profile)
        except UsageError:
            found = self.product(reference)
        if here := self.store.checked(found.stage, found.key) if found.stage and found.key else None:
            return here
        found = self.product(reference)
        if not found.key:
            raise UsageError(f"{reference!r} is {found.title}, which no stage made as an artifact; name a model")
        try:
            kept = (dvc if found.node == DATA else self.tracker).bring_back(self.store, found.stage, found.key)
        except CopyError as error:
            raise CopyError(f"{error}\n`rrlhf run` with the settings that it was made with makes it again") from None
        if kept is None:
            raise ValueError(f"{reference!r} is registered, but its files are neither here nor in MLflow")
        return kept

    def reward_model(self, reference: str | None) -> Artifact | None:
        """Return the reward model that a reference means; without one the profile's ensemble, if it is up to date."""
        if reference is None:
            return self.project.artifact("ensemble")
        found = self.find(reference)
        if found.stage not in JUDGES:
            raise UsageError(f"{reference!r} is made by stage {found.stage}; name a model of {' or '.join(JUDGES)}")
        return found

    def input_of(self, artifact: Artifact, argument: str) -> Artifact:
        """Return what an artifact was made from. Raises ValueError when neither this folder nor MLflow has it."""
        try:
            return self.find(artifact.input_keys.get(argument) or artifact.inputs[argument])
        except UsageError:
            digest = artifact.inputs[argument]
            raise ValueError(
                f"the {argument} that {artifact.name} was made from, {digest[:12]}, is neither here nor in MLflow"
            ) from None


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
