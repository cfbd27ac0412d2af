"""The store: nothing half-written, nothing changed unseen."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrlhf.memo import Memo
from rrlhf.pipeline.artifacts import MANIFEST, Store, TamperedError, content_digest
from rrlhf.pipeline.keys import key_digest

ROOT = Path(__file__).parents[2]


def document(stage, **inputs):
    return {"stage": stage, "params": {"seed": 1}, "inputs": inputs, "code": {}, "numerics": {}}


def publish(store, stage, content=b"weights", **inputs):
    made = document(stage, **inputs)
    staged = store.staging(stage, key_digest(made))
    (staged / "deep").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "deep" / "notes.json").write_text("{}")
    (staged / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return store.publish(stage, made, staged, seconds=1.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_published_artifact_is_found_and_sound(store):
    artifact = publish(store, "sft")
    assert store.checked("sft", artifact.key) == artifact
    assert artifact.metrics == {"step": 2, "loss": 1.0}


def test_an_unknown_key_finds_nothing(store):
    assert store.find("sft", "0" * 64) is None


def test_publishing_leaves_nothing_beside(store):
    artifact = publish(store, "sft")
    assert not store.staging("sft", artifact.key).exists()


def test_the_digest_depends_on_content_and_not_on_time(store):
    one, two = publish(store, "sft", data="a"), publish(store, "sft", data="b")
    three = publish(store, "sft", b"other weights", data="c")
    assert one.key != two.key
    assert one.digest == two.digest != three.digest


def test_an_unpublished_folder_is_invisible(store):
    staged = store.staging("sft", "0" * 64)
    staged.mkdir(parents=True)
    (staged / "model.bin").write_bytes(b"half")
    assert list(store.all()) == []


def change_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(bytes(content))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["model.bin", "deep/notes.json", "history.jsonl"]), position=st.integers(0, 1000))
def test_any_changed_byte_is_found_though_size_and_time_stamp_are_the_same(tmp_path_factory, name, position):
    store = Store(tmp_path_factory.mktemp("store"))
    artifact = publish(store, "sft")
    store.checked("sft", artifact.key)  # the memo knows the files now
    path = artifact.path / name
    stamp = path.stat()
    change_byte(path, position)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(TamperedError, match=name):
        Store(store.root.parent).checked("sft", artifact.key)


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()])
def test_a_truncated_or_missing_file_is_found(store, damage):
    artifact = publish(store, "sft")
    damage(artifact.path / "model.bin")
    with pytest.raises(TamperedError, match=r"model\.bin"):
        store.checked("sft", artifact.key)


@pytest.mark.parametrize("name", ["key", "digest", "document", "files"])
def test_an_edited_manifest_is_refused(store, name):
    artifact = publish(store, "sft")
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest[name] = {"stage": "sft"} if name in {"document", "files"} else "0" * 64
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TamperedError):
        store.checked("sft", artifact.key)


def test_the_error_names_every_model_built_on_the_file(store):
    sft = publish(store, "sft")
    reward = publish(store, "reward", b"head", sft=sft.digest)
    publish(store, "ppo", b"policy", reward=reward.digest)
    publish(store, "other", b"unrelated", sft="0" * 64)
    change_byte(sft.path / "model.bin", 0)
    with pytest.raises(TamperedError) as error:
        store.checked("sft", sft.key)
    assert "reward" in str(error.value)
    assert "ppo" in str(error.value)
    assert "other" not in str(error.value)


def test_the_digest_ignores_the_log_but_the_check_does_not(store):
    files = {"model.bin": "1" * 64}
    assert content_digest(files | {"history.jsonl": "2" * 64}) == content_digest(files)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path, memo = tmp_path / "file", Memo(tmp_path / "memo.json")
    path.write_bytes(b"content")
    time.sleep(0.02)  # longer than the clock's tick
    digest = memo.sha256(path)
    memo.save()
    monkeypatch.setattr("rrlhf.memo.sha256", lambda path: pytest.fail("read again"))
    assert Memo(tmp_path / "memo.json").sha256(path) == digest


def test_an_edit_right_after_the_look_is_seen_though_size_and_time_are_the_same(tmp_path):
    path, memo = tmp_path / "file", Memo(tmp_path / "memo.json")
    for content in (b"one", b"two") * 20:  # many within one tick of the clock that stamps files
        path.write_bytes(content)
        assert memo.sha256(path) == hashlib.sha256(content).hexdigest()


HOLD = """
import sys, time
from pathlib import Path
from rrlhf.pipeline.artifacts import Store
with Store(Path(sys.argv[1])).locked("key"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(root):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_ends_with_its_process(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with Store(tmp_path).locked("key"):
            assert time.monotonic() - began < 5


def test_who_waits_is_told_for_whom(tmp_path, capfd):
    with holder(tmp_path) as process:
        waiting = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        with waiting:
            assert f"process {process.pid}".encode() in waiting.stderr.readline()
            waiting.kill()
        process.kill()
