"""Kill a PPO stage at random moments (kill -9), run it again, and compare its result with an undisturbed run's.

    python benchmarks/kill_resume.py --kills 20 --seed 0 [--json FILE]

Each run is killed once, within a rollout, an update or the writing of a checkpoint in turn, a random time after that
began; then the same command runs to the end. Equal means: weights and responses to the last bit, and every row of the
history but for its times. A random model of three layers; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PHASES = ("collect", "optimise", "save")
UPDATES = 6


def main() -> int:
    """Run the kills, print a line for each, and return 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trains", choices=["layers", "lora", "full"], default="full", help="as ppo.trains")
    parser.add_argument("--json", type=Path, help="write every kill's outcome to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_stage(json.loads(options.child))
        return 0
    draw, outcomes = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="rrlhf-kills-") as temporary:
        work = Path(temporary)
        inputs = make_inputs(work)
        began = time.monotonic()
        whole = start(inputs, work / "undisturbed", options.trains)
        if whole.wait():
            return 1
        expected, lasted = result(work / "undisturbed"), phase_times(work / "undisturbed")
        print(f"undisturbed: {time.monotonic() - began:.0f} s; mean seconds per phase {lasted}", flush=True)
        for number in range(options.kills):
            outcome = killed(inputs, work / str(number), PHASES[number % 3], lasted, options.trains, draw)
            outcome["equal"] = result(work / str(number)) == expected
            outcomes.append(outcome)
            print(json.dumps(outcome), flush=True)
    equal = sum(outcome["equal"] for outcome in outcomes)
    hit = Counter(outcome["killed_in"] for outcome in outcomes)
    print(f"{equal} of {len(outcomes)} killed runs ended bit-equal; killed in {dict(hit)}")
    if options.json:
        options.json.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    return int(equal < len(outcomes))


def killed(
    inputs: dict[str, str], out: Path, phase: str, lasted: dict[str, float], trains: str, draw: random.Random
) -> dict[str, Any]:
    """Kill a run in a phase of a random update, and run it again to its end; say where it was killed."""
    process, wanted = start(inputs, out, trains), draw.randint(1, UPDATES)
    while len([line for line in phases(out) if line[0] == phase]) < wanted and process.poll() is None:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, lasted[phase]))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    last = phases(out)[-1]
    within = last[0] if last[1] == "begins" else "between phases"
    if start(inputs, out, trains).wait():
        raise SystemExit(f"the run in {out} did not end well when it was run again")
    return {"killed_in": within, "update": wanted, "exit": process.returncode}


def start(inputs: dict[str, str], out: Path, trains: str) -> subprocess.Popen[bytes]:
    """Start the stage in a process of its own."""
    job = json.dumps({"inputs": inputs, "out": str(out), "trains": trains})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", job]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def run_stage(job: dict[str, Any]) -> None:
    """Run ppo as a flow does, and note in a file when each phase begins and ends."""
    from rrlhf.config import Launch, typed_arm
    from rrlhf.pipeline.launch import execute
    from rrlhf.pipeline.params import load_params
    from rrlhf.policy import checkpoint
    from rrlhf.stages import ppo

    out = Path(job["out"])
    note = (out.parent / f"{out.name}.phases").open("a", buffering=1)

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            note.write(f"{name} begins {time.monotonic()}\n")
            value = function(*arguments, **options)
            note.write(f"{name} ends {time.monotonic()}\n")
            return value

        return call

    ppo.collect, ppo.optimise = noted("collect", ppo.collect), noted("optimise", ppo.optimise)
    checkpoint.Checkpoints.save = noted("save", checkpoint.Checkpoints.save)  # type: ignore[method-assign]
    params = load_params(ROOT, "tiny")
    changed = {"updates": UPDATES, "epochs": 4, "trains": job["trains"], "learning_rate": 1e-3}
    sections = {
        "model": params.model.model_copy(update={"base": "random:3x64"}),
        "ppo": params.ppo.model_copy(update=changed),
        "health": params.health.model_copy(update={"checkpoint_every": 1, "patience": 100}),
        "arm": typed_arm(reward="robust", nominal_weight=0.4, credible=2.0, seed=1),
    }
    document = {"stage": "ppo", "params": {name: section.model_dump() for name, section in sections.items()}}
    folders = {name: Path(folder) for name, folder in job["inputs"].items()}
    once = Launch(processes=1, threads=1, arms_at_once=1, sharding="none")
    execute(document, inputs=folders, out=out, launch=once)


def make_inputs(work: Path) -> dict[str, str]:
    """Write prompts, a random model as the SFT model, and random reward heads."""
    import torch

    from rrlhf.data.tables import write_tables
    from rrlhf.models.load import load_base, save_model
    from rrlhf.pipeline.params import load_params
    from rrlhf.rewards.features import PairFeatures
    from rrlhf.rewards.heads import Pairs, RewardHeads
    from rrlhf.rewards.trunk import FILE

    folders = {name: work / name for name in ("data", "sft", "reward", "ensemble")}
    for folder in folders.values():
        folder.mkdir()
    asked = [{"prompt": [{"role": "user", "content": f"Say {n}."}], "topic": None} for n in range(20)]
    write_tables(folders["data"], (("ppo", each) for each in asked))
    model = load_params(ROOT, "tiny").model.model_copy(update={"base": "random:3x64"})
    save_model(load_base(model), folders["sft"])
    for name, heads in (("reward", 1), ("ensemble", 3)):
        torch.manual_seed(heads)
        RewardHeads(64, heads, 0, 0.05).save(folders[name])
        train, heldout = (Pairs(torch.randn(4, 64), torch.randn(4, 64)) for _ in range(2))
        PairFeatures(train, heldout, torch.arange(4)).save(folders[name])
        (folders[name] / FILE).write_text('{"layer": 1}')
    return {name: str(folder) for name, folder in folders.items()}


def result(out: Path) -> tuple[Any, ...]:
    """Return what must be equal."""
    import pyarrow.parquet as pq

    from rrlhf.memo import sha256

    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k not in {"seconds", "tokens_per_second"}} for row in rows]
    return sha256(out / "model.safetensors"), pq.read_table(out / "rollouts.parquet").to_pylist(), timeless


def phases(out: Path) -> list[list[str]]:
    """Return what the phases of a run noted: name, begins or ends, and when."""
    notes = out.parent / f"{out.name}.phases"
    return [line.split() for line in notes.read_text().splitlines() if line.count(" ") == 2] if notes.exists() else []


def phase_times(out: Path) -> dict[str, float]:
    """Return the mean seconds of each phase."""
    lines = phases(out)
    spans = {name: [float(when) for phase, _, when in lines if phase == name] for name in PHASES}
    return {
        name: round(sum(b - a for a, b in zip(at[::2], at[1::2], strict=True)) / (len(at) / 2), 4)
        for name, at in spans.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
