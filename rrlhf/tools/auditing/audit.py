"""The audit: is everything that is kept what was made? Bytes, records against each other, all the way up.

Products are looked at in the order in which they were made, so the first broken link is where the trouble begins.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rrlhf.located import ParamsError
from rrlhf.memo import sha256
from rrlhf.pipeline import dvc
from rrlhf.pipeline.ancestry import Product
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, TamperedError, read_artifact
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.stages import aliases_of, arm_of, profile_of, spec_of
from rrlhf.pipeline.tracking.models import LOADED, tag_fault
from rrlhf.pipeline.tracking.tracker import Version
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.lineage.text import line
from rrlhf.tools.running.uptodate import changed_numbers

REPLACE = "remove the folder, and `rrlhf run` restores it or computes it again"


class Broken(NamedTuple):
    """A broken link: what is wrong with what, how to mend it, and everything made from that."""

    problem: str
    mend: str
    of: str
    downstream: list[str]


class Report(NamedTuple):
    """What an audit found."""

    products: int
    broken: list[Broken]  # upstream first
    notes: list[str]  # what could not be looked at, and what was accepted


class Audit:
    """One look at a project. `deep`: read every byte, also of MLflow's and DVC's copies."""

    def __init__(self, lookup: Lookup, *, deep: bool = False) -> None:
        self.graph, self.tracker, self.store, self.deep = lookup.graph, lookup.tracker, lookup.store, deep
        self.lookup = lookup
        self.notes: list[str] = []
        self._versions: dict[tuple[str, str], list[Version]] = {}
        for version in lookup.versions:
            self._versions.setdefault((version.digest, version.key), []).append(version)
        self.checks = [  # what yields what is wrong with a product, and the way to mend it
            (self._absence, "`rrlhf run` with its settings brings or makes it again; `rrlhf accept` takes over data/"),
            (self._folder, REPLACE),
            (self._registration, "remove the version in MLflow, and `rrlhf run` registers it again"),
            (self._aliases, "remove the alias in MLflow, or have it earned: `rrlhf promote`"),
            *([(self._copy, "remove this copy, and `rrlhf run` keeps a new one")] if deep else []),
        ]

    def run(self, start: Product | None = None) -> Report:
        """Check a product with everything above it, or everything that is here or registered."""
        products = self.graph.up(*([start] if start else self.graph.products))
        broken = []
        with self.store.memo.once():
            for product in products:
                for check, mend in self.checks:
                    found = [*check(product)]
                    below = [line(each) for each in self.graph.down(product)[1:]] if found else []
                    broken += [Broken(problem, mend, line(product), below) for problem in found]
        if start is None:
            broken += self._strays({self._place(product) for product in products})
            broken += self._numbers() if not broken else []
        return Report(len(products), broken, self.notes)

    def _absence(self, product: Product) -> Iterator[str]:
        if not product.stage:
            if product.node not in EXTERNAL:
                readers = ", ".join(line(link.made) for link in self.graph.readers[product][:3])
                yield f"{product.node} {product.digest}, an input of {readers}, is neither here nor registered"
        elif not self._place(product).exists():
            kept = product.node == DATA and dvc.kept(self.store, product.stage, product.key)
            if not (kept or self._of(product)):
                yield f"{self._place(product)}: expected an artifact, found nothing"
            elif self.deep:
                self.notes.append(f"{line(product)} is kept and its files are not here; a run would bring them back")

    def _folder(self, product: Product) -> Iterator[str]:
        """Compare the files with the manifest, and this with the registry."""
        folder = self._place(product)
        if not (product.stage and folder.exists()):
            return
        try:
            artifact = read_artifact(folder)
        except TamperedError as error:
            yield str(error).partition("\n")[0]
            return
        if (artifact.stage, artifact.key) != (product.stage, folder.name):
            yield f"{folder / MANIFEST}: expected stage {product.stage} and key {folder.name}, found {artifact.key}"
        if problem := self.store.fault(artifact, deep=self.deep):
            yield problem
        if artifact.digest != product.digest and self._of(product):
            yield f"{folder}: expected digest {product.digest}, as registered, found {artifact.digest}"
        if accepted := artifact.manifest.get("accepted"):
            self.notes.append(f"{line(product)} was accepted from {accepted['from'][:8]}: {accepted['because']}")

    def _registration(self, product: Product) -> Iterator[str]:
        """Compare what MLflow's registry tells of an artifact that is here, and to what it links it."""
        if (artifact := self._sound(product)) is None:
            return
        for version in self._of(product):
            where = f"{version.name}/{version.version} in MLflow"
            if profile_of(version.name, artifact.stage) is None:
                yield f"{where}: expected the name of a model of stage {artifact.stage}"
            if problem := tag_fault(artifact, version.tags):
                yield f"{where}, {problem}"
            if self.deep and version.run_id and (problem := self.tracker.models.run_fault(artifact, version.run_id)):
                yield f"{where}, {problem}"

    def _aliases(self, product: Product) -> Iterator[str]:
        """Hold aliases against gates; those of its arm and of the candidate are given by every run."""
        arm = arm_of(product.node)
        given = aliases_of(arm, candidate=arm)
        for version in self._of(product) if self._sound(product) else []:
            for alias in sorted({*version.aliases} - {*given}):
                if problem := self.tracker.models.alias_fault(version, alias):
                    yield f"{version.name}/{version.version} in MLflow, {problem}"

    def _copy(self, product: Product) -> Iterator[str]:
        """Compare the copy from which a lost artifact is brought back: DVC's of a data set, MLflow's of others."""
        artifact = self._sound(product)
        if artifact is None or (spec_of(artifact.stage).model and not self._of(product)):
            return
        if artifact.name == DATA:
            try:
                yield from filter(None, [dvc.fault(self.store, artifact)])
            except FileNotFoundError:
                self.notes.append(f"DVC keeps no files of {line(product)}")
            return
        with self.tracker.models.copy(artifact) as found:
            if found is None and self._of(product):
                yield "MLflow has no copy whose tags rrlhf.key and rrlhf.digest are its own"
            elif found is None:
                self.notes.append(f"MLflow keeps no files of {line(product)}")
            if found is None:
                return
            folder, description = found
            if description:
                beside = {*description.parent.iterdir()} - {folder, description, description.with_name(LOADED)}
                yield from (f"MLflow's copy: {path}: expected no such file" for path in sorted(beside))
            try:
                copy = read_artifact(folder)
                problem = self.store.fault(copy, deep=True)
                if problem is None and copy.manifest != artifact.manifest:
                    problem = f"{folder / MANIFEST}: not that of {artifact.path}"
            except TamperedError as error:
                problem = str(error).partition("\n")[0]
            if problem:
                yield f"MLflow's copy: {problem}"
            expected = self.tracker.models.mlmodel_digest(artifact)
            digest = sha256(description) if description and description.is_file() else "no file"
            if description and expected not in {None, digest}:
                yield f"{description}: expected sha256 {expected}, found {digest}"

    def _strays(self, known: set[Path]) -> Iterator[Broken]:
        """Check the folders of artifacts that the graph does not have, because their manifests cannot be read."""
        for folder in sorted(self.store.root.glob("[!.]*/*/")):
            if folder in known:
                continue
            try:
                problem = f"{folder / MANIFEST}: expected the folder of its key, {read_artifact(folder).key}"
            except TamperedError as error:
                problem = str(error).partition("\n")[0]
            downstream = [line(each) for each in self.graph.built_on(folder.name)]
            yield Broken(problem, REPLACE, f"{folder.parent.name} {folder.name[:8]}", downstream)

    def _numbers(self) -> Iterator[Broken]:
        """Hold the numbers that git keeps against the profile's results."""
        try:
            changed = changed_numbers(self.lookup.project)
        except ParamsError as error:
            changed = []
            self.notes.append(f"the numbers that git keeps were not looked at: {str(error).partition(chr(10))[0]}")
        for path in changed:
            problem = f"{path}: expected the numbers of the present results, found others"
            yield Broken(problem, "`rrlhf run` writes it again", f"profile {self.lookup.profile}", [])

    def _place(self, product: Product) -> Path:
        return self.store.folder(product.stage, product.key)

    def _of(self, product: Product) -> list[Version]:
        """Return the versions under which a product is registered."""
        return self._versions.get((product.digest, product.key), [])

    def _sound(self, product: Product) -> Artifact | None:
        """Return the artifact of a product when it is here, with the content that the product has."""
        try:
            artifact = read_artifact(self._place(product)) if product.stage else None
        except TamperedError:
            return None
        return artifact if artifact and artifact.digest == product.digest else None


def as_text(report: Report) -> str:
    """Return a report for people."""
    lines = [f"note: {note}" for note in report.notes]
    if not report.broken:
        return "\n".join([*lines, f"sound: {report.products} products"])
    first, *others = report.broken
    lines += [f"first broken link: {first.problem}", f"of: {first.of}", f"to mend it: {first.mend}"]
    lines += ["downstream:", *(f"    {each}" for each in first.downstream or ["nothing yet"])]
    lines += [f"also broken: {each.problem} (of {each.of}); to mend it: {each.mend}" for each in others]
    return "\n".join([*lines, f"{len(report.broken)} broken in {report.products} products"])


def as_json(report: Report) -> dict[str, object]:
    """Return a report for scripts."""
    broken = [each._asdict() for each in report.broken]
    return {"sound": not broken, "products": report.products, "broken": broken, "notes": report.notes}
