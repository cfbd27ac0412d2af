"""The audit: is everything that is kept what was made? Bytes, records against each other, all the way up.

Links are looked at in the order in which things were made, so the first broken one is where the trouble begins:
artifacts, data sets before all others, with DVC's copies of these, then MLflow's tags, links and copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.memo import sha256
from rrlhf.pipeline import dvc
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, Store, TamperedError, read_artifact
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.stages import aliases_of, arm_of, profile_of, spec_of
from rrlhf.pipeline.tracking import Tracker, Version, tag_fault
from rrlhf.tools.lineage.text import line
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.pipeline.signatures import Notary


class Broken(NamedTuple):
    """A broken link: what is wrong with whose record or file, and everything made from that."""

    problem: str
    of: str
    downstream: list[str]


class Report(NamedTuple):
    """What an audit looked at and found."""

    products: int
    files: int
    bytes: int
    broken: list[Broken]  # upstream first
    notes: list[str]  # what could not be looked at


class Audit:
    """One look at a project. `deep`: read every byte, also of MLflow's and DVC's copies. `notary`: verifies."""

    def __init__(
        self,
        root: Path,
        graph: Graph,
        versions: Sequence[Version],
        tracker: Tracker,
        *,
        deep: bool = False,
        notary: Notary | None = None,
    ) -> None:
        self.root, self.graph, self.tracker, self.deep = root, graph, tracker, deep
        self.store = Store(root, notary)
        self.files = self.bytes = 0
        self.notes: list[str] = []
        self._versions: dict[tuple[str, str], list[Version]] = {}
        for version in versions:
            self._versions.setdefault((version.digest, version.key), []).append(version)

    def run(self, start: Product | None = None) -> Report:
        """Check a product with everything above it, or everything that is here or registered."""
        products = self.graph.up(start) if start else in_order(self.graph)
        broken: list[Broken] = []
        seen: set[Path] = set()
        for product in products:
            broken += [self._broken(problem, product) for problem in self._faults(product, seen)]
        if start is None:
            broken += self._strays(seen)
        return Report(len(products), self.files, self.bytes, broken, self.notes)

    def _faults(self, product: Product, seen: set[Path]) -> Iterator[str]:
        if not product.stage:
            if product.node not in EXTERNAL:
                readers = ", ".join(line(link.made) for link in self.graph.readers(product)[:3])
                yield f"{product.node} {product.digest}, an input of {readers}, is neither here nor registered"
        else:
            yield from self._artifact_faults(product, seen)

    def _artifact_faults(self, product: Product, seen: set[Path]) -> Iterator[str]:
        folder = self.store.folder(product.stage, product.key)
        seen.add(folder)
        versions = self._versions.get((product.digest, product.key), [])
        artifact = None
        if folder.exists():
            try:
                artifact = read_artifact(folder)
            except TamperedError as error:
                yield str(error).partition("\n")[0]
                return
            yield from self._folder_faults(artifact, product)
            if artifact.digest != product.digest:
                if versions:
                    yield f"{folder}: expected digest {product.digest}, as registered, found {artifact.digest}"
                artifact = None
        elif product.node == DATA and dvc.kept(self.store, product.stage, product.key):
            self.notes.append(f"{product.title} is kept by DVC and its files are not here; a run would bring them back")
        elif not versions:
            yield f"{folder}: expected an artifact, found nothing"
        for version in versions:
            yield from self._version_faults(version, artifact)
        if self.deep and artifact and artifact.name == DATA:
            try:
                yield from filter(None, [dvc.fault(self.store, artifact)])
            except FileNotFoundError:
                self.notes.append(f"DVC keeps no files of {product.title} {product.short}")
        elif self.deep and artifact and (versions or not spec_of(artifact.stage).model):
            yield from self._copy_faults(artifact)

    def _folder_faults(self, artifact: Artifact, product: Product) -> Iterator[str]:
        where = artifact.path / MANIFEST
        if (artifact.stage, artifact.key) != (product.stage, artifact.path.name):
            yield f"{where}: expected stage {product.stage} and key {artifact.path.name}, found {artifact.key}"
        if problem := self.store.fault(artifact, deep=self.deep):
            yield problem
        if accepted := artifact.manifest.get("accepted"):
            name = f"{artifact.name} {artifact.key[:8]}"
            self.notes.append(f"{name} was accepted from {accepted['from'][:8]}: {accepted['because']}")
        for path in artifact.path.rglob("*"):
            self._count(path)

    def _version_faults(self, version: Version, artifact: Artifact | None) -> Iterator[str]:
        name = f"{version.name}/{version.version}"
        if artifact is None:
            if self.deep:
                self.notes.append(f"{name} is registered and its files are not here; a run would bring them back")
            return
        if profile_of(version.name, artifact.stage) is None:
            yield f"{name} in MLflow: expected the name of a model of stage {artifact.stage}"
        if problem := tag_fault(artifact, version.tags):
            yield f"{name} in MLflow, {problem}"
        yield from (f"{name} in MLflow, {problem}" for problem in self._alias_faults(version, artifact))
        if self.deep and version.run_id and (problem := self.tracker.kept.link_fault(artifact, version.run_id)):
            yield f"{name} in MLflow, {problem}"

    def _alias_faults(self, version: Version, artifact: Artifact) -> Iterator[str]:
        """Hold aliases against gates; those of its arm and of the candidate are given by every run."""
        arm = arm_of(artifact.name)
        given = aliases_of(arm, candidate=arm)
        for alias in sorted({*version.aliases} - {*given}):
            if problem := self.tracker.alias_fault(version, alias):
                yield problem

    def _copy_faults(self, artifact: Artifact) -> Iterator[str]:
        """Compare MLflow's copy, from which a lost artifact is brought back."""
        with self.tracker.kept.copy(artifact) as found:
            if found is None:
                self.notes.append(f"MLflow keeps no files of {artifact.name} {artifact.digest[:8]}")
                return
            folder, description = found
            names = {**artifact.manifest["files"], MANIFEST: sha256(artifact.path / MANIFEST)}
            for name, expected in names.items():
                path = folder / name
                self._count(path)
                digest = sha256(path) if path.is_file() else "no file"
                if digest != expected:
                    yield f"{path}, MLflow's copy: expected sha256 {expected}, found {digest}"
                    return
            if self.store.notary and (problem := self.store.notary.fault(folder, deep=True)):
                yield f"MLflow's copy: {problem}"
            expected = self.tracker.kept.mlmodel_digest(artifact)
            if description and expected:
                digest = sha256(description) if description.is_file() else "no file"
                if digest != expected:
                    yield f"{description}: expected sha256 {expected}, found {digest}"

    def _strays(self, seen: set[Path]) -> Iterator[Broken]:
        """Check the folders of artifacts that the graph does not have, because their manifests cannot be read."""
        for folder in sorted(self.store.root.glob("[!.]*/*")):
            if folder in seen or not folder.is_dir() or folder.parent.name.startswith("."):
                continue
            try:
                artifact = read_artifact(folder)
                problem = f"{folder / MANIFEST}: expected the folder of its key, {artifact.key}"
            except TamperedError as error:
                problem = str(error).partition("\n")[0]
            downstream = [line(each) for each in self.graph.built_on(folder.name)]
            yield Broken(problem, f"{folder.parent.name} {folder.name[:8]}", downstream)

    def _broken(self, problem: str, product: Product) -> Broken:
        return Broken(problem, line(product), [line(each) for each in self.graph.down(product)[1:]])

    def _count(self, path: Path) -> None:
        if path.is_file():
            self.files += 1
            self.bytes += path.stat().st_size


def in_order(graph: Graph) -> list[Product]:
    """Return all products and everything that they name, inputs before what they made."""
    found: dict[Product, None] = {}
    for product in reversed(graph.products):
        if product not in found:
            found |= dict.fromkeys(graph.up(product))
    return list(found)


def as_text(report: Report) -> str:
    """Return a report for people."""
    looked = f"{report.products} products, {report.files} files, {report.bytes / 1e6:.1f} MB"
    lines = [f"note: {note}" for note in report.notes]
    if not report.broken:
        return "\n".join([*lines, f"sound: {looked}"])
    first, *others = report.broken
    lines += [f"first broken link: {first.problem}", f"of: {first.of}"]
    lines += ["downstream:", *(f"    {each}" for each in first.downstream or ["nothing yet"])]
    lines += [f"also broken: {each.problem} (of {each.of})" for each in others]
    return "\n".join([*lines, f"{len(report.broken)} broken in {looked}"])


def as_json(report: Report) -> Json:
    """Return a report for scripts."""
    broken: list[Json] = [
        {"problem": each.problem, "of": each.of, "downstream": [*each.downstream]} for each in report.broken
    ]
    return {
        "sound": not report.broken,
        "products": report.products,
        "files": report.files,
        "bytes": report.bytes,
        "broken": broken,
        "notes": [*report.notes],
    }
