"""`rrlhf gc` removes what nothing needs and nothing else; `rrlhf doctor` finds what is wrong and how to mend it."""

import fcntl
import json
import os
import re
import shutil
from contextlib import nullcontext

import pytest
from conftest import copy_project
from finished import Finished, at_work

from rrlhf.files import CHECKPOINT
from rrlhf.pipeline import dvc
from rrlhf.pipeline.decide import Part
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.unsynced import Made, Unsynced
from rrlhf.pipeline.tracking.unsynced import note as note_unsynced
from rrlhf.tools.auditing.audit import Audit
from rrlhf.tools.doctor import examined
from rrlhf.tools.gc import BusyError, Leftover, leftovers, remove
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.running.status import noted

OVERRIDES = {"prepare.source": "rows.jsonl", "prepare.format": "rows"}
OVERRIDES |= {"arms.direct": None, "arms.choosy": None, "arms.single": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with results that are all registered, of settings (--set) that no profile has, behind a link."""
    folder = tmp_path_factory.mktemp("upkeep")
    copy_project(folder / "Größe, ein Maß")
    (folder / "a link").symlink_to(folder / "Größe, ein Maß")
    with at_work(folder / "a link"):
        rows = [{"prompt": f"Say {i}.", "chosen": f"Here: {i}.", "rejected": f"Not {i}."} for i in range(60)]
        (folder / "a link" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield Finished(folder / "a link", OVERRIDES)


def lookup(made):
    return Lookup(made.root, "tiny", made.project.params)


def found(made):
    return {os.path.relpath(one.path.resolve(), made.root.resolve()): one for one in leftovers(lookup(made))}


def published(store, content=b"weights", stage="sft", seed=1):
    document = {"stage": stage, "params": {"seed": seed}, "inputs": {}, "code": {}, "numerics": {}}
    staged = store.staging(stage, key_digest(document))
    staged.mkdir(parents=True)
    (staged / "history.jsonl").write_text("")
    (staged / "model.safetensors").write_bytes(content)
    return store.publish(stage, document, staged, seconds=1.0)


def test_a_project_behind_a_link_and_with_an_unusual_name_is_sound_and_restored(made):
    report = Audit(lookup(made), deep=True).run()
    assert (report.broken, report.notes) == ([], [])
    for name, door in (("data", dvc), ("sft", made.tracker)):
        one = made.artifacts[name]
        shutil.rmtree(one.path)
        assert door.bring_back(Store(made.root), one.stage, one.key).digest == one.digest


def test_what_is_registered_and_all_that_it_was_made_from_stays(made):
    assert found(made) == {}


def test_a_result_that_nothing_needs_goes_with_its_bytes_and_one_with_a_second_name_frees_none(made):
    artifact = published(Store(made.root), b"w" * 1000)
    name = f"artifacts/sft/{artifact.key}"
    one = found(made)[name]
    assert one.size == artifact.size
    assert "no profile and no registered model needs it" in one.what
    os.link(artifact.path / "model.safetensors", made.root / "second-name")
    assert found(made)[name].size == artifact.size - 1000
    remove(lookup(made), leftovers(lookup(made)))
    assert not artifact.path.exists()
    assert not Store(made.root).was_here(artifact.key)
    assert artifact.key not in (made.root / ".rrlhf" / "digests.json").read_text()
    assert (made.root / "second-name").read_bytes() == b"w" * 1000
    (made.root / "second-name").unlink()
    assert found(made) == {}
    assert made.project.plan()[0].action == "reuse"


def test_what_a_server_is_still_to_be_told_of_stays(made):
    artifact = published(Store(made.root), seed=2)
    waits = [Made("sft", artifact.key, [])]
    note_unsynced(made.root, Unsynced("rrlhf", "tiny", "tiny", {}, None, "", waits, []))
    try:
        assert found(made) == {}
    finally:
        shutil.rmtree(made.root / ".rrlhf" / "unsynced")
    assert len(found(made)) == 1
    shutil.rmtree(artifact.path)


def test_a_model_whose_version_was_deleted_goes_here_and_in_mlflow(made):
    client = made.tracker.models._client
    policy = made.artifacts["ppo-robust"]
    [version] = [each for each in made.tracker.versions() if each.digest == policy.digest]
    copies = {*made.root.glob("mlartifacts/models/*")}
    client.delete_model_version(version.name, version.version)
    kept = made.root / "kept"
    shutil.copytree(policy.path, kept)
    going = found(made)
    assert f"artifacts/ppo/{policy.key}" in going
    assert f"artifacts/evaluate/{made.artifacts['evaluate'].key}" in going
    remove(lookup(made), leftovers(lookup(made)))
    assert len(copies - {*made.root.glob("mlartifacts/models/*")}) == 1
    assert found(made) == {}
    kept.rename(policy.path)
    made.tracker.register(policy, made.data.dataset, profile="tiny", aliases=["robust", "candidate"])
    assert made.tracker.models.aliases()
    assert found(made) == {}


def test_leftovers_of_interruptions_go_and_a_checkpoint_of_the_present_settings_stays(made):
    store, project = Store(made.root), made.project
    resumable = store.staging("prepare", key_digest(project.document(project.nodes[0], {})))
    with noted(made.root, "tiny", OVERRIDES, Part()):
        pass
    (resumable / CHECKPOINT / "00000001").mkdir(parents=True)
    left = [store.staging("sft", "0" * 64), store.staging("restore", "0" * 64), store.root / ".differing" / "sft-0"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "file").write_text("x" * 10)
    half = made.root / ".rrlhf" / f".digests.json.{2**22 + 1}"  # no process has this number
    half.write_text("{")
    backup = made.root / "mlflow.db.before-relocate-20260101T000000"
    backup.write_text("x")
    lock = a_lock(made)
    going = found(made)
    assert {*going} == {str(path.relative_to(made.root)) for path in (*left, half, backup, lock)}
    remove(lookup(made), [*going.values()])
    assert resumable.exists()
    assert found(made) == {}
    shutil.rmtree(resumable)


@pytest.mark.parametrize("sign", ["lock", "run"])
def test_nothing_is_removed_while_a_run_is_at_work(made, sign):
    target = Leftover(made.root / "target", "", 0)
    target.path.mkdir()
    lock = a_lock(made)
    with lock.open("w") as handle, noted(made.root, "tiny", {}, Part()) if sign == "run" else nullcontext():
        if sign == "lock":
            fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="process"):
            remove(lookup(made), [target])
    assert target.path.is_dir()
    target.path.rmdir()
    lock.unlink()


def test_gc_asks_and_a_dry_run_only_shows(made, typed):
    artifact = published(Store(made.root), seed=3)
    code, out, _ = typed("gc", "--profile", "tiny", "--dry-run")
    assert (code, f"{artifact.size:,}  artifacts/sft/{artifact.key}" in out, "would go" in out) == (0, True, True)
    code, _, told = typed("gc", "--profile", "tiny")
    assert (code, "add --yes" in told) == (2, True)
    assert artifact.path.exists()
    code, out, _ = typed("gc", "--profile", "tiny", "--yes")
    assert (code, "removed 1 files and folders" in out) == (0, True)
    assert not artifact.path.exists()
    assert "nothing can go" in typed("gc", "--profile", "tiny")[1]


def a_lock(made):
    lock = made.root / "artifacts" / ".locks" / "some"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    return lock


def wrong(root):
    return {one.what: one.mend for one in examined(root, "tiny") if one.mend}


def test_a_project_in_order_has_nothing_to_mend(made, typed):
    assert wrong(made.root) == {}
    code, out, _ = typed("doctor", "--profile", "tiny")
    assert code == 0
    assert "MLflow answers at sqlite" in out
    assert "processors" in out
    assert re.fullmatch(r"\d+ findings, nothing to mend", out.splitlines()[-1])


def test_each_finding_of_the_doctor_comes_with_the_way_to_mend_it(made, typed, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    note_unsynced(made.root, Unsynced("rrlhf", "tiny", "tiny", {}, None, "", [], []))
    (made.root / "profiles" / "bad.yaml").write_text("sed: 1\n")
    hidden = (made.root / ".dvc" / "config").rename(made.root / ".dvc" / "hidden")
    monkeypatch.setattr("rrlhf.tools.doctor.requires", lambda name: ["torch>=99", "nothing-of-this-name", "rich"])
    monkeypatch.setattr("rrlhf.tools.doctor.free_bytes", lambda path: 5)
    try:
        told = wrong(made.root)
        code, out, _ = typed("doctor", "--profile", "tiny", "--json")
        last = typed("doctor", "--profile", "tiny")[1].splitlines()[-1]
    finally:
        hidden.rename(made.root / ".dvc" / "config")
        (made.root / "profiles" / "bad.yaml").unlink()
        shutil.rmtree(made.root / ".rrlhf" / "unsynced")
    assert (code, sum(bool(each["mend"]) for each in json.loads(out))) == (1, len(told))
    assert last == f"{len(json.loads(out))} findings, {len(told)} to mend"
    for what, mend in {
        "torch>=99: found": "pip install 'torch>=99'",
        "nothing-of-this-name: found none": "pip install",
        "no room on the disk": "rrlhf gc --dry-run",
        "config: not there": "hidden files",
        "profile bad: ": "change the settings",
        "Prefect's server": "unset PREFECT_API_URL",
        "1 runs that the tracking server does not know": "rrlhf sync",
    }.items():
        assert any(what in each and mend in told[each] for each in told), what


def test_the_doctor_tells_who_holds_a_lock_and_which_registrations_are_half(made):
    lock = a_lock(made)
    client = made.tracker.models._client
    [version] = [each for each in made.tracker.versions() if each.name == "rrlhf-tiny-sft"]
    client.delete_tag(version.run_id, "rrlhf.digest")
    with lock.open("w+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("process 7, at work")
        handle.flush()
        told = [one.what for one in examined(made.root, "tiny")]
    made.tracker.register(made.artifacts["sft"], made.data.dataset, profile="tiny")
    assert "artifacts/.locks/some is held by process 7, at work" in told
    assert "rrlhf-tiny-sft/1 in MLflow is half registered" in told
    assert wrong(made.root) == {}


def test_a_server_that_is_away_is_a_finding(made, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@127.0.0.1:9")
    [what] = wrong(made.root)
    assert "the tracking server http://127.0.0.1:9 failed" in what
