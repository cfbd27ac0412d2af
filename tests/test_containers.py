"""Files for containers, as the tools read them that start such: Docker's own compose, and what Kubernetes takes."""

import asyncio
import json
import subprocess
from importlib.resources import files
from pathlib import Path
from uuid import uuid4

import pytest

pytestmark = pytest.mark.scale

ROOT = Path(__file__).parents[1]
SECRETS = {name: f"secret{name}" for name in ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
REASON = "of the extra scale: `make test-scale` installs it"


def compose(environment):
    """What Docker's compose makes of the file, and with which exit code."""
    pytest.importorskip("compose", reason=REASON)
    program = str(files("compose") / "docker-compose")
    command = [
        program,
        "--file",
        ROOT / "containers" / "compose.yaml",
        "--env-file",
        "/dev/null",
        "config",
        "--format",
        "json",
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_compose_takes_the_file_whose_services_are_watched_and_wait_for_each_other():
    done = compose(SECRETS)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    build = services["worker"]["build"]
    assert Path(build["context"], build["dockerfile"]) == ROOT / "containers" / "Dockerfile"
    assert set(services) == {"postgres", "s3", "mlflow", "prefect", "worker"}
    assert all(each["healthcheck"]["test"] for each in services.values())
    waits = [each for service in services.values() for each in service.get("depends_on", {}).values()]
    assert {each["condition"] for each in waits} == {"service_healthy"}
    assert services["worker"]["stop_grace_period"] == "15m0s"
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


@pytest.mark.parametrize("secret", SECRETS)
def test_every_secret_of_compose_comes_from_the_environment(secret):
    done = compose({name: value for name, value in SECRETS.items() if name != secret})
    assert done.returncode
    assert f"required variable {secret} is missing a value" in done.stderr


def test_kubernetes_takes_the_job_that_prefect_renders():
    reason = f"without prefect-kubernetes and kubernetes-validate, {REASON}"
    worker = pytest.importorskip("prefect_kubernetes.worker", reason=reason)
    validate = pytest.importorskip("kubernetes_validate", reason=reason).validate
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import PREFECT_API_URL, temporary_settings

    template = json.loads((ROOT / "k8s" / "job-template.json").read_text())
    rendered = worker.KubernetesWorkerJobConfiguration.from_template_and_values
    told = {"image": "rrlhf", "gpus": 8, "env": {"RRLHF_STORE": "s3://bucket/rrlhf"}}
    with temporary_settings({PREFECT_API_URL: "http://prefect:4200/api"}):  # which is not asked
        job = asyncio.run(rendered(template, told))
    job.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="tiny"))
    pod = job.job_manifest["spec"]["template"]["spec"]
    for name in ("parallelism", "completions"):  # Prefect wants them in this place, where Kubernetes knows none
        assert pod.pop(name) == 1
    validate(job.job_manifest, "1.37", strict=True)
    [container] = pod["containers"]
    assert {"name": "RRLHF_STORE", "value": "s3://bucket/rrlhf"} in container["env"]
