"""How long a run would take is told from runs of the same size, or not at all."""

import pytest

from rrlhf.files import clear
from rrlhf.pipeline.artifacts import HISTORY
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.last_run import note
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Planned, Project, total
from rrlhf.tools.running.uptodate import unregistered
from rrlhf.types import Dataset


@pytest.fixture
def times(project, monkeypatch):
    """Publish a result as of a profile with some settings; return what a plan of the tiny profile then expects."""
    monkeypatch.chdir(project)

    def publish(name, profile, seconds, overrides):
        made = Project(project, profile, load_params(project, profile, overrides))
        node = next(node for node in made.nodes if node.name == name)
        digests = {each: f"md5:{0:032}.dir" if each == DATA else "0" * 64 for each in node.inputs.values()}
        document = made.document(node, digests)
        staged = clear(made.store.staging(node.stage, key_digest(document)))
        (staged / HISTORY).write_text("")
        data = about(Dataset(profile, project, "md5:00.dir"), made.params.prepare)
        made.store.publish(name, document, staged, seconds=seconds, dataset=data)

    def call(name, made, asked=None):
        for profile, seconds, overrides in made:
            publish(name, profile, seconds, overrides)
        planned = Project(project, "tiny", load_params(project, "tiny", asked)).plan()
        return {one.node: one.seconds for one in planned}

    return call


@pytest.mark.parametrize(
    ("made", "asked", "seconds"),
    [
        ([("default", 780.0, {})], {}, None),  # another profile, far larger
        ([("tiny", 3.0, {}), ("default", 780.0, {})], {}, 3.0),
        ([("tiny", 3.0, {})], {"sft.learning_rate": 0.5}, 3.0),  # a rate makes nothing longer
        ([("tiny", 3.0, {})], {"seed": 7}, 3.0),
        ([("tiny", 3.0, {})], {"sft.epochs": 40}, None),
        ([("tiny", 3.0, {})], {"model.base": "random:9x99"}, None),
        ([("tiny", 3.0, {})], {"prepare.limit": 99}, None),  # more or fewer rows
        ([("default", 3.0, {"model.device": "cuda"}), ("tiny", 4.0, {"model.device": "cuda"})], {}, None),
        ([("tiny", 4.0, {"sft.epochs": 40}), ("tiny", 3.0, {"sft.learning_rate": 0.1})], {}, 3.0),
    ],
)
def test_a_time_is_that_of_a_result_of_the_same_size_or_unknown(times, made, asked, seconds):
    assert times("sft", made, asked)["sft"] == seconds


def test_a_new_arm_takes_as_long_as_another_that_is_paid_in_the_same_way(times):
    asked = {"arms.more": {"reward": "robust", "nominal_weight": 0.9, "credible": 2.0, "seed": 4}}
    found = times("ppo-robust", [("tiny", 5.0, {})], asked)
    assert (found["ppo-robust"], found["ppo-more"], found["ppo-single"]) == (5.0, 5.0, None)


def test_a_comparison_of_more_arms_takes_longer_than_is_known(times):
    assert times("evaluate", [("tiny", 5.0, {})])["evaluate"] == 5.0
    assert times("evaluate", [], {"arms.single": None})["evaluate"] is None


def test_the_total_counts_the_usual_start(project):
    planned = [Planned("sft", "run", ["forced"], 30.0), Planned("reward", "upstream", ["after sft"], None)]
    assert total(planned, 25.0) == "1 to run, up to 1 after them; at least 55 s by earlier runs"
    assert total([planned[1]], 25.0) == "0 to run, up to 1 after them"
    tiny = Project(project, "tiny", load_params(project, "tiny"))
    assert tiny.usual_start_up() is None
    note(project, "tiny", {"start_up": 25.0})
    assert tiny.usual_start_up() == 25.0


def test_what_is_here_and_not_registered_is_told(times, project):
    times("sft", [("tiny", 3.0, {})])
    tiny = Project(project, "tiny", load_params(project, "tiny"))
    [sft] = tiny.store.all()
    planned = [Planned("sft", "reuse", [], None, sft.key), Planned("reward", "run", ["never made here"], None)]
    assert unregistered(tiny, planned) == ["sft"]
