"""What a run would do, and why, without starting it: no Prefect, torch or MLflow is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rrlhf.config import Params
from rrlhf.located import ParamsError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.decide import Action, Chosen, Facts, Part, chosen, decide
from rrlhf.pipeline.graph import DATA, Node, nodes
from rrlhf.pipeline.keys import Document, differences, external_digests, key_digest, key_document, our_modules
from rrlhf.pipeline.modules import Modules
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.shared import shared
from rrlhf.pipeline.signatures import notary_of
from rrlhf.pipeline.stages import aliases_of, profile_of
from rrlhf.pipeline.store import Store
from rrlhf.progress import in_words, say
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.pipeline.tracking.tracker import Registrations

EVERYTHING = Part()


class Planned(NamedTuple):
    """One node of a run: what will happen to it, and the reasons in words."""

    node: str
    action: Action
    reasons: list[str]
    seconds: float | None  # what it took the last time, or one like it
    key: str | None = None  # unknown while an input is
    digest: str | None = None  # of its result, where there is one, here or elsewhere
    size: int = 0  # bytes of that, or of the one before


class Project:
    """A project folder's settings and results: finds the key of every node.

    graph, modules: another graph, and the package that its stages are modules of. takes_aliases: a run moves aliases.
    as_filed: the graph is that of the files, without overrides.
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
        as_filed: bool = True,
    ) -> None:
        self.root, self.profile, self.params = root, profile, params
        self.takes_aliases, self.as_filed = takes_aliases, as_filed
        self.store, self.shared = Store(root, notary_of(root, params.signatures)), shared()
        self.nodes = nodes(params) if graph is None else [*graph]
        self.notes: list[str] = []
        self.modules = modules or our_modules()

    def __reduce__(self) -> tuple[Any, ...]:  # to a cluster's worker, which has locks and caches of its own
        made = partial(Project, graph=self.nodes, takes_aliases=self.takes_aliases, as_filed=self.as_filed)
        return made, (self.root, self.profile, self.params)

    @classmethod
    def opened(
        cls, root: Path, profile: str, overrides: Mapping[str, Json] | None = None, *, take_aliases: bool = False
    ) -> Project:
        """Read the settings of a profile with overrides, whose runs leave aliases alone unless asked for them."""
        params = load_params(root, profile, overrides)
        as_filed = not overrides or nodes(load_params(root, profile)) == nodes(params)
        return cls(root, profile, params, takes_aliases=take_aliases or not overrides, as_filed=as_filed)

    def aliases_of(self, node: Node) -> list[str]:
        """Return the aliases that a run gives to a node's model."""
        return aliases_of(node.arm, self.params.tracking.candidate) if self.takes_aliases else []

    def document(self, node: Node, digests: Mapping[str, str]) -> Document:
        """Return a node's key document, given the digest of every node that it reads."""
        inputs = {argument: digests[name] for argument, name in node.inputs.items()}
        return key_document(node, inputs | external_digests(node, self.store.memo), self.modules)

    def check_keys(self, planned: Sequence[Planned] = ()) -> None:
        """Raise ParamsError when the keys of `signatures` cannot be used, or would refuse what is to be made."""
        if self.store.notary:
            self.store.notary.check()
            self.store.notary.check_making(one.node for one in planned if one.action == "run")

    def plan(self, part: Part = EVERYTHING) -> list[Planned]:
        """Return what would happen to every node, in order.

        Raises ParamsError when a node that may run would read one that `part` leaves out and that is not up to date.
        """
        wanted = chosen(part, self.nodes)
        planned: list[Planned] = []
        for node in self.nodes:
            digests = {one.node: one.digest for one in planned if one.digest}
            making = {one.key: one.node for one in planned if one.action == "run" and one.key and not one.digest}
            one = self.decide(node, digests, wanted, making)
            times = one.action not in {"reuse", "restore"} and one.key not in making
            before = self._before(node) if times else None
            planned.append(one._replace(seconds=float(before.manifest["seconds"]), size=before.size) if before else one)
        self._check_part(planned)
        return planned

    def decide(
        self, node: Node, digests: Mapping[str, str], wanted: Chosen, making: Mapping[str, str] | None = None
    ) -> Planned:
        """Decide what becomes of a node, given the digests of the results that there are.

        making: the nodes that the same run computes before it, by key.
        """
        missing = [name for name in node.inputs.values() if name not in digests]
        key = digest = None
        known: dict[str, Any] = {}  # of the result; nothing is asked that needs not be
        if not missing:
            document = self.document(node, digests)
            key = key_digest(document)
            if here := self.store.checked(node.stage, key):
                digest, known = here.digest, {"here": True, "accepted": here.accepted}
            elif twin := (making or {}).get(key):
                known = {"twin": twin}
            elif found := self._elsewhere(node, key):
                digest, known = found[0], {"elsewhere": found[1]}
            else:
                nearest = [] if self.store.was_here(key) else self.closest(node, document)[0]
                known = {"lacking": nearest or ["artifact missing"]}
        allowed, forced = node.name in wanted.allowed, node.name in wanted.forced
        return Planned(node.name, *decide(Facts(allowed, forced, missing, **known)), None, key, digest)

    def _elsewhere(self, node: Node, key: str) -> tuple[str, str] | None:
        """Return the digest of a result that is not here and can be brought back, and where from, in words."""
        if self.shared and (made := self.shared.kept(node.stage, key)):
            return made.digest, "in the shared store"
        if node.name == DATA:
            made = dvc.kept(self.store, node.stage, key)
            return (made.digest, "kept by DVC") if made else None
        named = [(name, found) for (its_key, name), found in self._registered.items() if its_key == key and name]
        if not named:
            return None
        name, found = max(named, key=lambda each: profile_of(each[0], node.stage) == self.profile)
        return found.digest, f"registered as {name} v{found.version}"

    @cached_property
    def _registered(self) -> Registrations:
        """What is registered, asked once: a run's own models need not be brought back."""
        from rrlhf.pipeline.tracking.server import AwayError
        from rrlhf.pipeline.tracking.tracker import registrations

        try:
            return registrations(self.root, self.params.tracking.experiment)
        except AwayError as error:
            say(f"{error}\nwhat it alone has is made again")
            return {}

    def artifact(self, name: str) -> Artifact | None:
        """Return the checked result of a node under the present settings; None when a run would make it first."""
        planned = {one.node: one for one in self.plan()}
        node = next((node for node in self.nodes if node.name == name), None)
        return self.store.find(node.stage, key) if node and (key := planned[name].key) else None

    def data(self) -> Artifact | None:
        """Return the checked data set of the present settings, if it is here."""
        node = self.nodes[0]
        return self.store.checked(node.stage, key_digest(self.document(node, {})))

    def closest(self, node: Node, document: Document) -> tuple[list[str], Artifact | None]:
        """Return the differences to the most similar result that this node had before, and that result."""
        earlier = [
            (differences(old.manifest["document"], document), old) for old in self.earlier if old.name == node.name
        ]
        from rrlhf.pipeline.accept import former_data

        never = "never made here"
        if node.name == DATA and any(former_data(self.root)):
            never += " by this version, which keeps data sets in artifacts/: `rrlhf accept` takes over that in data/"
        return min(earlier, key=lambda item: len(item[0]), default=([never], None))

    def _check_part(self, planned: Sequence[Planned]) -> None:
        """Raise ParamsError unless what may run finds its inputs."""
        skipped = {one.node: one for one in planned if one.action == "skip"}
        computing = {one.node for one in planned if one.action in {"run", "upstream"}}
        needed = [name for node in self.nodes if node.name in computing for name in node.inputs.values()]
        lines = [
            f"{name} is needed and not up to date ({skipped[name].reasons[0]}), but not part of this run"
            for name in dict.fromkeys(needed)
            if name in skipped
        ]
        if lines:
            raise ParamsError("\n".join([*lines, "let it run first, or leave --from and --only out"]))

    @cached_property
    def earlier(self) -> list[Artifact]:
        """All results, newest first."""
        return sorted(self.store.all(), key=lambda artifact: str(artifact.manifest["created"]), reverse=True)

    def _before(self, node: Node) -> Artifact | None:
        """Return the last result of a node of this profile, or of another of its stage: the next is like it."""
        like = [old for old in self.earlier if old.stage == node.stage and old.dataset.name == self.profile]
        like.sort(key=lambda old: old.name != node.name)
        return like[0] if like else None


def computing(planned: Iterable[Planned]) -> list[Planned]:
    """Return what will compute, or may."""
    return [one for one in planned if one.action in {"run", "upstream"}]


def room(planned: Iterable[Planned]) -> int:
    """Return how many bytes a run will write, by the results of earlier ones; MLflow or DVC keeps each again."""
    return 2 * sum(one.size for one in computing(planned))


def total(planned: Iterable[Planned]) -> str:
    """Say how long a run would take, by the times of earlier ones; nothing when nothing computes."""
    found = computing(planned)
    if not found:
        return ""
    surely, perhaps = ([one for one in found if one.action == action] for action in ("run", "upstream"))
    counted = f"{len(surely)} to run" + (f", up to {len(perhaps)} after them" if perhaps else "")
    known = [one.seconds for one in found if one.seconds is not None]
    at_least = "at least " if len(known) < len(found) else ""
    return f"{counted}; {at_least}{in_words(sum(known))} by earlier runs" if known else counted
