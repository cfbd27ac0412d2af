"""The store: nothing half-written, nothing changed unseen."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrlhf.memo import Memo
from rrlhf.pipeline.artifacts import (
    MANIFEST,
    Artifact,
    CopyError,
    TamperedError,
    content_digest,
    git_commit,
    sealed,
    unsealed,
)
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.store import Store

ROOT = Path(__file__).parents[2]


def document(stage, **inputs):
    return {"stage": stage, "params": {"seed": 1}, "inputs": inputs, "code": {}, "numerics": {}}


def publish(store, stage, content=b"weights", profile="", **inputs):
    made = document(stage, **inputs)
    staged = store.staging(stage, key_digest(made))
    (staged / "deep").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "deep" / "notes.json").write_text("{}")
    (staged / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    return store.publish(stage, made, staged, seconds=1.26, profile=profile)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_published_artifact_is_found_and_sound(store):
    artifact = publish(store, "sft")
    assert store.checked("sft", artifact.key) == artifact
    assert artifact.metrics == {"step": 2, "loss": 1.0}


def test_an_artifact_says_what_it_is(store):
    made = publish(store, "sft", data="d", base="b", reward="r")
    assert (made.inputs, made.made_from) == ({"data": "d", "base": "b", "reward": "r"}, ["reward"])
    assert made.history() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert made.made == f"artifacts/sft/{made.key}, made {made.manifest['created']} in 1 s"
    assert made.size == sum(file.stat().st_size for file in made.path.rglob("*") if file.is_file())
    product = made.product
    assert (product.node, product.stage, product.digest, product.key) == ("sft", "sft", made.digest, made.key)
    assert (product.document, product.metrics, product.seconds) == (made.manifest["document"], made.metrics, 1.3)
    assert (product.inputs, product.created, product.names) == (made.inputs, made.manifest["created"], ())
    told = {
        "input_keys": {"reward": "k"},
        "profile": "wide",
        "git_commit": "c0ffee",
        "accepted": {"because": "no change"},
    }
    other = Artifact(made.path, made.manifest | told)
    assert (other.product.input_keys, other.product.profile, other.product.commit) == (
        {"reward": "k"},
        "wide",
        "c0ffee",
    )
    assert (other.accepted, made.accepted) == ("no change", "")


def test_products_come_newest_first_and_a_data_set_has_its_profiles_name(store):
    made = [publish(store, stage, profile="wide") for stage in ("data", "sft")]
    for artifact, created in zip(made, ("2026-01-02", "2026-01-01"), strict=True):
        manifest = artifact.manifest | {"created": created}
        (artifact.path / MANIFEST).write_text(sealed(manifest))
    assert [(product.node, product.names) for product in store.products()] == [("data", ("wide",)), ("sft", ())]


def test_that_a_result_was_made_here_is_known_after_its_folder_is_gone(store):
    made = publish(store, "sft")
    shutil.rmtree(made.path)
    assert store.was_here(made.key)
    assert not store.was_here("0" * 64)


def test_a_copy_is_taken_over_if_it_is_what_the_key_says(store, tmp_path):
    made = publish(store, "sft")
    copy = shutil.copytree(made.path, tmp_path / "copy")
    (copy / "model.bin").write_bytes(b"Weights")
    with pytest.raises(CopyError, match=r"^model\.bin: expected sha256"):
        Store(tmp_path / "other").adopt(made.key, copy)
    shutil.copy(made.path / "model.bin", copy)
    with pytest.raises(CopyError, match=f"is that of another key, {made.key}"):
        Store(tmp_path / "other").adopt("0" * 64, copy)
    found = Store(tmp_path / "other").adopt(made.key, copy)
    assert (found, copy.exists()) == (Store(tmp_path / "other").checked("sft", made.key), False)
    with pytest.raises(CopyError, match=r"^artifact\.json is missing"):
        Store(tmp_path / "third").adopt(made.key, tmp_path)


def test_what_is_here_is_not_brought_from_elsewhere(store):
    made = publish(store, "sft")

    def download(staged):
        raise AssertionError

    assert store.restore("sft", made.key, download, "a copy") == made
    assert store.restore("sft", "0" * 64, lambda staged: None, "a copy") is None
    assert list((store.root / ".staging").iterdir()) == []


def test_a_sealed_manifest_whose_key_is_not_that_of_its_key_document_is_refused(store):
    made = publish(store, "sft")
    forged = made.manifest | {"document": made.manifest["document"] | {"params": {"seed": 2}}}
    (made.path / MANIFEST).write_text(sealed(forged))
    with pytest.raises(TamperedError, match="its key is not that of its key document") as caught:
        store.find("sft", made.key)
    assert caught.value.exit_code == 3


def test_a_folder_with_the_manifest_of_another_key_is_refused_with_the_way_out(store):
    made = publish(store, "sft")
    other = made.path.rename(made.path.with_name("0" * 64))
    with pytest.raises(TamperedError, match=f"is that of another key, {made.key}\n.*rm -r {other}"):
        store.find("sft", "0" * 64)


@pytest.mark.parametrize("kind", ["file", "link", "link to a folder"])
def test_what_no_manifest_lists_is_found(store, tmp_path, kind):
    made = publish(store, "sft")
    strange = made.path / "deep" / "strange"
    strange.write_text("") if kind == "file" else strange.symlink_to(tmp_path if "folder" in kind else MANIFEST)
    assert store.fault(made) == f"{strange}: expected no such file, {MANIFEST} does not list it"


def test_a_digest_that_does_not_follow_from_the_files_is_found(store):
    made = publish(store, "sft")
    forged = Artifact(made.path, made.manifest | {"digest": "0" * 64})
    assert store.fault(forged) == f"{made.path / MANIFEST}: the digest does not follow from the files it lists"


@pytest.mark.parametrize("text", ["[]", "{}", '{"seal": "0"}'])
def test_a_text_without_its_seal_is_no_manifest(text):
    with pytest.raises(ValueError, match="seal"):
        unsealed(text.encode())


def test_the_commit_is_that_of_the_folder_and_says_whether_files_differ(tmp_path):
    assert git_commit(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_commit(tmp_path) == head.stdout.strip()
    (tmp_path / "new").write_text("")
    subprocess.run(["git", "-C", tmp_path, "add", "new"], check=True)
    assert git_commit(tmp_path) == f"{head.stdout.strip()}-dirty"


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


def test_what_many_files_taught_is_written_once(tmp_path):
    memo = Memo(tmp_path / "memo.json")
    with memo.once():
        for name in "ab":
            (tmp_path / name).write_text(name)
            time.sleep(0.02)  # a file that is too new is not remembered
            memo.sha256(tmp_path / name)
            memo.save()
        assert not memo.path.exists()
    assert len(Memo(memo.path).known) == 2


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
from rrlhf.pipeline.store import Store
with Store(Path(sys.argv[1])).locked("key"):
    print("held", flush=True)
    time.sleep(60)
"""


HANDED_ON = """
import subprocess, sys, time
from pathlib import Path
from rrlhf.pipeline.store import Store
with Store(Path(sys.argv[1])).locked("key") as lock:
    subprocess.Popen(["sh", "-c", "sleep 1; touch done"], stdin=lock, cwd=sys.argv[1])
    print("held", flush=True)
    time.sleep(60)
"""


def holder(root, program=HOLD):
    process = subprocess.Popen([sys.executable, "-c", program, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_ends_with_its_process(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        with Store(tmp_path).locked("key"):
            assert time.monotonic() - began < 5


def test_a_lock_that_was_handed_on_ends_with_the_last_process_that_has_it(tmp_path):
    with holder(tmp_path, HANDED_ON) as process:
        process.kill()
        with Store(tmp_path).locked("key"):
            assert (tmp_path / "done").exists()


def test_of_many_that_want_a_lock_one_has_it_at_a_time_and_its_file_goes_with_the_last(tmp_path):
    at_work, most = [], []

    def work(number):
        for _ in range(20):
            with Store(tmp_path).locked("key"):
                at_work.append(number)
                most.append(len(at_work))
                time.sleep(0.005)  # in which others begin to wait for this file
                at_work.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1] * 80
    assert not [*tmp_path.glob("artifacts/.locks/*")]


def test_who_waits_is_told_for_whom(tmp_path, capfd):
    with holder(tmp_path) as process:
        waiting = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        with waiting:
            assert f"process {process.pid}".encode() in waiting.stderr.readline()
            waiting.kill()
        process.kill()
