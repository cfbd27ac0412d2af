"""What grows with what: `python -m benchmarks.scale [CASE ...] [--largest N]`.

Every measurement is a process of its own on one thread, which makes its input first and then reads the clock of the CPU
and its resident set. The exponent is that of cost = a n^b between the two largest sizes, so that a fixed part, which
rules the small ones, does not count. Rows are prepared by the stage itself; heads are fitted to features of random
numbers; nodes are planned over a full store; versions are registered one after the other in MLflow's database, and then
asked for; updates are those of PPO's stage.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.reward import processor, table

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["soup", "warm", "bread", "rain", "dogs", "sleep", "near", "an", "old", "red", "gate", "in", "spring"]


class Cost(NamedTuple):
    """What a size took."""

    seconds: float  # of a core
    mib: float  # by which the resident set grew at most


def rows(count: int, folder: Path) -> Cost:
    """Prepare so many preference pairs of a file."""
    from rrlhf.pipeline.params import load_params
    from rrlhf.stages import prepare

    draw, source = random.Random(0), folder / "rows.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = {name: " ".join(draw.choices(WORDS, k=6)) for name in ("prompt", "chosen", "rejected")}
            file.write(json.dumps(said | {"prompt": f"{number}: {said['prompt']}"}) + "\n")
    settings = {"prepare.source": str(source), "prepare.format": "rows", "prepare.limit": None}
    params = load_params(ROOT, "tiny", settings)
    run = partial(prepare.run, seed=1, model=params.model, prepare=params.prepare, gold=params.gold)
    out = folder / "out"
    out.mkdir()
    return _cost(lambda: run(out=out, log=lambda row: None))


def heads(count: int, _: Path) -> Cost:
    """Fit so many linear heads on the features of 2,000 pairs, 256 wide, for ten epochs."""
    import torch
    from accelerate import Accelerator

    from rrlhf.config import Fit
    from rrlhf.losses import gaussian_bradley_terry
    from rrlhf.rewards.heads import Pairs, RewardHeads, bootstrap_weights, fit

    draw = torch.Generator().manual_seed(0)
    pairs = Pairs(torch.randn(2000, 256, generator=draw), torch.randn(2000, 256, generator=draw))
    training = fit(
        RewardHeads(256, count, 0, 0.05),
        lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected),
        pairs,
        bootstrap_weights(2000, count, draw),
        Fit(epochs=10, pairs_per_batch=64, learning_rate=1e-3, weight_decay=0.0),
        accelerator=Accelerator(cpu=True),
        generator=draw,
    )
    return _cost(lambda: [*training])


def nodes(count: int, folder: Path) -> Cost:
    """Plan a graph of so many nodes whose results are all there."""
    from benchmarks.plan import rrlhf_project
    from rrlhf.pipeline.plan import Project
    from rrlhf.tools.command_line import overrides

    changed = overrides(rrlhf_project(folder, count)[3::2])
    with chdir(folder):
        return _cost(lambda: Project.opened(folder, "tiny", changed).plan())


def versions(count: int, folder: Path) -> Cost:
    """Ask for everything that is registered, and for the graph of it, where so many versions are."""
    from rrlhf.pipeline.artifacts import HISTORY
    from rrlhf.pipeline.keys import key_digest
    from rrlhf.pipeline.store import Store
    from rrlhf.pipeline.tracking.tracker import Tracker
    from rrlhf.tools.lineage.lookup import graph_of

    store, tracker = Store(folder), Tracker(folder, "scale")
    for number in range(count):
        document = {"stage": "sft", "params": {"seed": number}, "inputs": {}, "code": {}, "numerics": {}}
        staged = store.staging("sft", key_digest(document))
        staged.mkdir(parents=True)
        (staged / "model.txt").write_text(str(number))
        (staged / HISTORY).write_text("")
        tracker.register(store.publish("sft", document, staged, seconds=0.0), None, profile="default")
    return _cost(lambda: (tracker.registrations(), graph_of(tracker.versions())))


def updates(count: int, folder: Path) -> Cost:
    """Train by PPO for so many updates; memory counts from the thirtieth on."""
    from benchmarks.kill_resume import make_inputs
    from rrlhf.config import typed_arm
    from rrlhf.pipeline.params import load_params
    from rrlhf.stages import ppo

    params, seen = load_params(ROOT, "tiny", {"ppo.updates": count, "model.base": "random:3x64"}), list[int]()
    inputs = {name: Path(made) for name, made in make_inputs(folder).items()}
    out = folder / "out"
    out.mkdir()
    arm = typed_arm(reward="robust", nominal_weight=0.4, credible=2.0, seed=1)
    settings = {"model": params.model, "ppo": params.ppo, "health": params.health, "arm": arm}
    cost = _cost(lambda: ppo.run(**settings, **inputs, out=out, log=lambda row: seen.append(_resident("VmRSS"))))
    return cost._replace(mib=(max(seen[30:]) - seen[30]) / 2**20)


CASES: dict[str, tuple[Callable[[int, Path], Cost], tuple[int, ...]]] = {
    "rows": (rows, (1_000, 10_000, 100_000, 1_000_000)),
    "heads": (heads, (1, 4, 16, 64, 256)),
    "nodes": (nodes, (10, 100, 1_000)),
    "versions": (versions, (10, 100, 1_000)),
    "updates": (updates, (50, 500)),
}


def measured(case: str, size: int) -> Cost:
    """Return what a size takes, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.scale", case, "--size", str(size)]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(f"{case}, {size}: {told.stderr[-3000:]}")
    return Cost(*json.loads(told.stdout.splitlines()[-1]))


def exponent(sizes: tuple[int, ...], costs: list[float]) -> str:
    """Return b of cost = a n^b between the two largest sizes; a dash where there is nothing to divide."""
    if len(costs) < 2 or min(costs[-2:]) <= 0:
        return "–"
    return f"{math.log(costs[-1] / costs[-2]) / math.log(sizes[len(costs) - 1] / sizes[len(costs) - 2]):.2f}"


def _cost(work: Callable[[], object]) -> Cost:
    """Do something once; return its CPU-seconds, and by how much the resident set grew at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, began = _resident("VmRSS"), time.process_time()
    work()
    return Cost(time.process_time() - began, (_resident("VmHWM") - before) / 2**20)


def _resident(name: str) -> int:
    """Return a number of /proc/self/status: VmRSS, the resident set, or VmHWM, its peak; bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Measure the cases and print the table, or one size of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--largest", type=int, default=1_000_000, help="leave larger sizes out")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.size:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="rrlhf-scale-") as folder:
            print(json.dumps(CASES[options.cases[0]][0](options.size, Path(folder))))
        return
    lines = []
    for case in options.cases or CASES:
        sizes = tuple(size for size in CASES[case][1] if size <= options.largest) or CASES[case][1][:1]
        costs: list[Cost] = []
        for size in sizes:
            costs.append(measured(case, size))
            print(case, size, *(f"{number:.4g}" for number in costs[-1]), file=sys.stderr, flush=True)
        seconds, mib = ([*each] for each in zip(*costs, strict=True))
        shown = [", ".join(f"{number:.3g}" for number in numbers) for numbers in (sizes, seconds, mib)]
        lines.append([case, shown[0], shown[1], exponent(sizes, seconds), shown[2], exponent(sizes, mib)])
    print(processor())
    print(table(["what grows", "sizes", "CPU-seconds", "exponent", "MiB more", "exponent"], lines))


if __name__ == "__main__":
    main()
