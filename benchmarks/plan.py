"""How long it takes to find that nothing is to be done: `rrlhf plan` and `rrlhf run` against `dvc repro` and Prefect.

`python benchmarks/plan.py [--stages 9 100] [--turns 5] [--run]`. Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROJECT = [".dvc/config", ".dvcignore", "dvc.yaml", "large", "params.yaml", "profiles", "rrlhf", "flows"]
FIXED = 7  # nodes of the profile besides the members of its ensemble: data, sft, reward, ensemble, two arms, evaluate
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))} | {
    "OMP_NUM_THREADS": "1",
    "DVC_NO_ANALYTICS": "1",
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}

# Every stage reads the file of the one before it and writes its own.
STAGE = """
import sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.write_text(str(int(source.read_text()) + 1))
"""

FLOW = """
import sys
from pathlib import Path
from prefect import flow, task
from prefect.cache_policies import INPUTS

@task(cache_policy=INPUTS, persist_result=True, result_storage=Path("results"), result_serializer="json")
def stage(value: int, number: int) -> int:
    Path(f"{number}.txt").write_text(str(value + 1))
    Path("ran.txt").open("a").write(f"{number}\\n")
    return value + 1

@flow(log_prints=False)
def chain(stages: int) -> int:
    value = 0
    for number in range(stages):
        value = stage(value, number)
    return value

chain(int(sys.argv[1]))
"""


class Cost(NamedTuple):
    """Seconds of one process: on the wall, and of a core."""

    wall: float
    cpu: float


def measured(command: list[str], folder: Path, more: dict[str, str]) -> Cost:
    """Run a command to its end. Raises CalledProcessError, with its output, when it fails."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT | more, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        if os.waitstatus_to_exitcode(status):
            output.seek(0)
            raise subprocess.CalledProcessError(status, f"{command}: {output.read().decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def rrlhf_project(folder: Path, stages: int) -> list[str]:
    """Make a project whose graph of so many nodes is up to date, with stand-ins for the models; return its options."""
    for name in PROJECT:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    rows = [{"prompt": f"Say {i}.", "chosen": f"Here you are: {i}.", "rejected": f"No, not {i}."} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "prepare.source": "rows.jsonl",
        "prepare.format": "rows",
        "arms.direct": "null",
        "arms.choosy": "null",
        "ensemble.kind": "members",
        "ensemble.heads": str(stages - FIXED),
    }
    options = ["--profile", "tiny", *(word for item in overrides.items() for word in ("--set", "=".join(item)))]
    fill = [sys.executable, __file__, "--fill", json.dumps(overrides)]
    measured(fill, folder, {"PYTHONPATH": str(folder)})
    return options


def fill(overrides: dict[str, str]) -> None:
    """Make an artifact that holds one small file for every node."""
    import yaml

    from rrlhf.environment import set_environment
    from rrlhf.pipeline.artifacts import HISTORY
    from rrlhf.pipeline.params import load_params
    from rrlhf.pipeline.plan import Project
    from rrlhf.pipeline.produce import produce

    root = Path.cwd()
    set_environment(root)
    changed = {name: yaml.safe_load(value) for name, value in overrides.items()}
    project = Project(root, "tiny", load_params(root, "tiny", changed))
    digests: dict[str, str] = {}
    for node in project.nodes:

        def compute(staged: Path, name: str = node.name) -> None:
            staged.mkdir(parents=True)
            (staged / HISTORY).write_text("")
            (staged / "model.txt").write_text(name)

        document = project.document(node, digests)
        artifact, _ = produce(
            project.store,
            node.name,
            document,
            compute,
            recorded=lambda staged: nullcontext(),
        )
        digests[node.name] = artifact.digest
    assert all(one.action == "reuse" for one in project.plan())


def dvc_project(folder: Path, stages: int) -> None:
    """Make a chain of DVC stages that is up to date."""
    import yaml

    (folder / "stage.py").write_text(STAGE)
    (folder / "0.txt").write_text("0")
    chain = {
        f"stage{i}": {
            "cmd": f"python stage.py {i}.txt {i + 1}.txt",
            "deps": ["stage.py", f"{i}.txt"],
            "outs": [f"{i + 1}.txt"],
        }
        for i in range(stages)
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": chain}))
    measured(["dvc", "init", "--no-scm", "--quiet"], folder, {})
    measured(["dvc", "repro", "--quiet"], folder, {})


def prefect_project(folder: Path, stages: int) -> None:
    """Make a flow whose tasks are all cached."""
    (folder / "flow.py").write_text(FLOW)
    measured([sys.executable, "flow.py", str(stages)], folder, {"PREFECT_HOME": str(folder / "home")})


def compare(stages: int, turns: int, with_run: bool, folder: Path) -> dict[str, list[Cost]]:
    """Return the costs of every competitor, which take turns."""
    ours, dvc, prefect = (folder / name for name in ("rrlhf", "dvc", "prefect"))
    for path in (ours, dvc, prefect):
        path.mkdir()
    options = rrlhf_project(ours, stages)
    dvc_project(dvc, stages)
    prefect_project(prefect, stages)
    here = {"PYTHONPATH": str(ours)}
    competitors: dict[str, Callable[[], Cost]] = {
        "rrlhf plan": lambda: measured([sys.executable, "-m", "rrlhf", "plan", *options], ours, here),
        "dvc status": lambda: measured(["dvc", "status", "--quiet"], dvc, {}),
        "dvc repro": lambda: measured(["dvc", "repro", "--quiet"], dvc, {}),
        "Prefect": lambda: measured(
            [sys.executable, "flow.py", str(stages)], prefect, {"PREFECT_HOME": str(prefect / "home")}
        ),
    }
    if with_run:
        command = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny"]
        measured(command, ours, here)
        competitors["rrlhf run"] = lambda: measured(command, ours, here)
    costs: dict[str, list[Cost]] = {name: [] for name in competitors}
    for _ in range(turns):
        for name, measure in competitors.items():
            costs[name].append(measure())
    assert len((prefect / "ran.txt").read_text().splitlines()) == stages  # all others were hits
    return costs


def table(stages: int, costs: dict[str, list[Cost]]) -> str:
    """Return the results as a Markdown table: median, then least and largest."""
    lines = [f"| {stages} stages | seconds | CPU-seconds |", "| --- | --- | --- |"]
    for name, measures in costs.items():
        cells = [f"{median(of):.2f} ({min(of):.2f}-{max(of):.2f})" for of in zip(*measures, strict=True)]
        lines.append(f"| {name}{' (the 9 of the profile)' if name == 'rrlhf run' else ''} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[9, 100])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run", action="store_true", help="also `rrlhf run`, after a real run of the tiny profile")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fill:
        fill(json.loads(arguments.fill))
        return
    for stages in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            with_run = arguments.run and stages == min(arguments.stages)
            costs = compare(stages, arguments.turns, with_run, Path(folder))
        print(table(stages, costs), flush=True)


if __name__ == "__main__":
    main()
