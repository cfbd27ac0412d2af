"""What a run would do, and why, without starting it: no Prefect, torch or MLflow is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from rrlhf.config import Params, Prepare
from rrlhf.data.files import is_hub_id, source_digest
from rrlhf.located import ParamsError
from rrlhf.pipeline.artifacts import Artifact, Store
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.external import external_digests
from rrlhf.pipeline.graph import DATA, EXTERNAL, Node, nodes
from rrlhf.pipeline.keys import Document, differences, key_digest, key_document, our_modules, settings_here
from rrlhf.pipeline.last_run import last_run
from rrlhf.pipeline.modules import Modules
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.partial import Chosen, Part, chosen
from rrlhf.pipeline.signatures import notary_of
from rrlhf.pipeline.stages import aliases_of, profile_of
from rrlhf.pipeline.versioning.datasets import Place, accepted_for, place_of, prepared, restorable
from rrlhf.progress import in_words
from rrlhf.types import Dataset, Json

# "upstream": an input will run, and its result decides; "skip": left out of this run, and not up to date.
Action = Literal["run", "reuse", "restore", "upstream", "skip"]
EVERYTHING = Part()
Size = tuple[frozenset[tuple[str, Any]], int, str | None, str | None]


class Planned(NamedTuple):
    """One node of a run: what will happen to it, and the reasons in words."""

    node: str
    action: Action
    reasons: list[str]
    seconds: float | None  # what it took the last time, or one like it
    key: str | None = None  # unknown while an input is

    def as_json(self) -> Json:
        """Return it for scripts."""
        return {
            "node": self.node,
            "action": self.action,
            "reasons": [*self.reasons],
            "seconds": self.seconds,
            "key": self.key,
        }


class Found(NamedTuple):
    """A node's result that is there, or can be brought back without computing."""

    digest: str
    restored: str = ""  # where it has to be brought back from, in words
    accepted: str = ""  # why a result of other code stands for it


class Project:
    """A project folder's settings and results: finds the key of every node.

    graph, modules: another graph, and the package that its stages are modules of. takes_aliases: a run moves aliases.
    """

    def __init__(
        self,
        root: Path,
        profile: str,
        params: Params,
        *,
        graph: Sequence[Node] | None = None,
        modules: Modules | None = None,
        takes_aliases: bool = True,
    ) -> None:
        self.root, self.profile, self.params, self.takes_aliases = root, profile, params, takes_aliases
        self.store = Store(root, notary_of(root, params.signatures))
        self.nodes = nodes(params) if graph is None else [*graph]
        self.notes: list[str] = []
        self.modules = modules or our_modules(root / ".rrlhf" / "code.json")

    @classmethod
    def opened(
        cls, root: Path, profile: str, overrides: Mapping[str, Json] | None = None, *, take_aliases: bool = False
    ) -> Project:
        """Read the settings of a profile with overrides, whose runs leave aliases alone unless asked for them."""
        params = load_params(root, profile, overrides)
        return cls(root, profile, params, takes_aliases=take_aliases or not overrides)

    def aliases_of(self, node: Node) -> list[str]:
        """Return the aliases that a run gives to a node's model."""
        return aliases_of(node.arm, self.params.tracking.candidate) if self.takes_aliases else []

    def document(self, node: Node, digests: Mapping[str, str]) -> Document:
        """Return a node's key document, given the digest of every node that it reads."""
        inputs = {argument: digests[name] for argument, name in node.inputs.items()}
        return key_document(node, inputs | external_digests(node, self.store.memo), self.modules)

    def check_sources(self, *, fetch: bool = False) -> None:
        """Raise ParamsError when a base model, source data, a reward function or a key cannot be had or cannot be used.

        This comes before anything is computed, and tells every mistake. What a person should know of how the models are
        used is then in `notes`. fetch: whether models that lie on the hub alone are downloaded for it.
        """
        from rrlhf.pipeline.check import check_models
        from rrlhf.policy.reward_functions import load_functions

        paths = [path for node in self.nodes for path in node.functions]
        mistakes: list[str] = []
        for node in self.nodes:
            with collected(mistakes):
                external_digests(node, self.store.memo)
        needed: list[str] = []
        with collected(mistakes):
            needed = [name for function in load_functions(paths) for name in function.needs]
        with collected(mistakes):
            columns = self._columns(frozenset(needed), made=self.dataset() if not mistakes else None)
            if needed:
                load_functions(paths, columns)
        with collected(mistakes):
            if self.store.notary:
                self.store.notary.check()
        with collected(mistakes):
            found, self.notes = check_models(self.params, self.root, self.store.memo, fetch=fetch)
            mistakes += found
        if mistakes:
            raise ParamsError("\n".join(dict.fromkeys(mistakes)))

    def check_columns(self, made: Dataset | None) -> None:
        """Raise ParamsError where a reward function needs a column that a data set has not, now that it is made.

        Before that, those of a data set on the hub are not known.
        """
        from rrlhf.data.load import further_columns
        from rrlhf.policy.reward_functions import load_functions

        if made:
            load_functions((path for node in self.nodes for path in node.functions), further_columns(made.path))

    def _columns(self, wanted: frozenset[str], made: Dataset | None) -> Collection[str] | None:
        """Return the columns that the data has for reward functions; None where only the stage can tell.

        made: the data set, if it is there; else the source is read as far as its first good row and those that are
        wanted. Raises ParamsError when it has no good row.
        """
        from rrlhf.data.load import columns_to_hand_on, further_columns

        prepare = cast(Prepare, self.nodes[0].sections["prepare"])
        if prepare.source == "written":
            return ()
        if made:
            return further_columns(made.path)
        if is_hub_id(prepare.source):
            return None
        digest = source_digest(prepare, self.store.memo)
        try:
            return columns_to_hand_on(prepare.source, prepare.format, wanted, digest)
        except ValueError as error:
            raise ParamsError(f"prepare.source {error}") from None

    def check_keys(self, planned: Sequence[Planned] = ()) -> None:
        """Raise ParamsError when the keys of `signatures` cannot be used, or would refuse what is to be made."""
        if self.store.notary:
            self.store.notary.check()
            self.store.notary.check_making(one.node for one in planned if one.action == "run" and one.node != DATA)

    def place(self, document: Document) -> Place:
        """Return where the data set lies."""
        return place_of(self.root, self.profile, self.nodes[0], document)

    def plan(self, part: Part = EVERYTHING) -> list[Planned]:
        """Return what would happen to every node, in order.

        Raises ParamsError when a node that may run would read one that `part` leaves out and that is not up to date.
        """
        wanted = chosen(part, self.nodes)
        digests: dict[str, str] = {}
        planned: list[Planned] = []
        for node in self.nodes:
            missing = [name for name in node.inputs.values() if name not in digests]
            if missing:
                reasons = [f"after {', '.join(missing)}"]
                planned.append(Planned(node.name, "upstream", reasons, self._usual_seconds(node)))
            else:
                document = self.document(node, digests)
                making = [one for one in planned if one.action == "run" and one.node not in digests]
                same = [one.node for one in making if one.key == key_digest(document)]
                if same:
                    reasons = [f"the same as {same[0]}"]
                    planned.append(Planned(node.name, "upstream", reasons, None, key_digest(document)))
                else:
                    planned.append(self._planned(node, document, node.name in wanted.forced, digests))
            if node.name not in wanted.allowed and planned[-1].action in {"run", "upstream"}:
                planned[-1] = planned[-1]._replace(action="skip")
        self._check_part(planned, wanted)
        return planned

    def artifact(self, name: str) -> Artifact | None:
        """Return the checked result of a node under the present settings; None when a run would make it first."""
        digests = self.known_digests()
        node = next((node for node in self.nodes if node.name == name), None)
        if node is None or not set(node.inputs.values()) <= set(digests):
            return None
        return self.store.checked(node.stage, key_digest(self.document(node, digests)))

    def known_digests(self) -> dict[str, str]:
        """Return the digest of every node's result that is there or can be brought back."""
        digests: dict[str, str] = {}
        for node in self.nodes:
            if set(node.inputs.values()) <= set(digests):
                found = self.found(node, self.document(node, digests))
                digests |= {node.name: found.digest} if found else {}
        return digests

    def dataset(self) -> Dataset | None:
        """Return the data set of the present settings, checked, if it is there."""
        document = self.document(self.nodes[0], {})
        return prepared(self.root, self.place(document), document)

    def closest(self, node: Node, document: Document) -> tuple[list[str], Artifact | None]:
        """Return the differences to the most similar result that this node had before, and that result."""
        if node.name == DATA:
            known = [json.loads(path.read_bytes()) for path in (self.root / "data").glob(f"{self.profile}*.key.json")]
            return min((differences(old, document) for old in known), key=len, default=["never made here"]), None
        earlier = [
            (differences(old.manifest["document"], document), old) for old in self.earlier if old.name == node.name
        ]
        return min(earlier, key=lambda item: len(item[0]), default=(["never made here"], None))

    def _planned(self, node: Node, document: Document, forced: bool, digests: dict[str, str]) -> Planned:
        """Plan a node whose inputs are known; note the digest of its result in `digests`, in place, if it is known."""
        key, found = key_digest(document), self.found(node, document)
        if found:
            digests[node.name] = found.digest
        if forced:
            return Planned(node.name, "run", ["forced"], self._usual_seconds(node), key)
        if found is None:
            return Planned(node.name, "run", self.reasons(node, document, key), self._usual_seconds(node), key)
        if found.restored:
            return Planned(node.name, "restore", [f"artifact missing, {found.restored}"], None, key)
        return Planned(node.name, "reuse", [f"accepted: {found.accepted}"] if found.accepted else [], None, key)

    def found(self, node: Node, document: Document) -> Found | None:
        """Find a node's result, here (checked) or where it can be brought back from."""
        if node.name == DATA:
            place = self.place(document)
            if dataset := prepared(self.root, place, document):
                return Found(dataset.digest, accepted=(accepted_for(self.root, document) or {}).get("because", ""))
            dataset = restorable(self.root, place, document)
            return Found(dataset.digest, "in DVC's cache") if dataset else None
        key = key_digest(document)
        if artifact := self.store.checked(node.stage, key):
            return Found(artifact.digest, accepted=artifact.manifest.get("accepted", {}).get("because", ""))
        return self._registered(node, key)

    def _registered(self, node: Node, key: str) -> Found | None:
        from rrlhf.pipeline.tracking.registry import registrations

        known = registrations(self.root, self.params.tracking.experiment, [key])
        named = [(name, found) for (_, name), found in known.items() if name]
        if not named:
            return None
        name, found = max(named, key=lambda each: profile_of(each[0], node.stage) == self.profile)
        return Found(found.digest, f"registered as {name} v{found.version}")

    def reasons(self, node: Node, document: Document, key: str) -> list[str]:
        """Say why a node whose result is not there has to compute."""
        if self.store.was_here(key):
            return ["artifact missing"]
        return self.closest(node, document)[0] or ["artifact missing"]

    def _check_part(self, planned: Sequence[Planned], wanted: Chosen) -> None:
        """Raise ParamsError unless what may run finds its inputs."""
        skipped = {one.node: one for one in planned if one.action == "skip"}
        computing = {one.node for one in planned if one.action in {"run", "upstream"}}
        needed = [name for node in self.nodes if node.name in computing for name in node.inputs.values()]
        lines = [
            f"{name} is needed and not up to date ({_first(skipped[name].reasons)}), but not part of this run"
            for name in dict.fromkeys(needed)
            if name in skipped
        ]
        if lines:
            raise ParamsError("\n".join([*lines, "let it run first, or leave --from and --only out"]))

    def usual_start_up(self) -> float | None:
        """Return how long the profile's last run that computed took to start, where that is known."""
        found: float | None = (last_run(self.root, self.profile) or {}).get("start_up")
        return found

    @cached_property
    def earlier(self) -> list[Artifact]:
        """All results, newest first."""
        return sorted(self.store.all(), key=lambda artifact: str(artifact.manifest["created"]), reverse=True)

    def _usual_seconds(self, node: Node) -> float | None:
        """Return what a node took the last time, or another of its stage, if that was of the same size."""
        size = size_of(node, self.params.prepare)
        like = [old for old in self.earlier if old.stage == node.stage and size_of_made(old) == size]
        like.sort(key=lambda old: old.name != node.name)
        return float(like[0].manifest["seconds"]) if like else None


def size_of(node: Node, prepare: Prepare) -> Size:
    """Return what a node's duration depends on: its counts and names, how much it reads, and of which data.

    Rates and weights, which are numbers with a point, make nothing longer, and neither do seeds.
    """
    data = about(Dataset("", Path(), ""), prepare)
    return _counts(settings_here(node)), len(node.inputs), data["source"], data["limit"]


def size_of_made(made: Artifact) -> Size:
    """Return the same of a result."""
    document, data = made.manifest["document"], made.manifest["dataset"]
    read = {*document["inputs"]} - {*EXTERNAL}
    return _counts(document["params"]), len(read), data.get("source"), data.get("limit")


def _counts(settings: Mapping[str, Any], above: str = "") -> frozenset[tuple[str, Any]]:
    found: frozenset[tuple[str, Any]] = frozenset()
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _counts(value, f"{above}{name}.")
        elif not isinstance(value, float) and name != "seed":
            found |= {(f"{above}{name}", str(value))}
    return found


def computing(planned: Iterable[Planned]) -> list[Planned]:
    """Return what will compute, or may."""
    return [one for one in planned if one.action in {"run", "upstream"}]


def total(planned: Iterable[Planned], start_up: float | None = None) -> str:
    """Say how long a run would take, by the times of earlier ones; nothing when nothing computes.

    start_up: what starting a run took before the first stage, where that is known.
    """
    found = computing(planned)
    if not found:
        return ""
    surely, perhaps = ([one for one in found if one.action == action] for action in ("run", "upstream"))
    counted = f"{len(surely)} to run" + (f", up to {len(perhaps)} after them" if perhaps else "")
    known = [one.seconds for one in found if one.seconds is not None]
    at_least = "at least " if len(known) < len(found) else ""
    expected = sum(known) + (start_up or 0.0)
    return f"{counted}; {at_least}{in_words(expected)} by earlier runs" if known else counted


@contextmanager
def collected(mistakes: list[str]) -> Iterator[None]:
    """Note a mistake in the settings instead of raising it."""
    try:
        yield
    except ParamsError as error:
        mistakes.append(str(error))


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] if reasons else "unknown"
