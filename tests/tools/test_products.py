"""Promote, reproduce, sweep and chat on finished models, by command, with MLflow on sqlite."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import chat_server
from classifiers import GPT, saved
from finished import Finished, at_work
from typer.testing import CliRunner

from rrlhf.cli import app

PPO_ONLY = ("--set", "arms.direct=null", "--set", "arms.choosy=null")
LOOSE = ("--set", "gates.min_win_rate=0.0", "--set", "gates.max_sigma=null")
ROBUST, SINGLE = "rrlhf-tiny-policy@robust", "rrlhf-tiny-policy@single"

pytestmark = pytest.mark.timeout(900)  # the first test waits for a whole run, also on a busy machine


class Shell:
    """Runs `rrlhf` commands on the tiny profile: in this process, which has everything imported, or in their own."""

    def __init__(self, root):
        self.root = root

    def __call__(self, name, *arguments, code=0, given=None):
        done = CliRunner().invoke(app, [name, *arguments, "--profile", "tiny"], input=given)
        assert done.exit_code == code, done.output
        return done

    def apart(self, name, *arguments, code=0):
        command = [sys.executable, "-m", "rrlhf", name, *arguments, "--profile", "tiny"]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments, **options):
        return json.loads(self(*arguments, "--json", **options).stdout)


@pytest.fixture(scope="module")
def shell(shared_project, database):
    shutil.copy(database, shared_project)
    with at_work(shared_project):
        Finished(shared_project, {"arms.direct": None, "arms.choosy": None})
        yield Shell(shared_project)


@pytest.fixture
def client(shell):
    from mlflow import MlflowClient

    database = f"sqlite:///{shell.root / 'mlflow.db'}"
    return MlflowClient(tracking_uri=database, registry_uri=database)


def champion(client):
    return client.get_registered_model("rrlhf-tiny-policy").aliases.get("champion")


def evidence(client, version):
    tags = client.get_model_version("rrlhf-tiny-policy", str(version)).tags
    run = client.get_model_version("rrlhf-tiny-policy", str(version)).run_id
    kept = Path(client.download_artifacts(run, tags["rrlhf.gates.evidence"]))
    return tags, json.loads(kept.read_bytes())


def number(client, alias):
    return str(client.get_model_version_by_alias("rrlhf-tiny-policy", alias).version)


def test_a_version_that_fails_a_gate_is_refused_with_evidence(shell, client):
    done = shell("promote", ROBUST, "--set", "gates.min_win_rate=0.99", "--set", "gates.max_kl=0.0", code=1)
    assert done.stderr.splitlines()[-1] == "refused: win_rate, kl"
    assert champion(client) is None
    tags, kept = evidence(client, number(client, "robust"))
    assert tags["rrlhf.gates"] == "refused: win_rate, kl"
    assert kept["failed"] == ["win_rate", "kl"]
    assert kept["against"] == "the SFT model that it started from"
    assert {gate["name"] for gate in kept["gates"]} == {"win_rate", "kl", "sigma", "length", "repetition", "audit"}
    assert kept["judge"] == "gold"


def test_an_override_promotes_and_its_reason_stays_with_the_version(shell, client):
    told = shell.json("promote", ROBUST, "--set", "gates.min_win_rate=0.99", "--override", "noise will do")
    assert told["decision"] == "overridden"
    assert str(champion(client)) == number(client, "robust")
    tags, kept = evidence(client, number(client, "robust"))
    assert tags["rrlhf.gates.override"] == kept["override"] == "noise will do"


def test_the_next_version_has_to_beat_the_champion(shell, client):
    assert "is the champion already" in shell("promote", ROBUST, code=1).stderr
    told = shell.json("promote", SINGLE, *LOOSE)
    assert told["against"] == f"rrlhf-tiny-policy/{number(client, 'robust')}"
    assert told["decision"] == "promoted"
    assert "sigma" not in {gate["name"] for gate in told["gates"]}
    assert str(champion(client)) == number(client, "single")


def judged_by(**judge):
    return "--set", f"evaluate.judge={json.dumps(judge)}"


def test_a_reward_model_of_ones_own_decides(shell, tmp_path):
    base = saved(tmp_path / "judge", GPT)
    told = shell.json("promote", ROBUST, "--to", "pleasing", *LOOSE, *judged_by(base=base))
    assert (told["decision"], told["judge"]) == ("promoted", base)
    by_gold = shell.json("promote", ROBUST, "--to", "plain", *LOOSE)
    for policy in ("candidate", "opponent", "start"):
        assert told["means"][policy]["words"] == by_gold["means"][policy]["words"]  # the same responses
        assert told["means"][policy]["judged"] != by_gold["means"][policy]["judged"]


def test_a_judge_that_is_asked_decides(shell):
    with chat_server(lambda _: "[[A]]") as (address, requests):  # the first, in either order: a tie
        judge = judged_by(address=address, name="judge", key_variable=None)
        told = shell.json("promote", SINGLE, "--to", "liked", *LOOSE, *judge)
    assert (told["decision"], told["judge"]) == ("promoted", "judge")
    assert next(gate["value"] for gate in told["gates"] if gate["name"] == "win_rate") == 0.5
    assert requests


def test_data_that_the_version_does_not_come_from_judge_nothing(shell):
    said = shell("promote", ROBUST, "--set", "prepare.limit=100", code=1).stderr
    assert "name the --profile and --set that it was made with" in said


def test_a_policy_is_made_again_bit_by_bit_the_whole_way_up(shell):
    kept = sorted((shell.root / "artifacts").rglob("*"))
    told = shell.json("reproduce", ROBUST)
    assert [stage["name"] for stage in told["stages"]] == ["data", "sft", "reward", "ensemble", "ppo-robust"]
    assert told["verdict"] == "bit-equal"
    assert told["changed"] == {}
    assert sorted((shell.root / "artifacts").rglob("*")) == kept
    assert not list((shell.root / ".rrlhf").glob("reproduce-*"))


@pytest.mark.slow
def test_changed_code_is_told_first_and_the_first_difference_is_named(shell):
    source = shell.root / "rrlhf" / "stages" / "ppo.py"
    sound = source.read_text(encoding="utf-8")
    try:
        source.write_text(sound.replace("seed=arm.seed)", "seed=arm.seed + 1)"), encoding="utf-8")
        done = shell.apart("reproduce", ROBUST, "--only", "--keep", "again", code=1)
    finally:
        source.write_text(sound, encoding="utf-8")
    assert "ppo-robust is not what it was made with: code: run changed" in done.stderr
    assert "differs; it first does in ppo-robust" in done.stdout
    assert "its training first parted at step" in done.stdout
    assert list((shell.root / "again").glob("*-ppo-robust/model.safetensors"))
    assert "exists already" in shell("reproduce", ROBUST, "--only", "--keep", "again", code=2).stderr


@pytest.mark.slow
def test_a_sweep_makes_what_differs_once_and_compares_it(shell, client):
    robust = number(client, "robust")
    grid = ["arms.robust.nominal_weight=0.4,0.9", "arms.robust.seed=1,2"]
    told = json.loads(shell.apart("sweep", *grid, *PPO_ONLY, "--baseline", "single", "--json").stdout)
    assert sorted(told["ran"]) == ["evaluate"] * 3 + ["ppo-robust"] * 3  # one point is that of the run
    rows = {(row["policy"], *row["settings"].values()): row for row in told["rows"]}
    assert set(rows) == {("sft",), ("single",), ("robust", 0.4), ("robust", 0.9)}
    assert rows["robust", 0.9]["metrics"]["gold"]["over"] == "seeds"
    assert rows["single",]["metrics"]["gold"]["over"] == "prompts"
    assert len({version for row in told["rows"] for version in row["versions"]}) == 6
    assert all((shell.root / file).stat().st_size for file in told["files"])
    paired = {
        row["settings"]["arms.robust.nominal_weight"]: row
        for row in told["evidence"]["paired"]
        if (row["policy"], row["quantity"]) == ("robust", "gold")
    }
    means = {weight: rows["robust", weight]["metrics"]["gold"]["mean"] for weight in (0.4, 0.9)}
    against = rows["single",]["metrics"]["gold"]["mean"]
    assert {weight: row["difference"] for weight, row in paired.items()} == pytest.approx(
        {weight: mean - against for weight, mean in means.items()}
    )
    assert {row["seeds"] for row in paired.values()} == {2}
    assert number(client, "robust") == robust

    experiment = client.get_experiment_by_name("rrlhf").experiment_id
    [sweep] = client.search_runs(
        [experiment], "attributes.run_name = 'sweep tiny · arms.direct=null · arms.choosy=null'"
    )
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'")
    assert len(below) == 4
    assert {run.info.status for run in [sweep, *below]} == {"FINISHED"}
    assert {entry.path for entry in client.list_artifacts(sweep.info.run_id)} == {
        "sweep.json",
        "courses.png",
        "courses.svg",
        "sweep.md",
    }


def test_mistakes_in_a_grid_end_it_before_anything_starts(shell):
    assert "ppo.kl_weight" in shell("sweep", "ppo.kl_weight=-1,0", code=2).stderr
    assert "expected settings and values" in shell("sweep", "ppo.kl_weight", code=2).stderr


def test_two_models_answer_with_the_ensembles_scores(shell):
    told = shell.json("chat", ROBUST, "rrlhf-tiny-sft@latest", "-p", "Say a.")
    assert [answer["model"] for answer in told["answers"]] == [ROBUST, "rrlhf-tiny-sft@latest"]
    assert all(len(answer["score"]["heads"]) == 3 for answer in told["answers"])
    folder = next((shell.root / "artifacts" / "ppo").iterdir())
    assert shell.json("chat", str(folder), given="Say a.\n")["prompt"] == "Say a."
    assert "answers nothing" in shell("chat", "rrlhf-tiny-ensemble@latest", "-p", "a", code=2).stderr
