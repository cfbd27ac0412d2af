"""A finished tiny project, in which every kind of file is changed: the audit and the next use both find it."""

import hashlib
import json
import os
import shutil
import sqlite3
import time
from contextlib import closing

import mlflow
import pytest
from finished import Finished, at_work

from rrlhf.config import Signatures
from rrlhf.judging.evaluation import read_evaluation
from rrlhf.memo import mark_of, sha256
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import CopyError, TamperedError, content_digest, sealed
from rrlhf.pipeline.signatures import Notary
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import NOTE, registrations
from rrlhf.tools.auditing.audit import Audit, as_text
from rrlhf.tools.lineage.lookup import Lookup, graph_of
from rrlhf.tools.running.uptodate import trainings_of, write_numbers
from rrlhf.tools.signing import written_pair

OVERRIDES = {"prepare.source": "rows.jsonl", "prepare.format": "rows"}
REGIONS = {"start": 0.0, "middle": 0.5, "end": 1.0}


class Audited(Finished):
    """A finished project that is looked at."""

    def audit(self, deep=True, model=None, notary=None):
        lookup = Lookup(self.root, "tiny", self.project.params)
        lookup.store = Store(self.root, notary)
        return Audit(lookup, deep=deep).run(lookup.product(model) if model else None)

    def use(self):
        """Look for results as every run does first; what a run would make again counts as found."""
        left = [node.node for node in self.project.plan() if node.action != "reuse"]
        graph_of(self.tracker.versions(), here=Store(self.root).products())
        return left


@pytest.fixture(scope="module")
def finished(shared_project, database):
    shutil.copy(database, shared_project)
    with at_work(shared_project):
        rows = [{"prompt": f"Say {i}.", "chosen": f"Here: {i}.", "rejected": f"Not {i}."} for i in range(60)]
        (shared_project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield Audited(shared_project, OVERRIDES)


def change(path, region):
    """Flip one bit in a region of a file; size and time stamps of content stay. Return how it was."""
    sound, stat = path.read_bytes(), path.stat()
    position = min(int(REGIONS[region] * len(sound)), len(sound) - 1)
    path.chmod(0o644)
    path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return sound


class Changes:
    """Changes a file at its start and at its end, one after the other, and puts it right again."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        for region in ("start", "end"):
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
DATA = [*(f"{table}.parquet" for table in TABLES), "summary.json", "rejected.jsonl"]


def test_a_finished_project_is_sound_and_has_no_other_kinds_of_files(finished):
    report = finished.audit()
    assert (report.broken, report.notes) == ([], [])
    assert {path.name for path in finished.root.glob("artifacts/*/*/*")} == {*PAYLOADS, *DATA}
    assert finished.use() == []


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_changed_region_of_an_artifact_is_found_by_audit_and_by_the_next_use(finished, name):
    path = one_of(finished.root, f"artifacts/*/*/{name}")
    for region in Changes(path):
        if region == "start":
            assert str(path) in finished.audit(deep=False).broken[0].problem
        else:
            with pytest.raises(TamperedError, match=f"{path.parent.name}/{path.name}"):
                finished.use()


@pytest.mark.parametrize("name", [*DATA[:-1], "history.jsonl", "artifact.json"])  # the last of DATA is empty
def test_a_changed_region_of_a_data_set_is_found_by_audit_and_by_the_next_use(finished, name):
    path = finished.data.path / name
    for region in Changes(path):
        if region == "start":
            first = finished.audit(deep=False).broken[0]
            assert str(path) in first.problem
            assert "rrlhf-tiny-sft v1" in "".join(first.downstream)
        else:
            with pytest.raises(TamperedError, match=name):
                finished.use()


def test_a_changed_region_of_dvcs_copy_is_found_by_the_audit(finished):
    path = one_of(finished.root, ".dvc/cache/files/md5/*/*[!r]")
    for _ in Changes(path):
        assert finished.audit().broken[0].problem.startswith("DVC's copy of")
    assert (finished.audit().broken, finished.audit().notes) == ([], [])


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
        away = sft.path.rename(finished.root / "away")
        try:
            with pytest.raises(CopyError, match=f"rrlhf-tiny-sft v1 in MLflow is not what was made: {name}"):
                finished.tracker.bring_back(Store(finished.root), "sft", sft.key)
        finally:
            away.rename(sft.path)


def test_a_changed_region_of_mlflows_description_of_a_model_is_found(finished):
    path = one_of(finished.root, "mlartifacts/models/*/artifacts/MLmodel")
    for _ in Changes(path):
        assert str(path) in finished.audit().broken[0].problem


def test_a_file_that_was_planted_beside_mlflows_copy_is_found(finished):
    planted = one_of(finished.root, "mlartifacts/models/*/artifacts/MLmodel").parent / "code.py"
    planted.write_text("")
    try:
        [found] = finished.audit().broken
        assert found.problem == f"MLflow's copy: {planted}: expected no such file"
        assert found.mend == "remove this copy, and `rrlhf run` keeps a new one"
    finally:
        planted.unlink()


def test_a_model_that_mlflow_has_loaded_is_sound(finished):
    uri = f"sqlite:///{finished.root / 'mlflow.db'}"
    mlflow.artifacts.download_artifacts("models:/rrlhf-tiny-policy/1", tracking_uri=uri)  # as `load_model` does
    assert finished.audit().broken == []


def test_nothing_that_mlflow_or_dvc_keeps_beside_the_files_is_run(finished, tmp_path):
    """MLmodel names a module to import, a .dvc file may have a command: neither counts when files are brought back."""
    mark = tmp_path / "fired"
    description = f"flavors: {{python_function: {{loader_module: !!python/object/apply:os.system ['touch {mark}']}}}}"
    models = {path: path.read_bytes() for path in finished.root.glob("mlartifacts/models/*/artifacts/MLmodel")}
    pointer, stages = dvc.pointer(finished.data.path), finished.root / "dvc.yaml"
    kept, declared = pointer.read_bytes(), stages.read_bytes()
    try:
        for path in models:
            path.write_text(description)
        pointer.write_bytes(kept + f"cmd: touch {mark}\n".encode())
        assert "extra keys not allowed @ data['cmd']" in dvc.fault(Store(finished.root), finished.data)
        pointer.write_bytes(kept)
        stages.write_text(f"stages: {{planted: {{cmd: touch {mark}, outs: [planted]}}}}\n")
        for name, bring in {"sft": finished.tracker.bring_back, "data": dvc.bring_back}.items():
            made = finished.artifacts[name]
            away = made.path.rename(finished.root / "away")
            back = bring(Store(finished.root), made.stage, made.key)
            assert back.digest == made.digest
            shutil.rmtree(away)
        assert not mark.exists()
    finally:
        for path, content in {**models, pointer: kept, stages: declared}.items():
            path.write_bytes(content)
    assert finished.audit().broken == []


def test_a_memo_that_was_edited_to_hide_a_change_is_seen_through_by_a_deep_audit_alone(finished):
    path, memo = finished.artifacts["sft"].path / "model.safetensors", finished.root / ".rrlhf" / "digests.json"
    sound = change(path, "middle")
    time.sleep(0.05)
    try:
        known = json.loads(memo.read_bytes()) | {
            str(path.resolve()): [*mark_of(path), hashlib.sha256(sound).hexdigest()]
        }
        memo.write_text(json.dumps(known))
        assert finished.use() == []
        assert finished.audit(deep=False).broken == []
        assert str(path) in finished.audit(deep=True).broken[0].problem
        assert finished.audit(deep=False).broken  # it knows the file now
    finally:
        path.write_bytes(sound)
    assert finished.audit(deep=False).broken == []


@pytest.mark.parametrize("note", ["{}", "[]", '{"of": 1, "registered": 2}', "[" * 99999])
def test_an_odd_note_of_what_is_registered_is_asked_anew(finished, note):
    sound = registrations(finished.root, "rrlhf")
    (finished.root / NOTE).write_text(note)
    assert registrations(finished.root, "rrlhf") == sound


def test_numbers_that_were_changed_where_git_keeps_them_are_found(finished):
    project = finished.project
    write_numbers(
        project, read_evaluation(finished.artifacts["evaluate"].path), trainings_of(project, finished.artifacts)
    )
    metrics = finished.root / "reports" / "tiny" / "metrics.json"
    try:
        assert finished.audit(deep=False).broken == []
        for _ in Changes(metrics):
            [found] = finished.audit(deep=False).broken
            assert found.problem.startswith(f"{metrics}: expected the numbers of the present results")
            assert found.mend == "`rrlhf run` writes it again"
    finally:
        shutil.rmtree(metrics.parent)


RUN_TAGS = ["rrlhf.node", "rrlhf.stage", "rrlhf.digest"]


@pytest.mark.parametrize(("table", "name"), [*(("tags", tag) for tag in RUN_TAGS), ("latest_metrics", "loss")])
def test_a_changed_tag_or_number_of_a_run_is_found_by_a_deep_audit(finished, table, name):
    [version] = [each for each in finished.tracker.versions() if each.name == "rrlhf-tiny-sft"]
    where = f"where key = '{name}' and run_uuid = '{version.run_id}'"
    with closing(sqlite3.connect(finished.root / "mlflow.db")) as database:
        [(sound,)] = database.execute(f"select value from {table} {where}").fetchall()
        for value in (sound[:-1] if isinstance(sound, str) else sound + 1, sound):
            database.execute(f"update {table} set value = ? {where}", (value,))
            database.commit()
            found = [
                each for each in finished.audit().broken if f"run {version.run_id}: {name}: expected" in each.problem
            ]
            assert bool(found) == (value != sound)


@pytest.mark.parametrize("tag", ["rrlhf.key", "rrlhf.digest"])
def test_a_changed_tag_of_mlflows_copy_is_found_by_a_deep_audit(finished, tag):
    [version] = [each for each in finished.tracker.versions() if each.name == "rrlhf-tiny-sft"]
    client, run_id = finished.tracker.models._client, version.run_id
    [model] = [
        each
        for each in client.search_logged_models([client.get_run(run_id).info.experiment_id])
        if each.source_run_id == run_id
    ]
    client.set_logged_model_tags(model.model_id, {tag: "0"})
    try:
        assert any("MLflow has no copy whose tags" in each.problem for each in finished.audit().broken)
    finally:
        client.set_logged_model_tags(model.model_id, {tag: model.tags[tag]})
    assert finished.audit().broken == []


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


@pytest.mark.parametrize("tag", ["rrlhf.made", "rrlhf.node", "rrlhf.data"])
def test_a_changed_tag_of_a_registered_version_is_found(finished, tag):
    with closing(sqlite3.connect(finished.root / "mlflow.db")) as database:
        where = f"where key = '{tag}' and name = 'rrlhf-tiny-reward'"
        [(sound,)] = database.execute(f"select value from model_version_tags {where}").fetchall()
        changed = sound.replace('"data": "', '"data": "0') if tag == "rrlhf.made" else sound[:-1]
        database.execute(f"update model_version_tags set value = ? {where}", (changed,))
        database.commit()
        try:
            assert any("rrlhf-tiny-reward/1 in MLflow" in each.problem for each in finished.audit(deep=False).broken)
        finally:
            database.execute(f"update model_version_tags set value = ? {where}", (sound,))
            database.commit()


def test_an_alias_that_no_decision_gave_or_whose_evidence_was_changed_is_found(finished):
    def found():
        return [each.problem for each in finished.audit(deep=False).broken]

    digest = finished.artifacts["ppo-single"].digest
    [version] = [each for each in finished.tracker.versions() if each.digest == digest]
    tracker, evidence = finished.tracker, {"to": "champion", "decision": "promoted", "digest": digest}
    finished.tracker.models.give(version.name, version.version, "champion")
    assert "alias champion: no decision gave it" in "".join(found())
    tracker.models.keep_decision(version, evidence, "promotion/champion.json", {})
    assert found() == []
    for _ in Changes(one_of(finished.root, "mlartifacts/**/promotion/champion.json")):
        assert "its evidence promotion/champion.json: expected sha256" in "".join(found())
    tracker.models.keep_decision(version, evidence | {"decision": "refused"}, "promotion/champion-2.json", {})
    assert "no decision gave it" in "".join(found())
    tracker.models.keep_decision(version, evidence, "promotion/champion-3.json", {})
    assert found() == []


def test_a_changed_result_whose_records_were_all_written_anew_is_found_by_its_registration(finished):
    path = finished.artifacts["ppo-single"].path
    sound = {file: file.read_bytes() for file in (path / "config.json", path / "artifact.json")}
    manifest = json.loads(sound[path / "artifact.json"])
    try:
        (path / "config.json").write_bytes(sound[path / "config.json"] + b" ")
        manifest["files"]["config.json"] = sha256(path / "config.json")
        manifest["digest"] = content_digest(manifest["files"])
        del manifest["seal"]
        (path / "artifact.json").write_text(sealed(manifest))
        assert "as registered, found" in finished.audit(deep=False).broken[0].problem
    finally:
        for file, content in sound.items():
            file.write_bytes(content)


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


def test_a_signature_that_is_missing_or_not_ours_is_a_broken_link_here_and_in_mlflow(finished, tmp_path):
    pytest.importorskip("model_signing")
    pairs = [written_pair(tmp_path / name) for name in ("ours", "other")]
    ours, other = (Notary(tmp_path, Signatures(private_key=str(a), public_key=str(b))) for a, b in pairs)
    artifacts, sft = finished.artifacts.values(), finished.artifacts["sft"]
    try:
        assert len(finished.audit(deep=False, notary=ours).broken) == len(artifacts)
        for artifact in artifacts:
            ours.sign(artifact.path)
        assert finished.audit(deep=False, notary=ours).broken == finished.audit().broken == []
        copies = finished.audit(notary=ours).broken
        assert len(copies) == len(artifacts)
        assert all("s copy" in each.problem and "found no file" in each.problem for each in copies)
        assert [made.name for made in artifacts if not finished.tracker.models.add_signature(made)] == ["data"]
        dvc.keep(finished.root, finished.data.path)
        assert finished.audit(notary=ours).broken == []
        other.sign(sft.path)
        first, *others = finished.audit(deep=False, notary=ours).broken
        assert f"{sft.path / 'model.sig'}: expected a signature by" in first.problem
        assert "Key mismatch" in first.problem
        assert "rrlhf-tiny-reward v1" in "".join(first.downstream)
        assert others == []
    finally:
        for path in (*finished.root.glob("artifacts/*/*/model.sig"), *finished.root.glob("mlartifacts/**/model.sig")):
            path.unlink()
    assert finished.use() == []
