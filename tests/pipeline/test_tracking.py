"""The tracking server is a real MLflow database; artifacts are published by the real store."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from rrlhf.files import clear
from rrlhf.pipeline.artifacts import CARD, HISTORY, Artifact, CopyError, TamperedError
from rrlhf.pipeline.cards import without_front_matter
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.produce import produce
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking import server
from rrlhf.pipeline.tracking.runs import SECONDS_TO_CLOSE, LiveRun, stage_tags, to_metrics
from rrlhf.pipeline.tracking.server import AwayError, TrackingError, relocate
from rrlhf.pipeline.tracking.tracker import Registration, Tracker, registrations
from rrlhf.policy.health import DivergedError
from rrlhf.tools.auditing.audit import Audit
from rrlhf.tools.lineage.lookup import Lookup, graph_of
from rrlhf.tools.lineage.text import line as in_a_line
from rrlhf.tools.lineage.text import tree
from rrlhf.types import Dataset

PROJECT = Path(__file__).parents[2]
PARAMS = load_params(PROJECT)
SETTINGS = PARAMS.model_dump()
NODES = {node.name: node for node in nodes(PARAMS)}
DATA = Dataset("default", Path("data/default"), "md5:d41d8cd98f00b204e9800998ecf8427e.dir")
ROWS = [{"step": step, "loss": 1 / step, "seconds": 0.5 * step} for step in (1, 2, 3)]


@pytest.fixture
def root(tmp_path, database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def tracker(root):
    return Tracker(root, "rrlhf")


@pytest.fixture
def client(root, tracker):
    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}", registry_uri=f"sqlite:///{root / 'mlflow.db'}")


def document(name, inputs):
    node = NODES[name]
    return {"stage": node.stage, "params": node.settings, "inputs": inputs, "code": {}, "numerics": {}}


def published(root, name, inputs, fill=None, rows=ROWS):
    """Publish a small artifact of a node. inputs: artifacts, or digests of what is none."""
    keys = {argument: made.key for argument, made in inputs.items() if isinstance(made, Artifact)}
    digests = {argument: getattr(made, "digest", made) for argument, made in inputs.items()}
    store, paper = Store(root), document(name, digests)
    staged = clear(store.staging(NODES[name].stage, key_digest(paper)))
    (staged / "weights").mkdir()
    (staged / "weights" / "model.safetensors").write_bytes(name.encode())
    if fill:
        fill(staged)
    (staged / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return store.publish(name, paper, staged, seconds=2.0, dataset={"name": "default"}, input_keys=keys)


@pytest.fixture
def family(root):
    """Return an artifact of each model stage, linked as in a run."""
    data = {"data": DATA.digest}
    sft = published(root, "sft", data)
    reward = published(root, "reward", {**data, "sft": sft})
    ensemble = published(root, "ensemble", {"reward": reward})
    parts = {"sft": sft, "reward": reward, "ensemble": ensemble}
    return [sft, reward, ensemble, published(root, "ppo-robust", {**data, **parts})]


def register_all(tracker, family):
    return [
        tracker.register(artifact, DATA if "data" in artifact.inputs else None, profile="default")
        for artifact in family
    ]


def history(client, run_id, name="loss"):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def stage_runs(client, key):
    experiment = client.get_experiment_by_name("rrlhf").experiment_id
    return client.search_runs([experiment], f"tags.`rrlhf.key` = '{key}'")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_registering_twice_makes_one_version(tracker, family):
    first = tracker.register(family[0], DATA, aliases=["best"], profile="default")
    assert first == ("rrlhf-sft", "1", True, ("rrlhf-sft@best: v1",))
    assert tracker.register(family[0], DATA, aliases=["best"], profile="default") == ("rrlhf-sft", "1", False, ())
    assert [found.aliases for found in tracker.versions()] == [("best",)]


def test_profiles_have_names_and_aliases_of_their_own_and_share_files(root, tracker, client, family):
    sft, reward = family[:2]
    for profile in ("default", "tiny"):
        tracker.register(sft, DATA, profile=profile, aliases=["candidate"])
        tracker.register(reward, DATA, profile=profile)
    other = published(root, "sft", {"data": "md5:00000000000000000000000000000000.dir"})
    moved = tracker.register(other, None, profile="tiny", aliases=["candidate"]).moved
    assert moved == ("rrlhf-tiny-sft@candidate: v1 -> v2",)
    found = {f"{each.name}/{each.version}": each for each in tracker.versions()}
    assert set(found) == {
        "rrlhf-sft/1",
        "rrlhf-tiny-sft/1",
        "rrlhf-tiny-sft/2",
        "rrlhf-reward/1",
        "rrlhf-tiny-reward/1",
    }
    assert {name for name, each in found.items() if each.aliases} == {"rrlhf-sft/1", "rrlhf-tiny-sft/2"}
    assert found["rrlhf-sft/1"].key == found["rrlhf-tiny-sft/1"].key == sft.key
    assert len(list((root / "mlartifacts" / "models").iterdir())) == 3
    one, two = (client.get_model_version(name, "1") for name in ("rrlhf-sft", "rrlhf-tiny-sft"))
    assert one.source == two.source
    graph = graph_of(tracker.versions())
    assert graph.find("sft", "tiny").key == other.key
    assert graph.find("sft").key == sft.key
    with pytest.raises(ValueError, match="profile hh has no reward yet; name another with --profile: default, tiny"):
        graph.find("reward", "hh")


def test_versions_tell_their_identity_and_ancestry(tracker, family):
    register_all(tracker, family)
    versions, policy = tracker.versions(), family[3]
    [version] = [version for version in versions if version.name == "rrlhf-policy"]
    assert set(version.tags) == {"rrlhf.node", "rrlhf.data", "rrlhf.key", "rrlhf.made"}
    assert (version.digest, version.key, version.made["stage"]) == (policy.digest, policy.key, "ppo")
    assert (version.tags["rrlhf.node"], version.tags["rrlhf.data"]) == ("ppo-robust", "default")
    assert (version.made["inputs"], version.made["input_keys"]) == (policy.inputs, policy.input_keys)
    graph = graph_of(versions)
    drawn = tree(graph, graph.find("rrlhf-policy/1"))
    assert drawn.count("data default md5:d41d8cd9") == 3  # of the policy, of reward and of sft
    assert drawn.count("(see above)") == 2


def test_mlflow_shows_what_a_run_read_and_made(tracker, client, family):
    register_all(tracker, family)
    models = {found.name: found.source.removeprefix("models:/") for found in client.search_model_versions()}
    run = client.get_run(client.get_model_version("rrlhf-policy", "1").run_id)
    read = {entry.model_id for entry in run.inputs.model_inputs}
    assert read == {models["rrlhf-sft"], models["rrlhf-reward"], models["rrlhf-ensemble"]}
    assert [entry.model_id for entry in run.outputs.model_outputs] == [models["rrlhf-policy"]]
    [entry] = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("default", "d41d8cd98f00b204e9800998ecf8427e")
    [loss] = [metric for metric in client.get_logged_model(models["rrlhf-policy"]).metrics if metric.key == "loss"]
    assert (loss.step, loss.value) == (3, 1 / 3)


def test_links_wait_for_inputs_that_come_later(tracker, client, family):
    sft, reward = family[:2]
    tracker.register(reward, DATA, profile="default")
    register_all(tracker, [sft, reward])
    [run] = stage_runs(client, reward.key)
    assert len(client.get_run(run.info.run_id).inputs.model_inputs) == 1


def test_a_wiped_database_is_filled_again(root, tracker, database, family):
    before = register_all(tracker, family)
    digests = {found.digest for found in tracker.versions()}
    wiped = root / "again"
    wiped.mkdir()
    shutil.copy(database, wiped / "mlflow.db")
    fresh = Tracker(wiped, "rrlhf")
    assert register_all(fresh, family) == before
    assert {found.digest for found in fresh.versions()} == digests


def test_what_is_registered_is_noted_until_the_database_is_written_to(root, tracker, client, family, monkeypatch):
    register_all(tracker, family)
    evaluation = published(root, "evaluate", {"data": DATA.digest, "sft": family[0]})
    tracker.register(evaluation, DATA, profile="default")
    found = registrations(root, "rrlhf")
    sft = Registration(family[0].key, "rrlhf-sft", "1", family[0].digest, [], True)
    assert (found[sft.key, sft.name], len(found)) == (sft, 5)
    assert found[evaluation.key, ""].digest == evaluation.digest
    asked = []
    monkeypatch.setattr("rrlhf.pipeline.tracking.tracker.Tracker", lambda *_: asked.append(1) or tracker)
    assert registrations(root, "rrlhf") == found
    assert not asked
    client.set_registered_model_alias("rrlhf-sft", "best", "1")
    assert registrations(root, "rrlhf")[sft.key, sft.name].aliases == ["best"]
    assert asked
    (root / "mlflow.db").unlink()
    assert registrations(root, "rrlhf") == {}


def test_a_run_that_is_missing_is_written_from_the_history(tracker, client, family):
    tracker.register(family[0], DATA, profile="default")
    [run] = stage_runs(client, family[0].key)
    assert history(client, run.info.run_id) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 2000  # as long as the stage took
    assert run.data.params["sft.batch_size"] == str(PARAMS.sft.batch_size)


def log(folder, *rows):
    """Log rows as a stage does that computes into a folder."""
    with (folder / HISTORY).open("a", encoding="utf-8") as handle:
        handle.writelines(f"{json.dumps(row)}\n" for row in rows)


def test_a_run_that_was_written_live_is_not_written_again(tracker, client, family, tmp_path):
    sft = family[0]
    flow = tracker.start_flow("default", SETTINGS, "0123abc-dirty", name="default")
    with tracker.stage_run(flow, NODES["sft"], sft.key, tmp_path, tmp_path):
        log(tmp_path, *ROWS)
    tracker.register(sft, DATA, profile="default", parent=flow)
    tracker.finish_flow(flow, "FINISHED")
    [run] = stage_runs(client, sft.key)
    assert [step for step, _ in history(client, run.info.run_id)] == [1, 2, 3]
    assert run.data.tags["mlflow.parentRunId"] == flow
    assert client.get_run(flow).data.params["arms.robust.nominal_weight"] == "0.4"


@pytest.mark.parametrize(("rows", "status"), [(ROWS, "FINISHED"), ([], "FAILED")])
def test_a_run_is_finished_once_the_result_is_published(root, tracker, client, rows, status):
    def compute(staged, _):
        staged.mkdir(parents=True)
        if rows:  # without a log nothing can be published
            log(staged, *rows)

    def recorded(staged):
        return tracker.stage_run(None, NODES["sft"], key, staged, store.folder("sft", key))

    store, key = Store(root), key_digest(document("sft", {}))
    with suppress(FileNotFoundError):
        produce(store, "sft", document("sft", {}), compute, recorded=recorded)
    [run] = stage_runs(client, key)
    assert (run.info.status, run.info.status == "FINISHED") == (status, store.find("sft", key) is not None)
    assert history(client, run.info.run_id) == [(row["step"], row["loss"]) for row in rows]


def test_a_run_that_the_server_lost_in_its_middle_is_finished_and_no_row_written_twice(tracker, client, family):
    flow = tracker.start_flow("default", SETTINGS, None, name="default")
    run_id = tracker._runs.new("sft", stage_tags("sft", "sft", family[0].key), {}, parent=flow)
    started = client.get_run(run_id).info.start_time
    client.log_batch(run_id, [metric for row in ROWS[:2] for metric in to_metrics(row, started)])
    tracker.register(family[0], DATA, profile="default", parent=flow)
    [run] = stage_runs(client, family[0].key)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert history(client, run_id) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.params["sft.batch_size"] == str(PARAMS.sft.batch_size)


def test_the_run_of_an_interrupted_stage_is_not_taken_for_that_of_the_next(tracker, client, family):
    tracker._runs.new("sft", stage_tags("sft", "sft", family[0].key), {}, parent="another flow")
    tracker.register(family[0], DATA, profile="default", parent="this flow")
    assert {run.info.status for run in stage_runs(client, family[0].key)} == {"FINISHED", "RUNNING"}


def test_a_stage_that_fails_leaves_a_failed_run_with_its_numbers(tracker, client, tmp_path):
    def fail():
        with tracker.stage_run(None, NODES["sft"], "k" * 64, tmp_path, tmp_path):
            log(tmp_path, {"step": 1, "loss": math.nan})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    [run] = stage_runs(client, "k" * 64)
    assert run.info.status == "FAILED"
    assert math.isnan(history(client, run.info.run_id)[0][1])


FELL = [{"step": step, "kl": 1.0} | ({"health_kl_blowup": 1.0} if step in {2, 3} else {}) for step in range(5)]


def test_a_policys_run_is_tagged_with_its_health(tracker, client, tmp_path):
    for number, (rows, tag) in enumerate(
        [
            (FELL[:2], "healthy"),
            (FELL, "kl_blowup (steps 2, 3)"),
            ([*FELL, {"step": 5, "health_nonfinite": 1.0}], "kl_blowup (steps 2, 3), nonfinite (step 5)"),
        ]
    ):
        folder = clear(tmp_path / str(number))
        with tracker.stage_run(None, NODES["ppo-robust"], str(number), folder, folder):
            log(folder, *rows)
        [run] = stage_runs(client, str(number))
        assert run.data.tags["rrlhf.health"] == tag


SAMPLE = {"update": 0, "row": 3, "prompt": "Say a.", "response": "a", "finished": True, "kl": None, "proxy": 0.2}
SAMPLE |= {"heads": [0.1, None]}


def test_a_training_that_diverged_leaves_its_events_and_texts(tracker, client, tmp_path):
    written = [SAMPLE]
    (tmp_path / "health.json").write_text('[{"step": 4}]')
    (tmp_path / "samples.json").write_text(json.dumps(written))

    def diverge():
        with tracker.stage_run(None, NODES["ppo-robust"], "k" * 64, tmp_path, tmp_path):
            log(tmp_path, *FELL, {"step": 5, "health_kl_blowup": 1.0, "diverged": 1.0})
            raise DivergedError

    with pytest.raises(DivergedError):
        diverge()
    [run] = stage_runs(client, "k" * 64)
    assert (run.info.status, run.data.tags["rrlhf.health"]) == ("FAILED", "DIVERGED: kl_blowup (steps 2, 3, 5)")
    told = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_bytes())
    assert [dict(zip(told["columns"], row, strict=True)) for row in told["data"]] == written
    assert "samples.json" in run.data.tags["mlflow.loggedArtifacts"]  # MLflow's pages then show a table


def test_a_stage_that_fails_otherwise_is_not_called_healthy(tracker, client, tmp_path):
    def fail():
        with tracker.stage_run(None, NODES["ppo-robust"], "k" * 64, tmp_path, tmp_path):
            log(tmp_path, FELL[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "rrlhf.health" not in stage_runs(client, "k" * 64)[0].data.tags


def test_a_run_that_is_written_from_the_history_has_its_health_and_texts(root, tracker, client):
    def fill(staged):
        (staged / "health.json").write_text("[]")
        (staged / "samples.json").write_text(json.dumps([SAMPLE]))

    policy = published(root, "ppo-robust", {"data": DATA.digest}, fill=fill)
    for _ in range(2):  # registering again adds nothing
        tracker.register(policy, DATA, profile="default")
    [run] = stage_runs(client, policy.key)
    assert run.data.tags["rrlhf.health"] == "healthy"
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"health.json", "samples.json"}
    told = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_bytes())
    assert told["data"] == [[*SAMPLE.values()]]


def test_an_evaluation_keeps_its_files_and_makes_no_version(root, tracker, client, family):
    evaluation = published(root, "evaluate", {"data": DATA.digest, "sft": family[0]})
    tracker.register(family[0], DATA, profile="default")
    assert [tracker.register(evaluation, DATA, profile="default") for _ in range(2)] == [None, None]
    [run] = stage_runs(client, evaluation.key)
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"artifact.json", HISTORY, "weights"}
    assert len(client.get_run(run.info.run_id).inputs.model_inputs) == 1


def test_a_restored_artifact_is_the_same_to_the_byte(root, tracker, family):
    sft, before = family[0], files(family[0].path)
    tracker.register(sft, DATA, profile="default")
    shutil.rmtree(sft.path)
    assert tracker.bring_back(Store(root), "sft", sft.key) == sft
    assert files(sft.path) == before


def spoiled(copy, how):
    if how == "gone":
        shutil.rmtree(copy)
    elif how == "changed":
        (copy / "weights" / "model.safetensors").write_bytes(b"sfu")
    elif how == "missing":
        (copy / "weights" / "model.safetensors").unlink()
    elif how == "planted":
        (copy / "model.py").write_text("import this")
    else:
        (copy / "artifact.json").write_bytes(Path(how).read_bytes())


def test_a_registered_copy_that_is_not_what_was_registered_is_named_and_not_taken(root, tracker, family):
    sft = family[0]
    tracker.register(sft, DATA, profile="default")
    shutil.rmtree(sft.path)
    [copy] = (root / "mlartifacts" / "models").glob("*/artifacts/artifact")
    sound = shutil.copytree(copy, root / "sound")
    for how, said in {
        "gone": "its files are gone",
        "changed": "weights/model.safetensors: expected sha256",
        "missing": "weights/model.safetensors: expected sha256",
        "planted": "model.py: expected no such file",
        str(family[1].path / "artifact.json"): "artifact.json is that of another key",
    }.items():
        spoiled(copy, how)
        for _ in range(2):  # it stays like that
            with pytest.raises(CopyError, match="rrlhf-sft v1 in MLflow is not what was made: ") as caught:
                tracker.bring_back(Store(root), "sft", sft.key)
            assert said in str(caught.value)
            assert ".staging" not in str(caught.value)
        assert not sft.path.exists()
        assert not list((root / "artifacts" / ".staging").iterdir())
        with pytest.raises(CopyError, match="`rrlhf run` with the settings that it was made with makes it again"):
            Lookup(root, "default", PARAMS).find("rrlhf-sft/1")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)


def test_what_was_never_registered_cannot_be_restored(root, tracker):
    assert tracker.bring_back(Store(root), "sft", "0" * 64) is None
    assert not (root / "artifacts").exists()


KILLED_WHILE_COPYING = """
import resource, signal, sys
from pathlib import Path
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process when a file grows past the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))
root = Path(sys.argv[1])
[artifact] = Store(root).all()
Tracker(root, "rrlhf").register(artifact, None, profile="default")
"""


def big_file(staged):
    (staged / "big.safetensors").write_bytes(bytes(30_000_000))


def test_a_killed_registration_is_finished_by_the_next(root, tracker, client):
    artifact = published(root, "sft", {"data": DATA.digest}, fill=big_file)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_COPYING, str(root)])
    assert done.returncode == -signal.SIGXFSZ
    [begun] = (root / "mlartifacts" / "models").iterdir()
    assert (begun / "artifacts" / "artifact" / "big.safetensors").stat().st_size < 30_000_000
    assert client.search_model_versions() == []
    assert tracker.register(artifact, DATA, profile="default").created
    assert [found.status for found in client.search_model_versions()] == ["READY"]
    assert list((root / "mlartifacts" / "models").iterdir()) == [begun]
    before = files(artifact.path)
    shutil.rmtree(artifact.path)
    assert files(tracker.bring_back(Store(root), "sft", artifact.key).path) == before


def test_workers_that_start_together_share_a_new_database_and_make_one_version(root):
    (root / "mlflow.db").unlink()
    artifact = published(root, "sft", {"data": DATA.digest})

    def work(_):
        return Tracker(root, "rrlhf").register(artifact, DATA, profile="default")

    with ThreadPoolExecutor(3) as workers:
        made = list(workers.map(work, range(3)))
    assert {registered.version for registered in made} == {"1"}
    assert sum(registered.created for registered in made) == 1


def test_a_flow_closes_the_runs_of_killed_processes(tracker, client):
    dead = tracker.start_flow("default", SETTINGS, None, name="default")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    client.set_tag(dead, "rrlhf.pid", str(gone.pid))
    alive = tracker.start_flow("default", SETTINGS, None, name="default")
    tracker.start_flow("default", SETTINGS, None, name="default")
    assert [client.get_run(run).info.status for run in (dead, alive)] == ["KILLED", "RUNNING"]


def test_a_moved_folder_is_refused_before_anything_is_written_to_the_old_one(root, tracker, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(root / "mlflow.db", moved)
    with pytest.raises(TrackingError, match=r"moved or copied: run `rrlhf relocate`.*mlartifacts$"):
        Tracker(moved, "rrlhf")


AFTER_A_MOVE = """
import json, shutil, sys
from pathlib import Path
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker
root = Path(sys.argv[1])
tracker, store = Tracker(root, "rrlhf"), Store(root)
faults = [tracker.models.alias_fault(v, alias) for v in tracker.versions() for alias in v.aliases]
artifacts = list(store.all())
for artifact in artifacts:
    shutil.rmtree(artifact.path)
    assert tracker.bring_back(store, artifact.stage, artifact.key) == artifact
made = [tracker.register(artifact, None, profile="default").created for artifact in artifacts]
print(json.dumps([[list(v) for v in tracker.versions()], faults, made]))
"""


def test_a_moved_folder_is_relocated_with_versions_aliases_and_evidence(root, tracker, family):
    policy = register_all(tracker, family)[3]
    evidence = {"to": "champion", "decision": "promoted", "digest": family[3].digest}
    tracker.models.keep_decision(policy, evidence, "promotion/champion.json", {})
    tracker.models.give(policy.name, policy.version, "champion")
    told = json.loads(json.dumps(tracker.versions()))
    moved = root.rename(root.parent / f"{root.name} moved")
    assert "places in mlflow.db now lie in" in relocate(moved)
    assert "names the files beside it already" in relocate(moved)
    command = [sys.executable, "-c", AFTER_A_MOVE, str(moved)]  # MLflow remembers places in one process
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    versions, faults, made = json.loads(done.stdout)
    assert sorted(versions) == sorted(told)
    assert faults == [None]
    assert made == [False] * len(family)
    [backup] = moved.glob("mlflow.db.before-relocate*")
    assert f"{root}/mlartifacts".encode() in backup.read_bytes()
    with closing(sqlite3.connect(moved / "mlflow.db")) as database:
        assert not [line for line in database.iterdump() if f"{root}/mlartifacts" in line]


def test_a_database_without_its_files_is_not_relocated(root, tracker, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(root / "mlflow.db", alone)
    before = (alone / "mlflow.db").read_bytes()
    with pytest.raises(TrackingError, match=r"mlartifacts is not here: copy .*mlartifacts beside mlflow\.db"):
        relocate(alone)
    assert (alone / "mlflow.db").read_bytes() == before
    assert [path.name for path in alone.iterdir()] == ["mlflow.db"]


def test_a_damaged_database_is_reported_at_once(root):
    (root / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TrackingError, match="not a database; remove it"):
        Tracker(root, "rrlhf")


def test_a_server_that_is_down_is_reported_soon(root, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    start = time.monotonic()
    with pytest.raises(AwayError, match="start the server again") as caught:
        Tracker(root, "rrlhf")
    assert time.monotonic() - start < 10
    assert "secret" not in str(caught.value)


def test_a_server_that_hangs_is_given_up_and_costs_a_stage_two_seconds(root, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "SECONDS_TO_ANSWER", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(AwayError, match=r"failed: .*Read timed out\. \(read timeout=1\)"):
            Tracker(root, "rrlhf")
        with pytest.raises(AwayError, match="did not answer a moment ago"):
            Tracker(root, "rrlhf")
        assert time.monotonic() - start < 8
        server._ask_again.clear()
        client = server.Client(server.address(root))
        live = LiveRun(client, lambda began: client.create_run("0", began), "sft", tmp_path, False)
        live.start()
        start = time.monotonic()
        live.finish("FINISHED", tmp_path, SECONDS_TO_CLOSE)
        assert time.monotonic() - start < SECONDS_TO_CLOSE + 0.5


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class Refusing(Quiet):
    def do_GET(self):
        self.send_error(401)


class Forbidding(Quiet):
    def do_GET(self):
        self.send_error(403)


class Slow(Quiet):
    def do_GET(self):
        time.sleep(3)
        self.send_error(404)


@pytest.fixture
def serving(monkeypatch):
    """Have a handler answer at the tracking server's address."""
    with ExitStack() as stack:

        def start(handler):
            served = stack.enter_context(HTTPServer(("127.0.0.1", 0), handler))
            Thread(target=served.serve_forever, daemon=True).start()
            stack.callback(served.shutdown)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{served.server_port}")

        yield start


@pytest.mark.parametrize("handler", [Refusing, Forbidding])
def test_a_server_that_refuses_names_the_way_in_and_is_not_taken_for_one_that_is_away(root, serving, handler):
    serving(handler)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_TOKEN") as caught:
        Tracker(root, "rrlhf")
    assert not isinstance(caught.value, AwayError)


def test_a_server_that_takes_three_seconds_is_not_away(root, serving):
    serving(Slow)
    server.check_answer(server.address(root))


def tiny_policy(staged):
    """Save a random Llama with a tokenizer of single characters, as a stage would."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rrlhf.models.load import LanguageModel, save_model
    from rrlhf.models.templates import CHAT_TEMPLATE

    characters = ["<unk>", "</s>", *(chr(code) for code in range(32, 127))]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(characters), eos_token_id=1, bos_token_id=None, **sizes))
    save_model(LanguageModel(network, tokenizer), staged)


@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")  # mlflow, about its own types
def test_a_registered_policy_loads_by_its_alias_and_answers(root, tracker):
    import mlflow

    policy = published(root, "ppo-robust", {"data": DATA.digest}, fill=tiny_policy)
    tracker.register(policy, DATA, aliases=["candidate"], profile="default")
    loaded = mlflow.pyfunc.load_model("models:/rrlhf-policy@candidate")
    answers = loaded.predict(["Write a note.", "Write a poem."])
    assert len(answers) == 2
    assert all(isinstance(answer, str) and answer for answer in answers)
    assert answers == loaded.predict(["Write a note.", "Write a poem."])


def test_a_registered_policy_loads_as_its_card_says(root, tracker, monkeypatch):
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM

    policy = published(root, "ppo-robust", {"data": DATA.digest}, fill=tiny_policy)
    tracker.register(policy, DATA, aliases=["robust"], profile="default")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    monkeypatch.chdir(root)
    said = re.search(r"```python\n(.*?)```", (policy.path / CARD).read_text(), re.DOTALL)
    names = {}
    exec(said[1], names)
    from_mlflow = {"mlflow": mlflow}
    exec(said[1].replace("# folder = ", "folder = ").replace('VERSION"', '1"'), from_mlflow)
    by_number = Path(mlflow.artifacts.download_artifacts("models:/rrlhf-policy/1")) / "artifact"
    own = AutoModelForCausalLM.from_pretrained(policy.path).state_dict()
    for other in (names["model"], from_mlflow["model"], AutoModelForCausalLM.from_pretrained(by_number)):
        assert own.keys() == other.state_dict().keys()
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in own.items())
    assert names["tokenizer"].decode(names["tokenizer"]("A note.")["input_ids"]).replace(" ", "") == "Anote."
    assert files(by_number) == files(policy.path)


def test_mlflow_shows_the_card_with_version_run_and_model(tracker, client, family):
    register_all(tracker, family)
    version, card = client.get_model_version("rrlhf-policy", "1"), (family[3].path / CARD).read_text()
    run, model = client.get_run(version.run_id), client.get_logged_model(version.source.removeprefix("models:/"))
    said = "Policy robust, by PPO. The SFT model after PPO on the reward `robust, nominal_weight 0.4, credible 8`."
    assert version.description == said
    assert run.data.tags["mlflow.note.content"] == without_front_matter(card)
    assert model.tags["mlflow.note.content"] == without_front_matter(card)


def test_a_card_too_long_for_mlflow_ends_with_where_the_rest_is(root, tracker, client):
    long = [{"step": 1, **{f"head_{n}": float(n) for n in range(300)}}]
    sft = published(root, "sft", {"data": DATA.digest}, rows=long)
    tracker.register(sft, DATA, profile="default")
    shown = client.get_run(client.get_model_version("rrlhf-sft", "1").run_id).data.tags["mlflow.note.content"]
    assert 7900 < len(shown) <= 8000
    assert re.search(r"\| `head_\d+` \| \d+ \| – \|\n\n\(The rest is in artifact/README.md.\)$", shown)


@st.composite
def relations(draw):
    """Draw SFT models of different data, and reward models and policies on them; of few contents: many are twins."""
    contents, few = st.integers(0, 1), st.integers(1, 2)
    sfts = [draw(contents) for _ in range(draw(few) + 1)]
    rewards = [(draw(st.sampled_from(range(len(sfts)))), draw(contents)) for _ in range(draw(few))]
    policies = [
        (draw(st.sampled_from(range(len(sfts)))), draw(st.sampled_from(range(len(rewards)))), draw(contents))
        for _ in range(draw(few))
    ]
    return sfts, rewards, policies


def made_of(root, drawn):
    """Publish what was drawn; return artifacts by key, in order, and of each the keys that it was made from."""
    made, read = {}, {}

    def make(name, inputs, content):
        def fill(staged):
            (staged / "weights" / "model.safetensors").write_bytes(f"{name} {content}".encode())

        digests = {argument: getattr(each, "digest", each) for argument, each in inputs.items()}
        key = key_digest(document(name, digests))
        if key not in made:  # as a run would find it
            made[key] = published(root, name, inputs, fill=fill)
            read[key] = {each.key for each in inputs.values() if isinstance(each, Artifact)}
        return made[key]

    sfts, rewards, policies = drawn
    data = [f"md5:{number:032}.dir" for number in range(len(sfts))]
    starts = [make("sft", {"data": data[i]}, content) for i, content in enumerate(sfts)]
    heads = [make("reward", {"data": data[i], "sft": starts[i]}, content) for i, content in rewards]
    for i, j, content in policies:
        make("ppo-robust", {"data": data[i], "sft": starts[i], "reward": heads[j]}, content)
    return made, read


@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(relations())
def test_of_twins_command_page_audit_and_error_tell_the_same(database, drawn):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copy(database, root / "mlflow.db")
        tracker, address = Tracker(root, "rrlhf"), f"sqlite:///{root / 'mlflow.db'}"
        client = MlflowClient(tracking_uri=address, registry_uri=address)
        made, read = made_of(root, drawn)
        for artifact in made.values():
            tracker.register(artifact, None, profile="default")
        lookup = Lookup(root, "default", PARAMS)
        graph, versions = lookup.graph, lookup.versions
        pages = {version.key: client.get_run(version.run_id).inputs.model_inputs for version in versions}
        for key, artifact in made.items():
            product = graph.find(key)
            assert {link.source.key for link in graph.sources[product]} - {""} == read[key]
            assert {client.get_logged_model(each.model_id).tags["rrlhf.key"] for each in pages[key]} == read[key]
            below, waiting = set(), [key]
            while waiting:
                parent = waiting.pop()
                waiting += [child for child in read if parent in read[child] and child not in below]
                below |= {child for child in read if parent in read[child]}
            told = graph.down(product)[1:]
            assert {each.key for each in told} == below
            weights = artifact.path / "weights" / "model.safetensors"
            sound = weights.read_bytes()
            weights.write_bytes(b"changed")
            with pytest.raises(TamperedError) as caught:
                Store(root).checked(artifact.stage, key)
            [line] = [line for line in str(caught.value).splitlines() if line.startswith("built on it: ")]
            assert set(re.findall("[0-9a-f]{8}", line)) == {each[:8] for each in below}
            found = Audit(lookup).run(product).broken
            [broken] = [each for each in found if str(weights) in each.problem]
            assert sorted(broken.downstream) == sorted(in_a_line(each) for each in told)
            weights.write_bytes(sound)
