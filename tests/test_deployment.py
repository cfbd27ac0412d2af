"""Deployments as a person uses them: `rrlhf serve`, Prefect's command, and what Prefect's pages then hold."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from rrlhf.pipeline.plan import Planned

ROOT = Path(__file__).parents[1]
MODELS = {"sft", "reward", "ensemble", "ppo-single", "ppo-robust", "evaluate"}
OVERRIDE = {"arms.robust.nominal_weight": 0.7}

pytestmark = pytest.mark.timeout(900)  # services start slowly on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(found, seconds=240):
    """Return the first true answer."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if answer := found():
            return answer
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s: {found}")


def of_run(run):
    """The filter for what belongs to a flow run."""
    return {"flow_runs": {"id": {"any_": [run]}}}


class Served:
    """A project whose services run."""

    def __init__(self, root):
        self.root, prefect, self.mlflow = root, free_port(), free_port()
        self.api = f"http://127.0.0.1:{prefect}/api"
        self.environment = os.environ | {"PREFECT_API_URL": self.api, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        ports = ["--prefect-port", str(prefect), "--mlflow-port", str(self.mlflow)]
        plain = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        self.log = root / "serve.log"
        command = [sys.executable, "-m", "rrlhf", "serve", *ports]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=root, env=plain, stdout=output, stderr=output)
        until(lambda: "Ctrl-C stops" in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def ask(self, path, content=None):
        request = urllib.request.Request(f"{self.api}/{path}", headers={"content-type": "application/json"})
        request.data = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def run(self, *options, deployment="reward-robust-rlhf/tiny"):
        """Run a deployment as a person would; return the id of its run."""
        command = [sys.executable, "-m", "prefect", "deployment", "run", deployment, "--watch", *options]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        log = (self.root / ".rrlhf" / "serve" / "worker.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
        return re.search(r"UUID: (\S+)", done.stdout)[1]

    def tasks(self, run):
        """The states of a run's tasks, by task; they come to the server as events, a little later than the run's."""

        def ended():
            found = {task["name"]: task["state_name"] for task in self.ask("task_runs/filter", of_run(run))}
            return set(found.values()) <= {"Completed", "Cached"} and "evaluate" in found and found

        return until(ended)

    def artifacts(self, run):
        """What a run shows in Prefect's pages, by key."""
        found = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def automations(self):
        return self.ask("automations/filter", {})

    def declare(self, file):
        """Have the automations of a file, as `rrlhf serve` does when it starts."""
        from prefect.settings import PREFECT_API_URL, temporary_settings

        from rrlhf.execution.automations import declare

        with temporary_settings({PREFECT_API_URL: self.api}):
            declare(file)


@pytest.fixture(scope="module")
def served(shared_project, database):
    shutil.copy(database, shared_project)
    for name in ("prefect.yaml", "automations.yaml"):
        shutil.copy(ROOT / name, shared_project / name)
    tiny = shared_project / "profiles" / "tiny.yaml"
    settings = yaml.safe_load(tiny.read_text())
    del settings["arms"]  # of other methods
    settings["prepare"]["limit"] = 64  # half as much for the judge to read
    tiny.write_text(yaml.safe_dump(settings))
    services = Served(shared_project)
    yield services
    services.process.terminate()
    assert services.process.wait(60) == 128 + signal.SIGTERM, services.log.read_text()
    with pytest.raises(OSError, match="refused"):
        services.ask("health")


@pytest.fixture(scope="module")
def first(served):
    return served.run()


@pytest.fixture(scope="module")
def changed(first, served):
    return served.run("-p", f"overrides={json.dumps(OVERRIDE)}")


def test_every_profile_is_deployed_and_the_sweep(served):
    found = {each["name"]: each for each in served.ask("deployments/filter", {})}
    profiles = {path.stem for path in (ROOT / "profiles").glob("*.yaml")}
    assert set(found) == profiles | {"default", "sweep"}
    assert all(each["description"] and "rrlhf" in each["tags"] and each["version"] for each in found.values())
    limited = {name for name, each in found.items() if each["global_concurrency_limit"]}
    assert limited == set(found) - {"tiny"}


def test_the_schedule_in_the_comments_is_one(tmp_path):
    text = (ROOT / "prefect.yaml").read_text()
    commented = re.search(r"^    # schedules:\n(?:    # .*\n)+", text, re.MULTILINE)[0]
    [schedule] = yaml.safe_load(commented.replace("    # ", ""))["schedules"]
    from prefect.client.schemas.schedules import CronSchedule

    CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert set(schedule["parameters"]) <= {"profile", "overrides", "part"}


def test_prefect_takes_the_template_of_jobs_on_kubernetes_which_get_gpus():
    from prefect.server.schemas.actions import WorkPoolCreate
    from prefect.utilities.templating import apply_values

    template = json.loads((ROOT / "k8s" / "job-template.json").read_text())
    WorkPoolCreate(name="rrlhf", type="kubernetes", base_job_template=template)
    known = {name: each.get("default", name) for name, each in template["variables"]["properties"].items()}
    pod = apply_values(template["job_configuration"], known)["job_manifest"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["envFrom"] == [{"secretRef": {"name": "rrlhf"}}]


def test_the_first_run_makes_everything_and_shows_it(first, served):
    assert set(served.tasks(first).values()) == {"Completed"}
    found = served.artifacts(first)
    kinds = {"plan": "table", "progress": "progress", "comparison": "markdown", "lineage": "markdown"}
    assert {key: each["type"] for key, each in found.items()} == {
        f"{kind}-tiny": type for kind, type in (kinds | {"report": "markdown"}).items()
    }
    assert {row["node"] for row in json.loads(found["plan-tiny"]["data"])} == MODELS | {"data"}
    assert found["progress-tiny"]["data"] == 100
    assert all(f"| {name}" in found["comparison-tiny"]["data"] for name in ("sft", "single", "robust"))
    page = f"http://127.0.0.1:{served.mlflow}/#/models/rrlhf-tiny-policy/versions/2"
    assert f"- [rrlhf-tiny-policy v2]({page})" in found["lineage-tiny"]["data"]
    assert f"[robust]({page})" in found["comparison-tiny"]["data"]
    assert "rrlhf-tiny-policy v2" in found["lineage-tiny"]["description"]
    assert served.ask(f"flow_runs/{first}")["name"] == "tiny"
    said = {task["name"]: task["state"]["message"] for task in served.ask("task_runs/filter", of_run(first))}
    assert said["reward"].startswith("never made here; heldout_accuracy ")
    assert said["register-sft"] == "registered as rrlhf-tiny-sft v1"


def test_the_report_is_linked_where_mlflow_shows_it(first, served):
    link = re.search(r"\((.+)\)", served.artifacts(first)["report-tiny"]["data"])[1]
    pages, experiment, run, name = re.fullmatch(r"(.+)/#/experiments/(.+)/runs/(.+)/artifacts/(.+)", link).groups()
    assert pages == f"http://127.0.0.1:{served.mlflow}"
    with urllib.request.urlopen(f"{pages}/get-artifact?path={name}&run_uuid={run}", timeout=30) as answer:
        assert answer.read() == (served.root / "reports" / "tiny.html").read_bytes()
    assert experiment.isdigit()


@pytest.mark.slow
def test_an_override_of_one_arm_reruns_what_depends_on_it(changed, served):
    tasks = served.tasks(changed)
    assert {name for name, state in tasks.items() if state == "Cached"} == (MODELS | {"data"}) - {
        "ppo-robust",
        "evaluate",
    }
    found = served.artifacts(changed)
    assert served.ask(f"flow_runs/{changed}")["name"] == "tiny · arms.robust.nominal_weight=0.7"
    rows = {row["node"]: row for row in json.loads(found["plan-tiny"]["data"])}
    assert rows["ppo-robust"]["first reason"] == "arm.nominal_weight 0.4 -> 0.7"
    assert found["plan-tiny"]["description"].startswith("1 to run, up to 1 after them; ")
    assert "nominal weight 0.7" in found["comparison-tiny"]["data"]


@pytest.mark.slow
def test_a_run_with_nothing_to_do_shows_every_stage_and_leaves_mlflow_alone(changed, served):
    before = (served.root / "mlflow.db").stat().st_mtime_ns
    again = served.run("-p", f"overrides={json.dumps(OVERRIDE)}")
    assert served.tasks(again) == dict.fromkeys(MODELS | {"data"}, "Cached")
    found = served.artifacts(again)
    assert set(found) == {"plan-tiny", "progress-tiny", "comparison-tiny"}
    assert found["plan-tiny"]["description"] == "Nothing is to be done."
    assert (served.root / "mlflow.db").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_sweep_makes_what_no_earlier_run_made_and_shows_the_comparison(changed, served):
    grid = {"arms.robust.nominal_weight": [0.4, 0.7, 1.0]}
    options = ["-p", "profile=tiny", "-p", f"grid={json.dumps(grid)}"]
    run = served.run(*options, deployment="reward-robust-rlhf-sweep/sweep")
    assert "ppo-robust" in served.tasks(run)
    [shown] = [each for key, each in served.artifacts(run).items() if key.startswith("sweep")]
    assert all(f"robust nominal\\_weight {weight}" in shown["data"] for weight in (0.4, 0.7, 1))
    [told] = (served.root / "reports" / "sweeps").glob("*/sweep.json")
    assert json.loads(told.read_text())["grid"] == grid
    made = {path.name: json.loads((path / "artifact.json").read_text()) for path in served.root.glob("artifacts/ppo/*")}
    weights = [each["document"]["params"]["arm"].get("nominal_weight") for each in made.values()]
    assert sorted(filter(None, weights)) == [0.4, 0.7, 1.0], "each policy is made once"


def test_automations_are_made_once_and_brought_up_to_date(served):
    [made] = served.automations()
    assert made["trigger"]["posture"] == "Proactive"
    served.declare(ROOT / "automations.yaml")
    assert served.automations() == [made]
    served.declare(soon(served.root))
    [updated] = served.automations()
    assert (updated["id"], updated["trigger"]["within"]) == (made["id"], 10)


def soon(root):
    """The same automations with Prefect's shortest waiting time: runs longer than that would have to beat faster."""
    path = root / "soon.yaml"
    path.write_text(re.sub(r"within: \d+", "within: 10", (ROOT / "automations.yaml").read_text()))
    return path


@pytest.mark.slow
def test_a_run_that_was_killed_is_crashed(first, served):
    served.declare(soon(served.root))
    command = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny", "--set", "sft.epochs=50"]
    output = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=served.root, env=served.environment, stdout=output, stderr=output, start_new_session=True
    )
    running = {"flow_runs": {"state": {"name": {"any_": ["Running"]}}}}
    try:
        [run] = until(lambda: served.ask("flow_runs/filter", running))
        beat = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
        beat["filter"]["resource"] = {"id": [f"prefect.flow-run.{run['id']}"]}
        until(lambda: served.ask("events/filter", beat)["events"])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    state = until(lambda: (found := served.ask(f"flow_runs/{run['id']}")["state"])["type"] != "RUNNING" and found)
    assert state["type"] == "CRASHED"
    assert "heartbeat" in state["message"]


@pytest.fixture
def told_of():
    """A server that takes messages: its address, and what was sent to it."""
    messages = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self):
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Taking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", messages
        server.shutdown()


@pytest.mark.slow
def test_a_run_that_fails_is_told_by_the_automation_in_the_comments(served, told_of):
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import PREFECT_API_URL, temporary_settings

    address, messages = told_of
    with temporary_settings({PREFECT_API_URL: served.api}):
        sends = {"subject": "{{subject}}", "body": "{{body}}"}
        block = CustomWebhookNotificationBlock(name="test", url=address, json_data=sends).save("told", overwrite=True)
    file, nobody = served.root / "told.yaml", "00000000-0000-0000-0000-000000000000"
    text = (ROOT / "automations.yaml").read_text().replace("  # - name", "  - name").replace("  #   ", "    ")
    file.write_text(text.replace(nobody, str(block)))
    served.declare(file)
    with pytest.raises(AssertionError, match="no_such"):
        served.run("-p", 'overrides={"ppo.no_such": 1}')
    [message] = until(lambda: [each for each in messages if "ppo.no_such" in each["body"]])  # of others, their own
    assert message["subject"].endswith(": Failed")
    assert "/runs/flow-run/" in message["body"]


@pytest.fixture
def refusing():
    """A server that refuses everything, and what it was asked: first of all for a token, which most do without."""
    requests = []

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(422)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Artifact creation outside")
def test_a_server_that_takes_no_artifacts_is_told_of_once(refusing, capsys):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from rrlhf.execution.pages import Pages

    address, requests = refusing
    with temporary_settings({PREFECT_API_URL: address}):
        pages = Pages("tiny")
        pages.plan([Planned("sft", "run", ["never made here"], 3.0)])
        pages.advance(["sft"])
        pages.sweep("a table", ["sweep.json"])
    assert len(requests) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "takes no artifacts; the run goes on" in line
