"""What MLflow is told: tags that identify, settings, metrics, and a model's files with their description."""

from __future__ import annotations

import json
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rrlhf.pipeline.ancestry import short
from rrlhf.pipeline.artifacts import CARD, MANIFEST, SIGNATURE, Artifact
from rrlhf.pipeline.cards import code, title, what, without_front_matter
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import dotted
from rrlhf.pipeline.stages import spec_of
from rrlhf.pipeline.tracking.server import version_page
from rrlhf.types import Dataset

INSIDE = "artifact"  # folder of an artifact's files inside a logged model, next to MLflow's own MLmodel
MADE = "rrlhf.made"  # tag of a version: its stage, digest, inputs and commit, as JSON
MLMODEL = "rrlhf.mlmodel"  # tag of a logged model: the sha256 of the MLmodel that was written for it
METRICS_PER_CALL, PARAMS_PER_CALL, LETTERS_PER_TAG = 1000, 100, 8000  # MLflow's limits


def has(name: str, value: str) -> str:
    """Return the condition that a tag of ours has a value."""
    return f"tags.`rrlhf.{name}` = '{value}'"


def process_tags() -> dict[str, str]:
    """Return the tags by which a run tells whether its process still lives."""
    return {"rrlhf.host": socket.gethostname(), "rrlhf.pid": str(os.getpid())}


def stage_tags(name: str, stage: str, key: str) -> dict[str, str]:
    """Return the tags that say what a run or model is, by name and by key."""
    return {"rrlhf.node": name, "rrlhf.stage": stage, "rrlhf.key": key}


def commit_tags(commit: str | None) -> dict[str, str]:
    """Return the git commit as our tag and as MLflow's, which its pages turn into a link."""
    return {"rrlhf.git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")} if commit else {}


def version_tags(artifact: Artifact) -> dict[str, str]:
    """Return the tags of a registered version: what people and searches look for, and in one what lineage reads."""
    made = {
        "stage": artifact.stage,
        "digest": artifact.digest,
        "inputs": artifact.inputs,
        "input_keys": artifact.input_keys,
        "git_commit": artifact.manifest["git_commit"],
    }
    data = artifact.manifest["dataset"].get("name")
    return {
        "rrlhf.node": artifact.name,
        **({"rrlhf.data": data} if data else {}),
        "rrlhf.key": artifact.key,
        MADE: json.dumps(made),
    }


def made_from(artifact: Artifact, inputs: Mapping[str, Any], run: Any) -> str:
    """Say in Markdown what an artifact was made from, with links that work on MLflow's pages.

    inputs: the versions of the models that it read, as far as they are registered. run: that which made it; its page
    shows the data set.
    """
    links = [
        f"[{found.name} v{found.version}]({version_page('', f'{found.name}/{found.version}')[1:]})"
        for found in {(found.name, found.version): found for found in inputs.values()}.values()
    ]
    if digest := artifact.inputs.get(DATA):
        page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        name = artifact.manifest["dataset"].get("name", "")
        links.append(f"the data set [{name or short(digest)}]({page})")
    return f"Made from {', '.join(links)}." if links else ""


def description(artifact: Artifact, links: str) -> str:
    """Return what a list of versions says of one, in plain words: the list shows Markdown as it is written."""
    said = f"{title(artifact.manifest)}. {what(artifact.manifest)}"
    return "\n\n".join(filter(None, [said, links, f"Content {code(short(artifact.digest))}."]))


def note(artifact: Artifact, links: str) -> dict[str, str]:
    """Return an artifact's card as the tag that MLflow's pages of a run and of a logged model show as its description.

    What it was made from comes first. A card that is longer than a tag may be ends with where the rest is.
    """
    path = artifact.path / CARD
    if not path.is_file():
        return {}
    head, heading, rest = without_front_matter(path.read_text(encoding="utf-8")).partition("\n## ")
    text = f"{head}\n{links}\n{heading}{rest}" if links else f"{head}{heading}{rest}"
    if len(text) > LETTERS_PER_TAG:
        rest = f"\n\n(The rest is in {INSIDE}/{CARD}.)"
        text = text[: LETTERS_PER_TAG - len(rest)].rpartition("\n")[0] + rest
    return {"mlflow.note.content": text}


def to_metrics(row: Mapping[str, float], when: float) -> list[Any]:
    """Return a row as MLflow's metrics; `seconds` is what `when` says already."""
    from mlflow.entities import Metric

    step = int(row.get("step", 0))
    numbers = {name: value for name, value in row.items() if name not in {"step", "seconds"}}
    return [Metric(name, float(value), round(1000 * when), step) for name, value in numbers.items()]


def model_metrics(run: Any, dataset: Dataset | None, model_id: str) -> list[Any]:
    """Return a run's last numbers as those of its model, for MLflow's list of models.

    With the times at which the run has them: they are the same points to MLflow, not new ones.
    """
    from mlflow.entities import Metric

    about = (dataset.name, _short(dataset)) if dataset else (None, None)
    return [Metric(m.key, m.value, m.timestamp, m.step, model_id, *about) for m in run.data._metric_objs]


def write_metrics(client: Any, run_id: str, metrics: list[Any]) -> None:
    """Write metrics in as few calls as MLflow allows."""
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def write_params(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    """Write nested settings by their dotted names."""
    from mlflow.entities import Param

    params = [Param(name, value) for name, value in dotted(settings)]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])


def close_finished(client: Any, run_id: str, rows: int, ended: int) -> None:
    """Close a run that holds all its rows; their number is what tells it from an incomplete one."""
    client.set_tag(run_id, "rrlhf.rows", str(rows))
    client.set_terminated(run_id, "FINISHED", ended)


def model_id_of(registered: Any) -> str:  # mlflow.entities.model_registry.ModelVersion
    """Return the id of the logged model behind a registered version."""
    return str(registered.source).removeprefix("models:/")


def _short(dataset: Dataset) -> str:
    """Return the digest in the 36 characters that MLflow has for one."""
    return dataset.digest.removeprefix("md5:").removesuffix(".dir")[:36]


def dataset_input(dataset: Dataset) -> Any:  # mlflow.entities.DatasetInput
    """Return a data set as an input of a run in MLflow's own terms."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput

    source = json.dumps({"digest": dataset.digest, "name": dataset.name})
    return DatasetInput(Entity(dataset.name, _short(dataset), "dvc", source))


@contextmanager
def linked_files(artifact: Artifact, inside: str = ".") -> Iterator[Path]:
    """Yield a temporary folder of links to exactly the artifact's files: an upload follows them, nothing is copied.

    Its signature, where it has one, is among them.
    """
    with tempfile.TemporaryDirectory(prefix="rrlhf-upload-") as temporary:
        folder = Path(temporary)
        signature = [SIGNATURE] if (artifact.path / SIGNATURE).exists() else []
        for name in [MANIFEST, *artifact.manifest["files"], *signature]:
            link = folder / inside / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((artifact.path / name).resolve())
        yield folder


def write_mlmodel(folder: Path, model_id: str, run_id: str, stage: str) -> None:
    """Write MLflow's description of a model, which `mlflow.pyfunc.load_model` reads.

    By hand: MLflow's own writer imports all its flavors, for seconds, to write these lines.
    """
    flavor = {"loader_module": "rrlhf.loader", "data": INSIDE, "python_version": platform.python_version()}
    description = {
        "artifact_path": INSIDE,
        "flavors": {"python_function": flavor} if spec_of(stage).makes == "language model" else {},
        "mlflow_version": version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None)),
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(description), encoding="utf-8")
