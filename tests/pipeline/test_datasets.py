"""Data sets, versioned by DVC: real DVC on rows that no model has to write."""

import json
import shutil
from contextlib import nullcontext

import pytest
import yaml

from rrlhf.environment import set_environment
from rrlhf.located import ParamsError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.accept import accept, former_digest
from rrlhf.pipeline.artifacts import CopyError, TamperedError
from rrlhf.pipeline.check import check_sources
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.keys import canonical, key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.produce import carry_out

ROWS = {"prepare.source": "rows.jsonl", "prepare.format": "rows"}


class Asked:
    """A data set as a run with these overrides asks for it."""

    def __init__(self, root, **overrides):
        self.root = root
        self.project = Project(root, "tiny", load_params(root, "tiny", ROWS | overrides))
        self.node = self.project.nodes[0]
        self.document = self.project.document(self.node, {})
        self.folder = self.project.store.folder("prepare", key_digest(self.document))

    @property
    def planned(self):
        return self.project.decide(self.node, {}, chosen(Part(), self.project.nodes))

    def have(self, bring_back=dvc.bring_back):
        """Do what was decided; return the artifact, and whether it was computed."""

        def compute(staged, _):
            execute(self.document, inputs={}, out=staged, launch=self.project.params.launch)

        wanted = chosen(Part(), self.project.nodes)
        made, computed = carry_out(
            self.project,
            self.node,
            self.planned,
            wanted,
            {},
            compute,
            bring_back=bring_back,
            recorded=lambda staged: nullcontext(),
            dataset={},
            input_keys={},
        )
        dvc.keep(self.root, made.path)
        return made, computed


@pytest.fixture(scope="module")
def root(shared_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared_project)
        patch.setenv("PATH", "")  # restored afterwards: set_environment changes it
        set_environment(shared_project)
        rows = [
            {"prompt": f"Say {i}.", "chosen": f"Here you are: {i}.", "rejected": f"No, not {i}."} for i in range(60)
        ]
        (shared_project / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield shared_project


@pytest.fixture(scope="module")
def made(root):
    asked = Asked(root)
    artifact, computed = asked.have()
    assert computed
    return asked, artifact


@pytest.fixture
def missing(made):
    """A data set whose folder is away; it is there again in the end, as it was."""
    asked, artifact = made
    known = dvc.pointer(artifact.path).read_text()
    away = artifact.path.rename(asked.root / "away")
    yield asked, artifact
    shutil.rmtree(artifact.path, ignore_errors=True)
    away.rename(artifact.path)
    dvc.pointer(artifact.path).write_text(known)


def test_a_data_set_is_an_artifact_that_dvc_versions(made):
    asked, artifact = made
    assert asked.project.data() == artifact
    assert asked.planned.action == "reuse"
    assert artifact.metrics["sft_rows"] > 0
    [out] = yaml.safe_load(dvc.pointer(artifact.path).read_text())["outs"]
    assert (out["path"], out["nfiles"]) == (artifact.key, len([*artifact.path.iterdir()]))


def test_an_override_makes_another_beside_it(root, made):
    other, computed = Asked(root, seed=2).have()
    assert computed
    assert other.digest != made[1].digest
    assert dvc.pointer(other.path).exists()
    assert made[0].planned.action == "reuse"


def test_a_lost_data_set_is_brought_back_and_not_made_again(missing):
    asked, artifact = missing
    planned = asked.planned
    assert (planned.action, planned.digest) == ("restore", artifact.digest)
    assert planned.reasons == ["artifact missing, kept by DVC"]
    assert asked.have() == (artifact, False)


def test_what_dvc_does_not_have_is_made_again(missing):
    asked, artifact = missing
    cache = (asked.root / ".dvc" / "cache").rename(asked.root / "cache")
    try:
        assert (asked.planned.action, asked.planned.reasons) == ("run", ["artifact missing"])
        again, computed = asked.have()
        assert computed
        assert again.digest == artifact.digest
    finally:
        shutil.rmtree(asked.root / ".dvc" / "cache", ignore_errors=True)
        cache.rename(asked.root / ".dvc" / "cache")


def test_a_copy_that_was_changed_is_never_brought_back(missing):
    asked, artifact = missing
    for path in (asked.root / ".dvc" / "cache" / "files").rglob("*"):
        if path.is_file() and path.read_bytes() == (asked.root / "away" / "sft.parquet").read_bytes():
            changed, sound = path, path.read_bytes()
    changed.chmod(0o644)
    changed.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(CopyError, match=r"DVC's copy is not what was made: sft\.parquet: expected sha256"):
            dvc.bring_back(asked.project.store, "prepare", artifact.key)
        assert asked.have()[1]  # warned of, and made again
    finally:
        changed.write_bytes(sound)


def test_a_changed_byte_is_found_and_named(made):
    asked, artifact = made
    path = artifact.path / "ppo.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(TamperedError, match=r"ppo\.parquet.*\n.*nothing yet\n.*rm -r"):
            _ = asked.planned
    finally:
        path.write_bytes(sound)
    assert asked.planned.action == "reuse"


def test_a_project_without_dvcs_files_is_told_before_anything_runs(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / ".dvc" / "config").unlink()
    with pytest.raises(ParamsError, match="copy the project with its hidden files"):
        check_sources(Project(project, "tiny", load_params(project, "tiny")))


@pytest.fixture
def former(made, project, monkeypatch):
    """A project of an earlier version: its data set lies in data/, and DVC's lock tells who made it."""
    asked, artifact = made
    monkeypatch.chdir(project)
    shutil.copy(asked.root / "rows.jsonl", project)
    data = project / "data" / "tiny"
    shutil.copytree(artifact.path, data, ignore=shutil.ignore_patterns("artifact.json", "history.jsonl"))
    text = canonical(asked.document | {"code": {"rrlhf.stages.prepare": "as it was"}})
    (project / "data" / "tiny.key.json").write_text(text)
    deps, outs = ([{"path": "x", "md5": digest}] for digest in (md5_of(text), former_digest(data)[4:]))
    lock = {"schema": "2.0", "stages": {"prepare@tiny": {"cmd": "rrlhf prepare", "deps": deps, "outs": outs}}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    return Asked(project), data


def md5_of(text):
    from hashlib import md5

    return md5(text.encode()).hexdigest()


def test_a_data_set_of_an_earlier_version_is_taken_over_with_what_was_made_from_it(former, made):
    asked, data = former
    assert "`rrlhf accept` takes over" in asked.planned.reasons[0]
    project = Asked(asked.root).project
    sft = project.nodes[1]
    old = project.document(sft, {"data": former_digest(data)})
    staged = project.store.staging("sft", "x")
    staged.mkdir(parents=True)
    (staged / "history.jsonl").write_text("")
    project.store.publish("sft", old | {"code": {"rrlhf.stages.sft": "as it was"}}, staged, seconds=1.0)
    accepted = [*accept(project, project.nodes[:2], "an upgrade", verify=False)]
    assert [node for node, _ in accepted] == ["data", "sft"]
    assert project.data().digest == made[1].digest
    assert dvc.pointer(asked.folder).exists()
    data_, sft_, *_ = Asked(asked.root).project.plan()
    assert (data_.action, sft_.action, sft_.reasons) == ("reuse", "reuse", ["accepted: an upgrade"])
    assert [*accept(project, project.nodes[:2], "once more", verify=False)] == []


def test_a_data_set_that_its_record_does_not_know_is_left_alone(former):
    asked, data = former
    (data / "summary.json").write_text("{}")
    assert "never made here" in asked.planned.reasons[0]
