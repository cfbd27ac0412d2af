"""A store that machines share: two folders here stand for two machines; the store is a third, memory, or on S3."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pytest

from rrlhf.pipeline.artifacts import HISTORY, CopyError, sealed
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.produce import carry_out
from rrlhf.pipeline.shared import VARIABLE, Shared, SharedError
from rrlhf.pipeline.store import Store

ROOT = Path(__file__).parents[2]
DOCUMENT = {"stage": "sft", "params": {"epochs": 1}, "inputs": {}, "code": {}, "numerics": {}}
KEY = key_digest(DOCUMENT)


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.scale)])
def shared(request, tmp_path, monkeypatch):
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3").items():
            monkeypatch.setenv(name, value)
    places = {"folder": f"file://{tmp_path}/shared", "memory": f"memory://{tmp_path}", "s3": f"s3://rrlhf{tmp_path}"}
    yield Shared(places[request.param])
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def made(tmp_path):
    store = Store(tmp_path / "one")
    staged = store.staging("sft", KEY)
    (staged / "inner").mkdir(parents=True)
    (staged / "inner" / "model.txt").write_text("weights")
    (staged / HISTORY).write_text("")
    return store.publish("sft", DOCUMENT, staged, seconds=1.0)


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"LOOK": 0.05, "BEAT": 0.1, "DIE": 0.5}.items():
        monkeypatch.setattr(f"rrlhf.pipeline.shared.SECONDS_TO_{name}", seconds)


def test_what_one_machine_made_another_has(shared, made, tmp_path):
    assert shared.fetch(Store(tmp_path / "two"), "sft", KEY) is None
    shared.keep(made)
    found = shared.fetch(Store(tmp_path / "two"), "sft", KEY)
    assert (found.manifest, (found.path / "inner" / "model.txt").read_text()) == (made.manifest, "weights")
    assert found.path == tmp_path / "two" / "artifacts" / "sft" / KEY


def test_half_a_copy_is_none_and_is_made_whole(shared, made, tmp_path):
    shared.keep(made)
    files, root = shared._root
    files.rm(f"{root}/sft/{KEY}/artifact.json")
    assert shared.kept("sft", KEY) is None
    shared.keep(made)
    assert shared.fetch(Store(tmp_path / "two"), "sft", KEY).digest == made.digest


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_copy_that_is_not_what_was_made_is_named_and_does_not_come_here(shared, made, tmp_path, how):
    shared.keep(made)
    (files, root), name = shared._root, "inner/model.txt"
    place = f"{root}/sft/{KEY}/{name}"
    files.pipe_file(place, b"weighty") if how == "changed" else files.rm(place)
    with pytest.raises(CopyError, match=name):
        shared.fetch(Store(tmp_path / "two"), "sft", KEY)
    assert Store(tmp_path / "two").find("sft", KEY) is None


def test_a_manifest_that_names_files_elsewhere_writes_nothing_there(shared, made, tmp_path):
    shared.keep(made)
    files, root = shared._root
    manifest = {**made.manifest, "files": {"../../../../evil.txt": "0" * 64}}
    files.pipe_file(f"{root}/sft/{KEY}/artifact.json", sealed(manifest).encode())
    with pytest.raises(CopyError, match="evil"):
        shared.fetch(Store(tmp_path / "two"), "sft", KEY)


@pytest.mark.usefixtures("quick")
def test_of_machines_that_come_at_once_one_is_at_work_at_a_time(shared, capfd):
    at_work, most = [], []

    def work(number):
        with shared.alone("sft", KEY):
            at_work.append(number)
            most.append(len(at_work))
            time.sleep(0.1)
            at_work.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]
    assert "sft  waiting for " in capfd.readouterr().err
    files, root = shared._root
    assert not files.exists(f"{root}/.locks/{KEY}/0")


@pytest.mark.usefixtures("quick")
def test_a_lock_whose_holder_lives_is_waited_for_and_one_that_failed_is_free(shared):
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:

        def fail():
            with shared.alone("sft", KEY):
                time.sleep(1.5)  # three times as long as a dead one is waited for
                raise ValueError("diverged")

        failing = pool.submit(fail)
        time.sleep(0.2)
        with shared.alone("sft", KEY):
            assert time.monotonic() - began > 1.5
        with pytest.raises(ValueError, match="diverged"):
            failing.result()


@pytest.mark.usefixtures("quick")
def test_the_lock_of_a_machine_that_died_is_taken_over_by_one_other(shared, capfd):
    files, root = shared._root
    with files.open(f"{root}/.locks/{KEY}/0", "xb") as lock:
        lock.write(b"process 1 on elsewhere")
    at_work, most = [], []

    def work(_):
        with shared.alone("sft", KEY):
            at_work.append(1)
            most.append(len(at_work))
            time.sleep(0.2)
            at_work.pop()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert most == [1, 1, 1]
    assert "process 1 on elsewhere gave no sign of life for 0 s: it is made here" in capfd.readouterr().err


def test_an_address_that_cannot_be_used_is_told_with_the_way_out(made):
    with pytest.raises(SharedError, match=r"RRLHF_STORE=nowhere://x: .*\n.*unset RRLHF_STORE"):
        Shared("nowhere://x").keep(made)


@pytest.mark.scale
def test_a_bucket_that_is_not_there_is_told_with_the_way_out(s3, made, monkeypatch):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SharedError, match=r"RRLHF_STORE=s3://no-such-bucket: .*\n.*unset RRLHF_STORE"):
        Shared("s3://no-such-bucket").alone("sft", KEY).__enter__()


class Machine:
    """A project's folder of its own, in which the data set may be decided for and made."""

    def __init__(self, root, source):
        root.mkdir()
        rows = {"prepare.source": str(source), "prepare.format": "rows"}
        self.project = Project(root, "tiny", load_params(ROOT, "tiny", rows))
        self.wanted = chosen(Part(), self.project.nodes)

    @property
    def planned(self):
        return self.project.decide(self.project.nodes[0], {}, self.wanted)

    def have(self, planned, text="rows"):
        """Carry out what was planned; return the artifact, and whether it was computed."""

        def compute(staged, _):
            staged.mkdir(parents=True)
            (staged / "data.txt").write_text(text)
            (staged / HISTORY).write_text("")

        return carry_out(
            self.project,
            self.project.nodes[0],
            planned,
            self.wanted,
            {},
            compute,
            bring_back=self.project.shared.fetch,
            recorded=lambda staged: nullcontext(),
        )


@pytest.fixture
def machines(shared, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, shared.address)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return [Machine(tmp_path / name, tmp_path / "rows.jsonl") for name in ("first", "second")]


def test_a_plan_says_what_comes_from_there_and_a_run_brings_it(machines):
    first, second = machines
    assert (first.planned.action, first.planned.reasons) == ("run", ["never made here"])
    made, computed = first.have(first.planned)
    assert computed
    assert (second.planned.action, second.planned.reasons) == ("restore", ["artifact missing, in the shared store"])
    found, computed = second.have(second.planned)
    assert (found.manifest, computed) == (made.manifest, False)
    assert second.planned.action == "reuse"


def test_what_another_machine_made_since_the_plan_is_not_made_again(machines):
    first, second = machines
    before = second.planned
    made, _ = first.have(first.planned)
    found, computed = second.have(before, "other rows")
    assert (found.digest, computed) == (made.digest, False)


def test_what_was_made_without_the_store_comes_there_with_the_next_run(machines):
    first, second = machines
    document = first.project.document(first.project.nodes[0], {})
    staged = first.project.store.staging("prepare", key_digest(document))
    staged.mkdir(parents=True)
    (staged / HISTORY).write_text("")
    made = first.project.store.publish("data", document, staged, seconds=1.0)
    assert second.planned.action == "run"
    assert first.have(first.planned) == (made, False)
    assert second.planned.action == "restore"


def test_a_changed_copy_there_is_told_and_the_result_made_here(machines, capfd):
    first, second = machines
    made, _ = first.have(first.planned)
    files, root = first.project.shared._root
    files.pipe_file(f"{root}/prepare/{made.key}/data.txt", b"worm")
    found, computed = second.have(second.planned)
    assert (found.digest, computed) == (made.digest, True)
    assert "data.txt: expected sha256" in capfd.readouterr().err
