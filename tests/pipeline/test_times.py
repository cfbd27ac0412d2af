"""How long a run would take is told from earlier runs of the profile, or not at all."""

import pytest

from rrlhf.files import clear
from rrlhf.pipeline.artifacts import HISTORY
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Planned, Project
from rrlhf.tools.running.uptodate import unregistered


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
        made.store.publish(name, document, staged, seconds=seconds, profile=profile)

    def call(name, made, asked=None):
        for profile, seconds, overrides in made:
            publish(name, profile, seconds, overrides)
        planned = Project(project, "tiny", load_params(project, "tiny", asked)).plan()
        return {one.node: one.seconds for one in planned}

    return call


def test_a_time_is_that_of_the_last_result_of_the_profile(times):
    assert times("sft", [("default", 780.0, {})])["sft"] is None  # far larger
    assert times("sft", [("tiny", 3.0, {"seed": 7})])["sft"] == 3.0


def test_a_new_arm_takes_as_long_as_another(times):
    asked = {"arms.more": {"reward": "robust", "nominal_weight": 0.9, "credible": 2.0, "seed": 4}}
    found = times("ppo-robust", [("tiny", 5.0, {})], asked)
    assert (found["ppo-robust"], found["ppo-more"], found["dpo-direct"]) == (5.0, 5.0, None)


def test_what_is_here_and_not_registered_is_told(times, project):
    times("sft", [("tiny", 3.0, {})])
    tiny = Project(project, "tiny", load_params(project, "tiny"))
    [sft] = tiny.store.all()
    planned = [Planned("sft", "reuse", [], None, sft.key), Planned("reward", "run", ["never made here"], None)]
    assert unregistered(tiny, planned) == ["sft"]
