"""One real flow on the tiny profile, with Prefect, MLflow on sqlite and DVC, as a person runs it: by command."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest
from finished import at_work
from typer.testing import CliRunner

from rrlhf.cli import app
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.tools.running.uptodate import nothing_to_do
from rrlhf.tools.serving import start_temporary_server

OTHERS = {"dpo-direct", "best_of_n-choosy"}
MODELS = {"sft", "reward", "ensemble", "ppo-single", "ppo-robust", "evaluate"} | OTHERS
POLICIES = {"ppo-single", "ppo-robust"}
NEW_WEIGHT = ("--set", "ppo.kl_weight=0.3")
DIVERGES = {"ppo.learning_rate": 10.0, "health.rollbacks": 0, "health.max_token_kl": 0.05}

pytestmark = pytest.mark.timeout(900)  # the first test waits for a whole run, also on a busy machine


class Done(NamedTuple):
    """What a command said."""

    out: str
    told: str

    @property
    def ran(self):
        return set(json.loads(self.out)["ran"])

    @property
    def cached(self):
        return set(re.findall(r"Task run '([a-z_-]+)' - Finished in state Cached", self.told))

    @property
    def folders(self):
        return json.loads(self.out)["folders"]


class Shell:
    """Runs the `rrlhf` command in a project folder."""

    def __init__(self, root, environment):
        self.root, self.environment = root, environment

    def __call__(self, *arguments, code=0):
        command = [sys.executable, "-m", "rrlhf", *arguments]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return Done(done.stdout, done.stderr)

    def begun(self, *arguments):
        """A run that goes on beside this process."""
        command, quiet = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny", *arguments], subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=quiet, stderr=quiet)

    def here(self, *arguments):
        """What a command prints in this process, which has the libraries imported, and the code as it was."""
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.stdout

    def dvc(self, *arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        environment = self.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *arguments):
        return self("run", "--profile", "tiny", "--json", *arguments)

    def planned(self, *arguments):
        return by_node(self.here("plan", "--profile", "tiny", "--json", *arguments))

    def planned_apart(self):
        """The plan of a process that reads the code as it is now."""
        return by_node(self("plan", "--profile", "tiny", "--json").out)


def by_node(told):
    return {node["node"]: node for node in json.loads(told)}


@pytest.fixture(scope="module")
def alone(shared_project):
    """As a person runs it who has no server."""
    return Shell(shared_project, {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")})


@pytest.fixture(scope="module")
def first(alone):
    """What the first run said, which started a server of its own."""
    return alone.run()


@pytest.fixture(scope="module")
def shell(alone, first):
    with at_work(alone.root), ExitStack() as services:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("atexit.register", services.callback)  # it stops with this module
            start_temporary_server(alone.root)()  # one for all other runs: starting one takes seconds
        yield Shell(alone.root, {**os.environ, "PREFECT_API_URL": os.environ.pop("PREFECT_API_URL")})


def actions(planned):
    return {name: node["action"] for name, node in planned.items() if node["action"] != "reuse"}


def test_the_first_run_makes_everything(first, shell):
    assert first.ran == MODELS | {"data"}
    assert first.cached == set()
    assert (shell.root / "reports" / "tiny.html").stat().st_size > 10_000
    assert "robust" in first.told
    assert "ERROR" not in first.told


def test_what_begins_is_told_before_it_has_ended(first):
    lines = first.told.splitlines()
    assert lines[0].startswith(f"1 to run, up to {len(MODELS)} after them")
    assert lines[1].startswith("starting: Prefect, MLflow")
    begun = [line.partition("  begins")[0] for line in lines if "  begins" in line]
    assert set(begun) == MODELS | {"data"}
    for node in begun:
        ended = next(line for line in lines if f"Task run '{node}' - Finished" in line)
        assert lines.index(next(line for line in lines if line.startswith(f"{node}  begins"))) < lines.index(ended)


def aliases(client):
    return dict(client.get_registered_model("rrlhf-tiny-policy").aliases)


def test_a_changed_setting_reruns_only_what_depends_on_it_and_going_back_nothing(first, shell, client):
    stand = aliases(client)
    assert set(stand) == {"candidate", "single", "robust", "direct"}
    assert actions(shell.planned(*NEW_WEIGHT)) == dict.fromkeys(POLICIES, "run") | {"evaluate": "upstream"}
    changed = shell.run(*NEW_WEIGHT, "--take-aliases")
    assert changed.ran == POLICIES | {"evaluate"}
    assert changed.cached == (MODELS | {"data"}) - changed.ran
    assert re.search(
        r"'ppo-robust' - Finished in state Completed\('ppo.kl_weight 0.01 -> 0.3; proxy \S+, kl ", changed.told
    )
    assert re.search(r"'reward' - Finished in state Cached\('heldout_accuracy \S+, made 20", changed.told)
    assert actions(shell.planned()) == actions(shell.planned(*NEW_WEIGHT)) == {}
    [latest, *_] = runs(client, "rrlhf.profile", "tiny")
    assert latest.info.run_name == "tiny · ppo.kl_weight=0.3"
    now = aliases(client)
    assert {name for name in now if now[name] != stand[name]} == {"candidate", "single", "robust"}
    assert f"rrlhf-tiny-policy@candidate: v{stand['candidate']} -> v{now['candidate']}" in changed.told.splitlines()

    back = shell.run()
    assert (back.ran, back.cached, back.folders) == (set(), MODELS | {"data"}, first.folders)
    assert f"rrlhf-tiny-policy@candidate: v{now['candidate']} -> v{stand['candidate']}" in back.told.splitlines()
    assert aliases(client) == stand


def test_a_killed_run_goes_on_from_its_checkpoint_by_the_same_command_and_moves_no_alias(first, shell, client):
    """test_interrupted.py compares the bits, too."""
    stand, updates = aliases(client), 20
    asked = ("--set", f"ppo.updates={updates}", "--set", "health.checkpoint_every=1", "--until", "ppo-single")
    saved = "artifacts/.staging/ppo-*/checkpoint/00000003*"
    with shell.begun(*asked) as process:
        while not any(shell.root.glob(saved)):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    [staged] = shell.root.glob("artifacts/.staging/ppo-*/history.jsonl")
    before = staged.read_text().splitlines()
    again = shell.run(*asked)
    assert again.ran == {"ppo-single"}
    history = (shell.root / again.folders["ppo-single"] / "history.jsonl").read_text().splitlines()
    assert history[:2] == before[:2]  # with the times of the run that was killed
    assert [json.loads(line)["step"] for line in history] == list(range(updates))
    flows = runs(client, "rrlhf.profile", "tiny")[:2]
    assert [run.info.status for run in flows] == ["FINISHED", "KILLED"]
    parts = [run for flow in flows for run in runs(client, "mlflow.parentRunId", flow.info.run_id)]
    assert sorted(run.info.status for run in parts if run.data.tags["rrlhf.node"] == "ppo-single") == [
        "FINISHED",
        "KILLED",
    ]
    assert "--take-aliases gives them to the models of this run" in again.told
    assert aliases(client) == stand


def test_the_plan_tells_the_first_reason(first, shell):
    planned = shell.planned("--set", "ppo.kl_weight=0.7")
    assert planned["ppo-single"]["reasons"][0].startswith("ppo.kl_weight")
    assert "ppo.kl_weight" in shell("plan", "--profile", "tiny", "--set", "ppo.kl_weight=0.7").out


def test_lineage_goes_back_to_the_data(first, shell):
    told = shell.here("lineage", "rrlhf-tiny-policy@candidate", "--profile", "tiny")
    assert all(
        name in told
        for name in ("rrlhf-tiny-policy", "rrlhf-tiny-ensemble", "rrlhf-tiny-reward", "rrlhf-tiny-sft", "data tiny")
    )


def test_policies_of_every_method_have_their_lineage(first, shell):
    direct = shell.here("lineage", "rrlhf-tiny-policy@direct", "--profile", "tiny")
    assert "dpo-direct" in direct
    assert "rrlhf-tiny-sft" in direct
    assert "rrlhf-tiny-reward" not in direct  # it reads the preferences alone
    choosy = shell.here("lineage", "rrlhf-tiny-best-of-n@choosy", "--profile", "tiny")
    assert all(
        name in choosy for name in ("best_of_n-choosy", "rrlhf-tiny-ensemble", "rrlhf-tiny-reward", "rrlhf-tiny-sft")
    )


def test_a_setting_of_one_method_reruns_that_method_alone(first, shell):
    assert actions(shell.planned("--set", "dpo.beta=0.3")) == {"dpo-direct": "run", "evaluate": "upstream"}


def test_without_a_server_a_run_with_nothing_to_do_starts_none_and_tells_the_same(first, shell, alone):
    before = [path.stat().st_mtime_ns for path in (shell.root / "mlflow.db", shell.root / "reports" / "tiny.html")]
    done = alone.run()
    assert (done.ran, done.folders) == (set(), first.folders)
    assert "nothing to do" in done.told
    assert "Task run" not in done.told
    assert "robust" in done.told
    assert json.loads(done.out) == json.loads(first.out) | {"ran": []}
    assert [
        path.stat().st_mtime_ns for path in (shell.root / "mlflow.db", shell.root / "reports" / "tiny.html")
    ] == before


def test_dvc_asks_for_a_data_set_by_the_same_command(first, alone):
    assert "python -m rrlhf run --profile tiny --only data" in alone.dvc("repro", "prepare@tiny")
    pointer = f"{first.folders['data']}.dvc"
    assert alone.dvc("status", pointer) == "Data and pipelines are up to date.\n"


def test_nothing_is_reported_that_is_not_so(first, shell):
    project = Project(shell.root, "tiny", load_params(shell.root, "tiny"))
    assert nothing_to_do(project, project.plan())
    other = Project(shell.root, "tiny", load_params(shell.root, "tiny", {"tracking.candidate": "single"}))
    assert nothing_to_do(other, other.plan()) is None  # an alias has to move
    html = shell.root / "reports" / "tiny.html"
    sound = html.read_bytes()
    html.write_bytes(sound + b" ")
    assert nothing_to_do(project, project.plan()) is None
    html.write_bytes(sound)
    asked = Project.opened(shell.root, "tiny", {"tracking.candidate": "single"})
    assert nothing_to_do(asked, asked.plan()) is None  # the report is that of another candidate
    with closing(sqlite3.connect(shell.root / "mlflow.db")) as database, database:
        database.execute("update registered_model_aliases set version = version + 100 where alias = 'robust'")
    assert nothing_to_do(project, project.plan()) is None
    with closing(sqlite3.connect(shell.root / "mlflow.db")) as database, database:
        database.execute("update registered_model_aliases set version = version - 100 where alias = 'robust'")
    assert nothing_to_do(project, project.plan())


class Payload:
    """What a pickle runs."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_record_of_prefects_is_read_or_written(first, shell):
    from prefect.results import ResultRecord, ResultRecordMetadata
    from prefect.serializers import PickleSerializer

    assert not (shell.root / ".rrlhf" / "results").exists()
    assert not list((shell.root / ".rrlhf" / "prefect").glob("storage/*"))
    fired = shell.root / "fired"
    folders = [shell.root / ".rrlhf" / "results", shell.root / ".rrlhf" / "prefect" / "storage"]
    for name in MODELS:
        key = Path(first.folders[name]).name
        metadata = ResultRecordMetadata(storage_key=key, expiration=None, serializer=PickleSerializer())
        record = ResultRecord(result=Payload(fired), metadata=metadata).serialize()
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(record)
    planted = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    try:
        assert shell.run("--until", "sft").cached >= {"data", "sft"}
        assert not fired.exists()
        assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == planted
    finally:
        for folder in folders:
            shutil.rmtree(folder)


@pytest.mark.slow  # tests/pipeline/test_tracking.py says it in short
def test_a_registered_copy_that_was_changed_is_warned_of_and_computed_past(first, shell, client):
    reward = shell.root / first.folders["reward"]
    [version] = client.search_model_versions(f"name = 'rrlhf-tiny-reward' and tags.`rrlhf.key` = '{reward.name}'")
    heads = Path(
        client.get_logged_model(version.source.removeprefix("models:/")).artifact_location.removeprefix("file://")
    )
    heads = heads / "artifact" / "heads.safetensors"
    sound = heads.read_bytes()
    heads.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    away = reward.rename(shell.root / "away")
    named = f"rrlhf-tiny-reward v{version.version} in MLflow is not what was made: heads.safetensors: expected sha256"
    try:
        told = shell("evaluate-reward", f"rrlhf-tiny-reward/{version.version}", "--profile", "tiny", code=3).told
        assert named in told
        assert "makes it again" in told
        done = shell.run("--until", "reward")
        assert done.ran == {"reward"}
        assert named in done.told
        assert actions(shell.planned()) == {}
    finally:
        heads.write_bytes(sound)
        shutil.rmtree(reward, ignore_errors=True)
        away.rename(reward)


@pytest.mark.slow
def test_a_forced_stage_that_repeats_itself_reruns_nothing_below_it(first, shell):
    assert actions(shell.planned("--force", "sft")) == {"sft": "run"}
    forced = shell.run("--force", "sft", "--force", "data", "--until", "reward")
    assert forced.ran == {"data", "sft"}
    assert forced.folders == first.folders
    assert shell.run().ran == set()


@pytest.mark.slow
def test_a_part_runs_alone_and_says_what_it_lacks(first, shell):
    new = ("--set", "reward.epochs=9")
    assert shell.run(*new, "--until", "reward").ran == {"reward"}
    planned = shell.planned(*new, "--only", "ensemble")
    assert actions(planned)["ensemble"] == "run"
    assert {planned[name]["action"] for name in POLICIES} == {"skip"}
    told = shell("run", "--profile", "tiny", *new, "--only", "evaluate", code=2).told
    assert "ensemble" in told
    assert "not part of this run" in told


@pytest.mark.slow
def test_a_deleted_model_is_restored_and_a_deleted_evaluation_made_again(first, shell):
    reward, evaluation = (shell.root / first.folders[name] for name in ("reward", "evaluate"))
    manifest = (reward / "artifact.json").read_bytes()
    shutil.rmtree(reward)
    shutil.rmtree(evaluation)
    planned = shell.planned()
    assert actions(planned) == {"reward": "restore", "evaluate": "run"}
    assert re.fullmatch(r"artifact missing, registered as rrlhf-tiny-reward v\d+", planned["reward"]["reasons"][0])
    assert planned["evaluate"]["reasons"] == ["artifact missing"]
    assert shell.run().ran == {"evaluate"}
    assert (reward / "artifact.json").read_bytes() == manifest


@pytest.mark.slow
def test_an_empty_tracking_server_is_filled_again_without_training(first, shell, tmp_path):
    registered = shutil.ignore_patterns("mlflow.db*", "mlartifacts")  # in a copy: MLflow's client here has these open
    copy = Shell(shutil.copytree(shell.root, tmp_path / "copy", ignore=registered), shell.environment)
    assert copy.run().ran == set()
    assert "rrlhf-tiny-sft" in copy("lineage", "rrlhf-tiny-policy@candidate", "--profile", "tiny").out


def test_a_changed_byte_is_refused_by_name_with_everything_built_on_it(first, shell):
    path = shell.root / first.folders["sft"] / "model.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        for command in (["plan", "--profile", "tiny"], ["run", "--profile", "tiny"]):
            told = shell(*command, code=3).told
            assert str(path) in told
            assert all(name in told for name in ("reward", "ensemble", *POLICIES))
            assert "Traceback" not in told
    finally:
        path.write_bytes(sound)
    assert actions(shell.planned()) == {}


def test_a_comment_or_an_unused_value_in_a_stage_changes_nothing_and_a_line_reruns_it(first, shell):
    source = shell.root / "rrlhf" / "stages" / "ppo.py"
    sound = source.read_text(encoding="utf-8")
    try:
        source.write_text("# why\n" + sound.replace('"""', '"""Why. ', 1) + "\nANSWER = 42\n", encoding="utf-8")
        assert actions(shell.planned_apart()) == {}
        source.write_text(sound.replace("seed=arm.seed)", "seed=arm.seed + 1)"), encoding="utf-8")
        planned = shell.planned_apart()
    finally:
        source.write_text(sound, encoding="utf-8")
    assert actions(planned) == dict.fromkeys(POLICIES, "run") | {"evaluate": "upstream"}
    assert planned["ppo-single"]["reasons"] == ["code: run changed"]


@pytest.fixture
def client(first, shell):
    from mlflow import MlflowClient

    database = f"sqlite:///{shell.root / 'mlflow.db'}"
    return MlflowClient(tracking_uri=database, registry_uri=database)


def runs(client, name, value):
    return client.search_runs([client.get_experiment_by_name("rrlhf").experiment_id], f"tags.`{name}` = '{value}'")


def versions(client):
    return {(found.name, found.version) for found in client.search_model_versions()}


@pytest.mark.slow
@pytest.mark.parametrize(("at_once", "arms"), [(1, ["ppo-single"]), (2, ["ppo-robust", "ppo-single"])])
def test_a_training_that_diverges_says_so_and_registers_nothing(first, shell, client, at_once, arms):
    registered, kept = versions(client), sorted((shell.root / "artifacts").glob("*/*/artifact.json"))
    settings = DIVERGES | {"launch.arms_at_once": at_once, "ppo.kl_weight": 0.1 * at_once}
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = shell("run", "--profile", "tiny", *options, code=1)
    said = done.told.splitlines()[-len(arms) :]
    assert sorted(line.split(" at step ")[0] for line in said) == [f"{arm} DIVERGED" for arm in arms]
    assert all("kl_blowup (KL to the reference of" in line and "nats per token" in line for line in said)
    assert all("Nothing of it is saved or registered" in line and "ppo.learning_rate" in line for line in said)
    assert "Traceback" not in done.told
    assert versions(client) == registered
    assert sorted((shell.root / "artifacts").glob("*/*/artifact.json")) == kept
    assert actions(shell.planned()) == {}

    flow = runs(client, "rrlhf.profile", "tiny")[0]
    assert flow.info.status == "FAILED"
    failed = runs(client, "mlflow.parentRunId", flow.info.run_id)
    assert sorted(run.data.tags["rrlhf.node"] for run in failed) == arms
    for run in failed:
        assert run.info.status == "FAILED"
        assert re.fullmatch(r"DIVERGED: kl_blowup \(step \d+\)", run.data.tags["rrlhf.health"])
        assert {"health.json", "samples.json"} <= {entry.path for entry in client.list_artifacts(run.info.run_id)}


def test_a_healthy_training_is_tagged_so_and_keeps_what_it_wrote(first, shell, client):
    folder = shell.root / first.folders["ppo-robust"]
    [run] = runs(client, "rrlhf.key", folder.name)
    assert run.data.tags["rrlhf.health"] == "healthy"
    told = Path(client.download_artifacts(run.info.run_id, "samples.json"))
    table = json.loads(told.read_bytes())
    written = json.loads((folder / "samples.json").read_bytes())
    column = table["columns"].index("response")
    assert [row[column] for row in table["data"]] == [row["response"] for row in written]
    page = (shell.root / "reports" / "tiny.html").read_text(encoding="utf-8")
    assert "No detector fired in any training." in page
    assert "What they wrote as they trained" in page


@pytest.mark.slow
def test_a_secret_in_an_error_of_a_reward_function_is_kept_nowhere(first, shell):
    canaries = {"LEAKY_API_KEY": "c4n4ry-of-a-name", "ELSEWHERE": "http://user:c4n4ry-of-an-address@host"}
    text = "import os\ndef leaks(**_):\n    raise RuntimeError(os.environ['LEAKY_API_KEY'] + os.environ['ELSEWHERE'])\n"
    (shell.root / "leaky.py").write_text(text)
    leaking, function = Shell(shell.root, shell.environment | canaries), "arms.robust.functions={leaky:leaks: 0.1}"
    done = leaking("run", "--profile", "tiny", "--set", function, code=1)
    assert "leaky:leaks" in done.told
    assert "[redacted]" in done.told
    assert "c4n4ry" not in done.out + done.told
    holding = [path for path in shell.root.rglob("*") if path.is_file() and b"c4n4ry" in path.read_bytes()]
    assert holding == []


def test_mistakes_end_a_run_before_anything_starts(shell):
    done = shell("run", "--profile", "tiny", "--set", "ppo.kl_weight=-1", "--set", "ppo.upd=3", code=2)
    assert len(done.told.splitlines()) == 2
    assert "did you mean updates?" in done.told


def test_a_server_that_does_not_answer_is_named(shell):
    away = Shell(shell.root, shell.environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert "unset PREFECT_API_URL" in away("run", "--profile", "tiny", code=1).told


LOOKING = """
import sys
from rrlhf.cli import main
for command in ("--help", "plan --profile tiny", "why evaluate --profile tiny", "status"):
    sys.argv = ["rrlhf", *command.split()]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, sorted({"torch", "transformers", "mlflow", "prefect"} & set(sys.modules)), file=sys.stderr)
"""


def test_looking_imports_nothing_heavy(shell):
    done = subprocess.run(
        [sys.executable, "-c", LOOKING], cwd=shell.root, env=shell.environment, capture_output=True, text=True
    )
    assert done.stderr.splitlines() == ["0 []"] * 4


def test_results_of_other_code_are_accepted_on_record_and_nothing_computes_again(first, shell):
    with (shell.root / "rrlhf" / "models" / "text.py").open("a", encoding="utf-8") as source:
        source.write("\nassert True\n")
    assert shell.planned_apart()["data"]["action"] == "run"
    asked = ("--profile", "tiny", "--because", "a check that never fails")
    assert "accept or run that first" in shell("accept", "reward", *asked, code=2).told
    accepted = shell("accept", *asked).out.splitlines()
    assert {line.partition("  accepted from ")[0] for line in accepted} == MODELS | {"data"}
    planned = shell.planned_apart()
    assert actions(planned) == {}
    assert {tuple(node["reasons"]) for node in planned.values()} == {("accepted: a check that never fails",)}
    again = shell.run()
    assert again.ran == set()
    card = (shell.root / again.folders["ppo-robust"] / "README.md").read_text(encoding="utf-8")
    assert "made by other code" in card
    told = shell("audit", "--profile", "tiny").out
    assert "sound: " in told
    assert "ppo-robust" in told
    assert "a check that never fails" in told
