"""DVC and the data sets: real DVC on rows that no model has to write."""

import json

import pytest

from rrlhf.environment import set_environment
from rrlhf.located import ParamsError
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.versioning.datasets import PrepareError, prepare_dataset, prepared, restorable
from rrlhf.pipeline.versioning.records import folder_digest, md5

ROWS = {"prepare.source": "rows.jsonl", "prepare.format": "rows"}


class Asked:
    """A data set as a run with these overrides would ask for it."""

    def __init__(self, root, profile="tiny", **overrides):
        self.root = root
        project = Project(root, profile, load_params(root, profile, ROWS | overrides))
        self.document = project.document(project.nodes[0], {})
        self.place = project.place(self.document)

    def make(self):
        return prepare_dataset(self.root, self.place, self.document)

    @property
    def is_there(self):
        return prepared(self.root, self.place, self.document)

    @property
    def can_be_restored(self):
        return restorable(self.root, self.place, self.document)


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
    return asked, asked.make()


def test_a_data_set_is_versioned(made):
    asked, dataset = made
    assert dataset.digest.startswith("md5:")
    assert dataset.digest.endswith(".dir")
    assert asked.is_there == dataset


def test_making_it_again_runs_nothing(made, monkeypatch):
    asked, dataset = made
    stamp = (dataset.path / "summary.json").stat().st_mtime_ns
    assert asked.make() == dataset
    assert (dataset.path / "summary.json").stat().st_mtime_ns == stamp


def test_an_override_gets_a_place_of_its_own_and_a_version(root, made):
    _, dataset = made
    other = Asked(root, **{"seed": 2})
    assert other.is_there is None
    variant = other.make()
    assert variant.path != dataset.path
    assert variant.digest != dataset.digest
    assert made[0].is_there == dataset


def test_a_lost_data_set_is_brought_back_and_not_made_again(root, made):
    asked, dataset = made
    stamp = (dataset.path / "summary.json").read_bytes()
    datasets_folder = dataset.path
    for path in datasets_folder.iterdir():
        path.unlink()
    datasets_folder.rmdir()
    assert asked.is_there is None
    assert asked.can_be_restored == dataset
    (root / "rows.jsonl").rename(root / "gone.jsonl")  # the command would fail now
    try:
        assert asked.make() == dataset
    finally:
        (root / "gone.jsonl").rename(root / "rows.jsonl")
    assert (dataset.path / "summary.json").read_bytes() == stamp


def test_going_back_to_old_settings_makes_nothing(root, made, monkeypatch):
    asked, dataset = made
    before = (root / "profiles" / "tiny.yaml").read_text()
    project = Project(root, "tiny", load_params(root, "tiny", ROWS | {"prepare.limit": 40}))
    document = project.document(project.nodes[0], {})
    changed = prepare_dataset(root, asked.place, document)  # as if the profile itself had been edited
    assert changed.digest != dataset.digest
    assert asked.is_there is None
    assert asked.can_be_restored == dataset
    assert asked.make() == dataset
    assert (root / "profiles" / "tiny.yaml").read_text() == before


def test_a_changed_byte_is_found_and_named(made):
    asked, dataset = made
    path = dataset.path / "ppo.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(TamperedError, match=r"ppo\.parquet.*\n.*nothing yet\n.*rm -r"):
            _ = asked.is_there
    finally:
        path.write_bytes(sound)
    assert asked.is_there == dataset


def test_a_failing_command_leaves_no_data_set(root, monkeypatch):
    asked = Asked(root, **{"prepare.limit": 30})
    monkeypatch.setitem(asked.document["params"]["prepare"], "source", "missing.jsonl")
    with pytest.raises(PrepareError, match="the lines above say why"):
        asked.make()
    assert not asked.place.data.exists()


def test_the_digest_is_the_one_that_dvc_computes(made):
    _, dataset = made
    files = {p.name: md5(p.read_bytes()) for p in dataset.path.iterdir()}
    assert f"md5:{folder_digest(files)}" == dataset.digest


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (".dvc/config", None, "copy the project with its hidden files"),
        ("dvc.yaml", "stages: [", r"dvc\.yaml:2: not valid YAML"),
        ("dvc.yaml", "", "expected a mapping"),
        ("dvc.yaml", "stages: {prepare: 1}", "no list of profiles"),
    ],
)
def test_what_dvc_lacks_is_told_by_a_plan(project, file, content, told):
    (project / file).unlink() if content is None else (project / file).write_text(content)
    with pytest.raises(ParamsError, match=told):
        Project(project, "tiny", load_params(project, "tiny")).plan()
