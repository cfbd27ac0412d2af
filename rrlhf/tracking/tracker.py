"""The door to MLflow: what the flow tells it and asks it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.config import Params
from rrlhf.locks import locked
from rrlhf.stages import MODEL_NAMES, Node
from rrlhf.store.artifacts import MANIFEST, Artifact
from rrlhf.tracking.kept import Kept
from rrlhf.tracking.models import Models
from rrlhf.tracking.promotions import Promotions
from rrlhf.tracking.records import INSIDE, commit_tags, has, model_id_of, process_tags, stage_tags, version_tags
from rrlhf.tracking.runs import LiveRun, Runs, is_watched, write_told
from rrlhf.tracking.server import connect, errors, long_requests, pages_of, trouble, warn
from rrlhf.types import Dataset, Log


class Registered(NamedTuple):
    """A registered version, and whether this call made it."""

    name: str
    version: str
    created: bool


class Version(NamedTuple):
    """A registered version as MLflow tells it; the tags hold its identity and its inputs."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    created: int = 0  # milliseconds since 1970
    run_id: str = ""  # of the run that made it


class Tracker:
    """One experiment on one tracking server. Made by `connect`."""

    def __init__(self, root: Path, uri: str, experiment_id: str) -> None:
        from mlflow import MlflowClient

        self._root, self._uri = root, uri
        self._client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment_id = experiment_id
        self._runs, self._models = Runs(self._client, experiment_id), Models(self._client, experiment_id)

    @classmethod
    def connect(cls, root: Path, experiment: str) -> Tracker:
        """Open the server of MLFLOW_TRACKING_URI, or else `root`/mlflow.db; create what is missing.

        Raises TrackingError when the server does not answer, or refuses.
        """
        root = root.resolve()
        return cls(root, *connect(root, experiment))

    def start_flow(
        self, profile: str, params: Params, commit: str | None, *, name: str | None = None, parent: str | None = None
    ) -> str:
        """Open the run that the runs of the flow's stages belong to, and return its id.

        name: other than the profile's. parent: the run of a group that this one belongs to.
        """
        with trouble(self._uri):
            self._runs.close_dead()
            tags = process_tags() | {"rrlhf.profile": profile} | commit_tags(commit)
            return self._runs.new(name or profile, tags, params.model_dump(), parent=parent)

    def finish_flow(self, run_id: str, status: str) -> None:
        """Close a flow's run as FINISHED, FAILED or KILLED."""
        with trouble(self._uri):
            self._client.set_terminated(run_id, status)

    @contextmanager
    def stage_run(self, parent: str | None, node: Node, key: str, folder: Path | None = None) -> Iterator[Log]:
        """Open a run for a stage that computes into `folder`, and yield its log.

        A server that is away costs a little time and nothing else: rows wait for it, and `register` writes anew
        what never arrived. What a stage that failed left in its folder to tell of it is kept with the run.
        """
        tags = process_tags() | stage_tags(node.name, node.stage, key)
        run_id = None
        try:
            run_id = self._runs.new(node.name, tags, node.settings, parent=parent)
        except errors() as error:
            warn(node.name, error)
        live = LiveRun(self._client, run_id, node.name, is_watched(node.settings))
        status = "FAILED"
        try:
            yield live.log
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            live.finish(status, folder)

    def register(
        self,
        artifact: Artifact,
        dataset: Dataset | None,
        *,
        aliases: Iterable[str] = (),
        parent: str | None = None,
    ) -> Registered | None:
        """Make sure that the server knows an artifact: its run with every number, its version, links and aliases.

        What is there already stays; what a killed process left half done is finished. A stage without a model (the
        evaluation) gets its run and files only, and the answer is None. `parent` is where a missing run is put.
        """
        with locked(self._root / ".rrlhf" / "registering" / artifact.key), trouble(self._uri):
            run = self._runs.complete(artifact, parent)
            write_told(self._client, run.info.run_id, artifact.path)
            if artifact.stage not in MODEL_NAMES:
                self._models.keep_files(run, artifact, dataset)
                return None
            found = self._models.version_of(artifact)
            created = found is None
            if created:
                model_id = self._models.upload(artifact, run.info.run_id)
                found = self._models.new_version(artifact, model_id, run.info.run_id, version_tags(artifact, dataset))
            self._models.link(run, artifact, dataset, model_id_of(found))
            for alias in set(aliases) - set(found.aliases):
                self._client.set_registered_model_alias(found.name, alias, str(found.version))
            return Registered(found.name, str(found.version), created)

    def add_signature(self, artifact: Artifact) -> bool:
        """Put an artifact's signature beside the server's copy of its files; False when there is no copy."""
        with trouble(self._uri):
            return self.kept.add_signature(artifact)

    def restore(self, stage: str, key: str, to: Path) -> bool:
        """Download the artifact that was registered with this key into the new folder `to`; False if there is none."""
        from mlflow.artifacts import download_artifacts

        if stage not in MODEL_NAMES:
            return False
        with trouble(self._uri):
            found = self._models.search(f"name = '{MODEL_NAMES[stage]}' and {has('key', key)}")
            if not found:
                return False
            to.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=to.parent, prefix=".restoring-") as beside, long_requests():
                uri = f"models:/{found[0].name}/{found[0].version}/{INSIDE}"
                download_artifacts(artifact_uri=uri, dst_path=beside, tracking_uri=self._uri)
                (Path(beside) / INSIDE).rename(to)
            return True

    def versions(self) -> list[Version]:
        """Return every version that this project registered, newest first."""
        with trouble(self._uri):
            known = [found for found in self._models.search("") if "rrlhf.digest" in found.tags]
            aliases = self._models.aliases()
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
        from mlflow.artifacts import download_artifacts

        with trouble(self._uri), tempfile.TemporaryDirectory(prefix="rrlhf-manifest-") as beside:
            uri = f"models:/{version.name}/{version.version}/{INSIDE}/{MANIFEST}"
            path = download_artifacts(artifact_uri=uri, dst_path=beside, tracking_uri=self._uri)
            return Path(path).read_bytes()

    @property
    def kept(self) -> Kept:
        """What the server keeps of artifacts, for checking it."""
        return Kept(self._client, self._experiment_id)

    @contextmanager
    def promotions(self) -> Iterator[Promotions]:
        """Yield the decisions about versions that the server holds."""
        with trouble(self._uri):
            yield Promotions(self._client)

    def log_report(self, run_id: str, html: Path) -> str | None:
        """Keep a report with a run; return where MLflow's pages show it, None when no server of them is known."""
        with trouble(self._uri), long_requests():
            self._client.log_artifact(run_id, str(html))
        pages = pages_of(self._uri)
        return pages and f"{pages}/#/experiments/{self._experiment_id}/runs/{run_id}/artifacts/{html.name}"
