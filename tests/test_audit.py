"""A finished tiny project, in which every kind of file is changed: the audit and the next use both find it."""

import json
import os
import shutil
import sqlite3

import pytest

from rrlhf.artifacts import Store, TamperedError, clear
from rrlhf.audit import Audit, as_text
from rrlhf.config import load_params
from rrlhf.datasets import prepare_dataset
from rrlhf.environment import set_environment
from rrlhf.keys import key_digest
from rrlhf.launch import execute
from rrlhf.lineage import load
from rrlhf.plan import Project
from rrlhf.tracking import Tracker

OVERRIDES = {"prepare.source": "rows.jsonl", "prepare.format": "rows"}
REGIONS = {"start": 0.0, "middle": 0.5, "end": 1.0}


class Finished:
    """A project in which everything was made and registered, as by `rrlhf run`."""

    def __init__(self, root):
        self.root = root
        self.tracker = Tracker.connect(root, "rrlhf")
        self.artifacts = {}
        project = self.project
        data, *models = project.nodes
        document = project.document(data, {})
        self.data = prepare_dataset(root, project.place(document), document)
        for node in models:
            self._make(project, node)
            self.tracker.register(self.artifacts[node.name], self.data if "data" in node.inputs.values() else None)

    def _make(self, project, node):
        folders = {"data": self.data.path} | {name: made.path for name, made in self.artifacts.items()}
        digests = {"data": self.data.digest} | {name: made.digest for name, made in self.artifacts.items()}
        document = project.document(node, digests)
        staged = clear(project.store.staging(node.stage, key_digest(document)))
        inputs = {argument: folders[name] for argument, name in node.inputs.items()}
        execute(document, inputs=inputs, out=staged, log=lambda row: None, launch=project.params.launch)
        self.artifacts[node.name] = project.store.publish(node.name, document, staged, seconds=1.0)

    @property
    def project(self):
        return Project(self.root, "tiny", load_params(self.root, "tiny", OVERRIDES))

    def audit(self, deep=True, model=None):
        versions = self.tracker.versions()
        graph = load(self.root, versions, strict=False)
        return Audit(self.root, graph, versions, self.tracker, deep=deep).run(graph.find(model) if model else None)

    def use(self):
        """Look for results as every run does first; what a run would make again counts as found."""
        left = [node.node for node in self.project.plan() if node.action != "reuse"]
        load(self.root, self.tracker.versions())
        return left


@pytest.fixture(scope="module")
def finished(shared_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared_project)
        patch.setenv("PATH", "")  # restored afterwards: set_environment changes it
        set_environment(shared_project)
        rows = [{"prompt": f"Say {i}.", "chosen": f"Here: {i}.", "rejected": f"Not {i}."} for i in range(60)]
        (shared_project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield Finished(shared_project)


def change(path, region):
    """Flip one bit in a region of a file; size and time stamps of content stay. Return how it was."""
    sound, stat = path.read_bytes(), path.stat()
    position = min(int(REGIONS[region] * len(sound)), len(sound) - 1)
    path.chmod(0o644)
    path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return sound


class Changes:
    """Changes a file in each of its regions, one after the other, and puts it right again."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        for region in REGIONS:
            sound = change(self.path, region)
            try:
                yield region
            finally:
                self.path.write_bytes(sound)


def one_of(root, pattern):
    """Return a file that is not empty; so much of the project is made of links that all are the same to us."""
    found = [path for path in sorted(root.glob(pattern)) if path.is_file() and path.stat().st_size]
    assert found, pattern
    return found[0]


def names(finished, pattern):
    return [each for each in finished.audit(deep=True).broken if pattern in each.problem]


PAYLOADS = [
    "model.safetensors",
    "heads.safetensors",
    "features.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "arm.json",
    "health.json",
    "samples.json",
    "trunk.json",
    "heads.json",
    "README.md",
    "rollouts.parquet",
    "candidates.parquet",
    "evaluation.json",
    "history.jsonl",
    "artifact.json",
]
TABLES = ["sft", "preferences", "ppo", "heldout", "evaluate", "rows"]


def test_a_finished_project_is_sound_and_has_no_other_kinds_of_files(finished):
    report = finished.audit()
    assert (report.broken, report.notes) == ([], [])
    assert {path.name for path in finished.root.glob("artifacts/*/*/*")} == set(PAYLOADS)
    assert report.files > 100
    assert finished.use() == []


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_changed_region_of_an_artifact_is_found_by_audit_and_by_the_next_use(finished, name):
    path = one_of(finished.root, f"artifacts/*/*/{name}")
    for region in Changes(path):
        first = finished.audit(deep=region == "start").broken[0]
        assert str(path) in first.problem
        with pytest.raises(TamperedError, match=f"{path.parent.name}/{path.name}"):
            finished.use()
    assert finished.use() == []


@pytest.mark.parametrize("name", [*(f"{table}.parquet" for table in TABLES), "summary.json"])
def test_a_changed_region_of_a_data_set_is_found_by_audit_and_by_the_next_use(finished, name):
    path = finished.data.path / name
    for _ in Changes(path):
        first = finished.audit(deep=False).broken[0]
        assert str(path) in first.problem
        assert "rrlhf-sft v1" in "".join(first.downstream)
        with pytest.raises(TamperedError, match=name):
            finished.use()
    assert finished.use() == []


def test_a_changed_region_of_dvcs_lock_is_found_by_audit_and_by_the_next_use(finished):
    path = one_of(finished.root, "data/variants/*/dvc.lock")
    for _ in Changes(path):
        assert str(path) in finished.audit(deep=False).broken[0].problem
        with pytest.raises(TamperedError, match=r"dvc\.lock was changed"):
            finished.use()
    assert finished.use() == []


def test_every_byte_of_dvcs_lock_counts(finished):
    path = one_of(finished.root, "data/variants/*/dvc.lock")
    sound = path.read_bytes()
    unseen = []
    try:
        for position in range(0, len(sound), 23):
            path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            try:
                if finished.project.dataset() is not None:
                    unseen.append(position)
            except TamperedError:
                pass
    finally:
        path.write_bytes(sound)
    assert unseen == []


@pytest.mark.parametrize("name", ["data/keys/*.json", "data/*.key.json", "data/variants/*/dvc.yaml"])
def test_a_changed_region_of_what_makes_data_is_found_by_the_audit_and_never_trusted(finished, name):
    path = one_of(finished.root, name)
    for _ in Changes(path):
        assert str(path) in finished.audit(deep=False).broken[0].problem
        if "keys" in name:
            with pytest.raises(TamperedError, match="expected md5"):
                finished.use()
        else:
            assert finished.use() == []  # written anew before DVC reads it
    assert finished.use() == []


@pytest.mark.parametrize("name", ["files/md5/*/*[!r]", "files/md5/*/*.dir", "runs/*/*/*"])
def test_a_changed_region_of_dvcs_cache_is_found_by_the_audit_and_never_brought_back(finished, name):
    path = one_of(finished.root, f".dvc/cache/{name}")
    document = finished.project.document(finished.project.nodes[0], {})
    place = finished.project.place(document)
    away = finished.root / "away"
    for _ in Changes(path):
        assert str(path) in finished.audit().broken[0].problem
        place.data.rename(away)
        try:
            with pytest.raises(TamperedError, match=path.name):
                prepare_dataset(finished.root, place, document)
        finally:
            away.rename(place.data)
    assert finished.use() == []


@pytest.mark.parametrize("name", ["model.safetensors", "artifact.json", "history.jsonl"])
def test_a_changed_region_of_mlflows_copy_is_found_by_the_audit_and_never_brought_back(finished, name):
    sft = finished.artifacts["sft"]
    path = next(
        p
        for p in finished.root.glob(f"mlartifacts/models/*/artifacts/artifact/{name}")
        if f'"digest": "{sft.digest}"' in (p.parent / "artifact.json").read_text()
    )
    for _ in Changes(path):
        assert str(path) in finished.audit().broken[0].problem
        to = finished.root / "restored"
        assert finished.tracker.restore("sft", sft.key, to)
        try:
            with pytest.raises(TamperedError, match=name):
                Store(finished.root).adopt("sft", sft.key, to)
        finally:
            shutil.rmtree(to)


def test_a_changed_region_of_mlflows_description_of_a_model_is_found(finished):
    path = one_of(finished.root, "mlartifacts/models/*/artifacts/MLmodel")
    for _ in Changes(path):
        assert str(path) in finished.audit().broken[0].problem


def test_a_changed_memo_of_digests_does_no_harm(finished):
    for _ in Changes(finished.root / ".rrlhf" / "digests.json"):
        assert finished.use() == []
        assert finished.audit(deep=False).broken == []


def test_a_planted_file_is_found_by_audit_and_by_the_next_use(finished):
    planted = finished.artifacts["sft"].path / "model.safetensors.index.json"
    planted.write_text("{}")
    try:
        assert str(planted) in finished.audit(deep=False).broken[0].problem
        with pytest.raises(TamperedError, match="expected no such file"):
            finished.use()
    finally:
        planted.unlink()


@pytest.mark.parametrize("tag", ["rrlhf.inputs", "rrlhf.params", "rrlhf.node", "rrlhf.dataset"])
def test_a_changed_tag_of_a_registered_version_is_found(finished, tag):
    with sqlite3.connect(finished.root / "mlflow.db") as database:
        where = f"where key = '{tag}' and name = 'rrlhf-reward'"
        [(sound,)] = database.execute(f"select value from model_version_tags {where}").fetchall()
        changed = sound.replace("a", "b") if tag == "rrlhf.inputs" else sound[:-1]
        database.execute(f"update model_version_tags set value = ? {where}", (changed,))
        database.commit()
        try:
            assert any("rrlhf-reward/1 in MLflow" in each.problem for each in finished.audit(deep=False).broken)
        finally:
            database.execute(f"update model_version_tags set value = ? {where}", (sound,))
            database.commit()


def test_the_first_broken_link_comes_first_and_all_downstream_is_named(finished):
    reward, sft = (finished.artifacts[name].path / "artifact.json" for name in ("reward", "sft"))
    sound = {path: change(path, "middle") for path in (reward, sft)}
    try:
        report = finished.audit(deep=False)
        first = report.broken[0]
        assert str(sft) in first.problem
        told = "".join(first.downstream)
        assert all(
            name in told for name in ("reward", "ensemble", "ppo-single", "ppo-robust", "dpo-direct", "evaluate")
        )
        assert [each for each in report.broken[1:] if str(reward) in each.problem]
        assert f"first broken link: {sft}" in as_text(report)
        above = finished.audit(deep=False, model="reward")
        assert len(above.broken) == 2
    finally:
        for path, content in sound.items():
            path.write_bytes(content)


def test_an_audit_of_a_model_looks_at_what_is_above_it_alone(finished):
    path = finished.artifacts["ppo-robust"].path / "model.safetensors"
    sound = change(path, "end")
    try:
        assert finished.audit(model="ensemble", deep=False).broken == []
        assert len(finished.audit(model="ppo-robust", deep=False).broken) == 1
    finally:
        path.write_bytes(sound)


def test_a_lost_input_is_a_broken_link(finished):
    folder, away = finished.artifacts["best_of_n-choosy"].path, finished.root / "away"
    folder.rename(away)
    try:
        report = finished.audit(deep=True)  # registered, so it can be brought back
        assert report.broken == []
        assert "would bring them back" in report.notes[0]
    finally:
        away.rename(folder)
