"""What a run would do, and why, without starting it: no Prefect, torch or MLflow is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from rrlhf.artifacts import Artifact, Memo, Store
from rrlhf.config import Params
from rrlhf.datasets import Place, place_of, prepared, restorable
from rrlhf.keys import Document, differences, key_digest, key_document
from rrlhf.located import ParamsError
from rrlhf.sources import external_digests
from rrlhf.stages import DATA, Node, nodes
from rrlhf.types import Dataset, Json

Action = Literal["run", "reuse", "upstream"]


class Planned(NamedTuple):
    """One node of a run: what will happen to it, and the reasons in words."""

    node: str
    action: Action  # "upstream": an input will run, and its result decides
    reasons: list[str]
    seconds: float | None  # what it took the last time

    def as_json(self) -> Json:
        """Return it for scripts."""
        return {"node": self.node, "action": self.action, "reasons": [*self.reasons], "seconds": self.seconds}


class Project:
    """A project folder's settings and results: finds the key of every node."""

    def __init__(self, root: Path, profile: str, params: Params) -> None:
        self.root, self.profile, self.params = root, profile, params
        self.store = Store(root)
        self.nodes = nodes(params)
        self._memo = Memo(root / ".rrlhf" / "digests.json")

    def document(self, node: Node, digests: dict[str, str]) -> Document:
        """Return a node's key document, given the digest of every node that it reads."""
        inputs = {argument: digests[name] for argument, name in node.inputs.items()}
        return key_document(node, inputs | external_digests(node, self._memo))

    def check_sources(self) -> None:
        """Raise ParamsError when a base model, the source data or a reward function cannot be had.

        This comes before anything is computed, and tells every mistake.
        """
        from rrlhf.reward_functions import load_functions

        mistakes: list[str] = []
        for node in self.nodes:
            with collected(mistakes):
                external_digests(node, self._memo)
        with collected(mistakes):
            load_functions(path for node in self.nodes for path in node.functions)
        if mistakes:
            raise ParamsError("\n".join(dict.fromkeys(mistakes)))

    def place(self, document: Document) -> Place:
        """Return where the data set lies."""
        return place_of(self.root, self.profile, self.nodes[0], document)

    def plan(self) -> list[Planned]:
        """Return what would happen to every node, in order."""
        earlier = sorted(self.store.all(), key=lambda artifact: str(artifact.manifest["created"]), reverse=True)
        digests: dict[str, str] = {}
        planned = []
        for node in self.nodes:
            unknown = [name for name in node.inputs.values() if name not in digests]
            if unknown:
                planned.append(Planned(node.name, "upstream", [f"after {', '.join(unknown)}"], _took(node, earlier)))
                continue
            document = self.document(node, digests)
            digest = self._existing(node, document)
            if digest:
                digests[node.name] = digest
                planned.append(Planned(node.name, "reuse", [], _took(node, earlier)))
            else:
                planned.append(Planned(node.name, "run", self._reasons(node, document, earlier), _took(node, earlier)))
        return planned

    def artifact(self, name: str) -> Artifact | None:
        """Return the checked result of a node under the present settings; None when a run would make it first."""
        digests: dict[str, str] = {}
        for node in self.nodes:
            if not set(node.inputs.values()) <= set(digests):
                continue
            document = self.document(node, digests)
            if node.name == name:
                return self.store.checked(node.stage, key_digest(document))
            if digest := self._existing(node, document):
                digests[node.name] = digest
        return None

    def dataset(self) -> Dataset | None:
        """Return the data set of the present settings, checked, if it is there."""
        document = self.document(self.nodes[0], {})
        return prepared(self.root, self.place(document), document)

    def _existing(self, node: Node, document: Document) -> str | None:
        if node.name == DATA:
            place = self.place(document)
            dataset = prepared(self.root, place, document) or restorable(self.root, place, document)
            return dataset.digest if dataset else None
        artifact = self.store.checked(node.stage, key_digest(document))
        return artifact.digest if artifact else None

    def _reasons(self, node: Node, document: Document, earlier: list[Artifact]) -> list[str]:
        """Return the differences to the most similar result that this node had before."""
        known = [artifact.manifest["document"] for artifact in earlier if artifact.name == node.name]
        if node.name == DATA:
            known = [json.loads(path.read_bytes()) for path in (self.root / "data").glob(f"{self.profile}*.key.json")]
        if not known:
            return ["no result of it is here"]
        return min((differences(old, document) for old in known), key=len) or ["its result is gone"]


@contextmanager
def collected(mistakes: list[str]) -> Iterator[None]:
    """Note a mistake in the settings instead of raising it."""
    try:
        yield
    except ParamsError as error:
        mistakes.append(str(error))


def _took(node: Node, earlier: list[Artifact]) -> float | None:
    seconds = [artifact.manifest["seconds"] for artifact in earlier if artifact.name == node.name]
    return float(seconds[0]) if seconds else None
