"""What `rrlhf status` and `rrlhf why` say of a project's folder."""

import fcntl
import json
import shlex

import pytest

from rrlhf.pipeline.decide import Part
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params, parse_override
from rrlhf.pipeline.plan import Project
from rrlhf.tools.running.status import last_run, noted, overview, told


@pytest.fixture
def command(project, monkeypatch, typed):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", "")
    return typed


@pytest.fixture
def staged(project, monkeypatch):
    """The staging folder of the tiny profile's data, as a killed run leaves it."""
    monkeypatch.chdir(project)
    found = Project(project, "tiny", load_params(project, "tiny"))
    key = key_digest(found.document(found.nodes[0], {}))
    folder = found.store.staging("prepare", key)
    (folder / "checkpoint" / "00000007").mkdir(parents=True)
    (folder / "checkpoint" / "00000004").mkdir()
    lock = project / "artifacts" / ".locks" / key
    lock.parent.mkdir()
    lock.touch()
    return project, lock


def test_what_was_interrupted_is_told_with_the_command_that_goes_on(staged):
    root, _ = staged
    found = overview(root)
    assert [(work["nodes"], work["steps"]) for work in found["interrupted"]] == [(["tiny/data"], 7)]
    assert found["running"] == []
    assert any("saved after step 7; goes on with `rrlhf run --profile tiny`" in line for line in told(found))


def test_what_runs_is_told_with_its_process(staged):
    root, lock = staged
    with lock.open("r+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("process 12345, at work since 10:00:00")
        handle.flush()
        found = overview(root)
        assert "process 12345" in found["running"][0]["holder"]
        assert found["interrupted"] == []
        assert any("running: tiny/data" in line and "process 12345" in line for line in told(found))


def test_the_last_run_is_noted_however_it_ends(tmp_path):
    def interrupted():
        with noted(tmp_path, "tiny", {"seed": 2}, Part(until=("sft",))) as ran:
            assert last_run(tmp_path, "tiny")["status"] == "running"
            ran.append("sft")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    found = last_run(tmp_path, "tiny")
    assert (found["status"], found["ran"], found["overrides"]) == ("interrupted", ["sft"], {"seed": 2})
    assert found["part"] == {"until": ["sft"]}


def test_status_counts_every_profile(command):
    code, out, _ = command("status", "--json")
    assert code == 0
    profiles = {state["profile"]: state for state in json.loads(out)["profiles"]}
    assert set(profiles) >= {"default", "tiny"}
    assert profiles["tiny"]["to_do"]["data"] == "run: never made here"


def test_the_overrides_of_the_last_run_can_be_pasted(command, project):
    given = {
        "prefect.limit": None,
        "seed": 2,
        "arms.a b": {"reward": "robust", "nominal_weight": 1e-5, "credible": 2.0, "seed": 1},
    }
    with noted(project, "tiny", given, Part()):
        pass
    _, out, _ = command("status")
    options = shlex.split(next(line for line in out.splitlines() if "--set" in line).partition(" --set ")[2])
    assert dict(parse_override(each) for each in options if each != "--set") == given


def test_why_goes_back_to_the_first_cause(command):
    code, out, _ = command("why", "evaluate", "--profile", "tiny")
    assert code == 0
    assert "data: never made here" in out
    code, _, told_ = command("why", "evalaute", "--profile", "tiny")
    assert (code, "did you mean evaluate?" in told_) == (2, True)


def test_contradictions_are_usage_errors(command):
    code, _, told_ = command("plan", "--profile", "tiny", "--only", "sft", "--until", "ppo")
    assert (code, "goes with neither" in told_) == (2, True)
    code, _, told_ = command("plan", "--profile", "tiny", "--from", "ensemble")
    assert code == 2
    assert "reward is needed and not up to date" in told_
    code, out, _ = command("plan", "--profile", "tiny", "--until", "sft", "--json")
    assert code == 0
    assert {one["node"]: one["action"] for one in json.loads(out)}["reward"] == "skip"
