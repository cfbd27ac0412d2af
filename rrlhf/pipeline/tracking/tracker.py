"""The door to MLflow: what the flow tells it and asks it, and a note of what it has registered."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.files import write
from rrlhf.locks import locked
from rrlhf.memo import TICK, mark_of
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, CopyError
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.stages import model_name, spec_of
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.models import INSIDE, MADE, Models, every, model_id_of
from rrlhf.pipeline.tracking.runs import SECONDS_TO_CLOSE, LiveRun, Runs, commit_tags, has, stage_tags
from rrlhf.pipeline.tracking.server import address, connect, database, mlflow_pages, trouble
from rrlhf.types import Dataset, Json

NOTE = Path(".rrlhf", "registered.json")


class Registered(NamedTuple):
    """A registered version, and whether this call made it."""

    name: str
    version: str
    created: bool
    moved: tuple[str, ...] = ()  # aliases that it was given, in words: "candidate: v2 -> v5"


class Version(NamedTuple):
    """A registered version as MLflow tells it; the tags hold its identity and its inputs."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    created: int = 0  # milliseconds since 1970
    run_id: str = ""  # of the run that made it

    @property
    def digest(self) -> str:
        """Of its content."""
        return str(self.made["digest"])

    @property
    def key(self) -> str:
        """Of its making."""
        return self.tags["rrlhf.key"]

    @property
    def made(self) -> dict[str, Any]:
        """Its stage and digest, the digests and keys of its inputs, and the git commit."""
        found: dict[str, Any] = json.loads(self.tags[MADE])
        return found


class Registration(NamedTuple):
    """What is registered under a key and a name."""

    key: str
    name: str  # of the model; "" where only a run is kept (the evaluation)
    version: str  # "" for such a run
    digest: str
    aliases: list[str]
    complete: bool  # its run holds everything and is linked to what it read


Registrations = dict[tuple[str, str], Registration]  # by key and name


class Tracker:
    """One experiment on one tracking server."""

    def __init__(self, root: Path, experiment: str) -> None:
        """Open the server of MLFLOW_TRACKING_URI, or else `root`/mlflow.db; create what is missing.

        Raises AwayError when the server does not answer, TrackingError when it refuses.
        """
        self._root, self._experiment = root.resolve(), experiment
        self._client, self._experiment_id = connect(self._root, experiment)
        self._runs = Runs(self._client, self._experiment_id)
        self.models = Models(self._client, self._experiment_id)
        self._open: set[str] = set()  # runs of flows
        self._live: dict[str, LiveRun] = {}  # by key: of stages whose end the server may not know yet

    def start_flow(
        self, profile: str, settings: Mapping[str, Json], commit: str | None, *, name: str, parent: str | None = None
    ) -> str:
        """Open the run that the runs of the flow's stages belong to, and return its id.

        parent: the run of a group that this one belongs to.
        """
        self._runs.close_dead()
        tags = {"rrlhf.profile": profile} | commit_tags(commit)
        run_id = self._runs.new(name, tags, settings, parent=parent)
        self._open.add(run_id)
        return run_id

    def knows(self, run_id: str) -> bool:
        """Whether the server has this run."""
        return bool(self._client.search_runs([self._experiment_id], f"attributes.run_id = '{run_id}'"))

    def finish_flow(self, run_id: str, status: str) -> None:
        """Close a flow's run as FINISHED, FAILED or KILLED; after the last one, note what is registered."""
        self._client.set_terminated(run_id, status)
        self._open.discard(run_id)
        if not self._open and database(self._root):
            take_note(self._root, self._experiment)

    @contextmanager
    def stage_run(self, parent: str | None, node: Node, key: str, folder: Path, published: Path) -> Iterator[None]:
        """Have a run for a stage that computes into `folder` meanwhile, which is then `published`, with what it logs.

        A server that is away costs a moment at the end and nothing else: `register` writes what never arrived. What a
        stage that failed left in its folder to tell of it is kept with the run.
        """
        tags = stage_tags(node.name, node.stage, key)

        def begun(started: int) -> str:
            return self._runs.new(node.name, tags, node.settings, parent=parent, started=started)

        live = self._live[key] = LiveRun(self._client, begun, node.name, folder, "health" in node.settings)
        live.start()
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            left = folder if folder.is_dir() else published
            live.finish(status, left, None if database(self._root) else SECONDS_TO_CLOSE)

    def register(
        self,
        artifact: Artifact,
        dataset: Dataset | None,
        *,
        profile: str,
        aliases: Iterable[str] = (),
        parent: str | None = None,
    ) -> Registered | None:
        """Make sure that the server knows an artifact: its run with every number, its version, links and aliases.

        The version is under the profile's name; files that another profile registered are not kept twice. What is
        there already stays; what a killed process left half done is finished. A stage without a model (the
        evaluation) gets its run and files only, and the answer is None. `parent` is where a missing run is put.
        """
        if live := self._live.get(artifact.key):
            live.join()  # a server that is slow may be told of the stage's end at this moment
        with locked(self._root / ".rrlhf" / "registry.lock"):
            run = self._runs.complete(artifact, parent)
            if not spec_of(artifact.stage).model:
                self.models.keep_files(run, artifact)
                self.models.link(run, artifact, dataset)
                return None
            name = model_name(artifact.stage, profile)
            found = self.models.version_of(artifact, name)
            created = found is None
            if created:
                found = self.models.new_version(artifact, name, run.info.run_id)
            self.models.link(run, artifact, dataset, model_id_of(found))
            given = sorted(set(aliases) - set(found.aliases))
            moved = [self.models.give(name, str(found.version), alias) for alias in given]
            return Registered(name, str(found.version), created, tuple(moved))

    def registrations(self) -> list[Registration]:
        """Return everything that is registered; of several versions of one key and name, the newest."""
        condition = "attributes.status = 'FINISHED' and tags.`rrlhf.digest` != ''"
        search = partial(self._client.search_runs, [self._experiment_id], condition)
        tags = [run.data.tags for run in every(search)]
        complete = {(each["rrlhf.key"], each["rrlhf.digest"]): each["rrlhf.stage"] for each in tags}
        found = [
            Registration(key, "", "", digest, [], True)
            for (key, digest), stage in complete.items()
            if not spec_of(stage).model
        ]
        for one in reversed(self.versions()):
            is_complete = (one.key, one.digest) in complete
            found.append(Registration(one.key, one.name, one.version, one.digest, [*one.aliases], is_complete))
        return found

    def bring_back(self, store: Store, stage: str, key: str) -> Artifact | None:
        """Return the artifact with this key from the store; where it is not there, from its registered copy, or None.

        Raises CopyError, naming version and file, when that copy is not what was made.
        """
        found = None if store.find(stage, key) else self._registered(key)
        if found is None:
            return store.checked(stage, key)

        def download(staged: Path) -> Path:
            if not self._client.list_logged_model_artifacts(model_id_of(found), INSIDE):
                raise CopyError("its files are gone")
            return self._download(found, INSIDE, staged)

        return store.restore(stage, key, download, f"{found.name} v{found.version} in MLflow")

    def _registered(self, key: str) -> Any:  # mlflow.entities.model_registry.ModelVersion | None
        return next(iter(self.models.search(has("key", key))), None)

    def versions(self) -> list[Version]:
        """Return every version that this project registered, newest first."""
        known, aliases = self.models.search(), self.models.aliases()
        return [
            Version(
                found.name,
                str(found.version),
                aliases.get((found.name, str(found.version)), ()),
                dict(found.tags),
                found.creation_timestamp,
                str(found.run_id or ""),
            )
            for found in known
        ]

    def manifest(self, version: Version) -> bytes:
        """Return the artifact.json that was kept with a version."""
        with tempfile.TemporaryDirectory(prefix="rrlhf-manifest-") as beside:
            return self._download(version, f"{INSIDE}/{MANIFEST}", Path(beside)).read_bytes()

    def _download(self, version: Any, name: str, to: Path) -> Path:
        """Download a file or a folder of a version into the folder `to`, and return it."""
        from mlflow.artifacts import download_artifacts

        uri = f"models:/{version.name}/{version.version}/{name}"
        with trouble(self._client.uri):
            return Path(download_artifacts(artifact_uri=uri, dst_path=str(to), tracking_uri=self._client.uri))

    def log_report(self, run_id: str, html: Path) -> str | None:
        """Keep a report with a run; return where MLflow's pages show it, None when no server of them is known."""
        self._client.log_artifact(run_id, str(html))
        pages = mlflow_pages(self._root)
        return pages and f"{pages}/#/experiments/{self._experiment_id}/runs/{run_id}/artifacts/{html.name}"


def registrations(root: Path, experiment: str) -> Registrations:
    """Return everything that is registered, as a plan and a run with nothing to do ask.

    Asking takes the seconds of MLflow's import, so it is noted what MLflow told. The note holds as long as the database
    is the very file that was asked; a server is asked every time. Raises TrackingError when it cannot be told.
    """
    file = database(root)
    if file and not file.exists():
        return {}
    noted = _noted(root, experiment)
    found = take_note(root, experiment) if noted is None else noted
    return {(one.key, one.name): one for one in found}


def take_note(root: Path, experiment: str) -> list[Registration]:
    """Ask MLflow for everything that is registered, and note it."""
    time.sleep(2 * TICK / 1e9)  # then what is written from now on has another time
    of = _of(root, experiment)
    found = Tracker(root, experiment).registrations()
    if of:
        write(root / NOTE, json.dumps({"of": of, "registered": found}))
    return found


def _noted(root: Path, experiment: str) -> list[Registration] | None:
    """Return what is noted; None when it was of another database, or of this one as it was before."""
    try:
        note = json.loads((root / NOTE).read_bytes())
        return [Registration(*one) for one in note["registered"]] if note["of"] == _of(root, experiment) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _of(root: Path, experiment: str) -> list[Any] | None:
    """Return what a note is of; None for a server, which does not tell when it was written to."""
    file = database(root)
    mark = mark_of(file) if file and file.exists() else None
    return [address(root), experiment, mark] if mark else None
