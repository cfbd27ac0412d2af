"""Held-out accuracy and calibration of every kind of reward model on human preferences, over several seeds.

    python benchmarks/reward_study.py pairs.jsonl.gz --format hh --seeds 1 2 3

Each seed splits the data anew, by prompt, and trains everything anew; kinds share what is equal. The trunk is the base
model itself, without SFT. Finished parts are kept in --work, so an interrupted study goes on where it stopped.
PandaLM's test set (testset-v1.json) is understood too: the majority of its three annotators, ties left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrlhf.pipeline.graph import Node, nodes
from rrlhf.pipeline.params import load_params
from rrlhf.types import Json

ROOT = Path(__file__).parents[1]
LORA = {"reward.trunk": "lora", "reward.trunk_learning_rate": 3.0e-4}
VARIANTS: dict[str, dict[str, Json]] = {
    "BRME, Bradley-Terry": {},
    "BRME, reparam. MSE": {"ensemble.loss": "reparam_mse"},
    "BRME, Gaussian NLL": {"ensemble.loss": "gaussian_nll"},
    "BRME, smoothing 0.1": {"ensemble.label_smoothing": 0.1},
    "independent heads": {"ensemble.kind": "members"},
    "members, LoRA trunks": {**LORA, "ensemble.kind": "members", "ensemble.heads": 3},
    "LoRA ensemble": {**LORA, "ensemble.kind": "lora", "ensemble.heads": 3, "ensemble.diversity": 0.01},
    "WARM": {**LORA, "ensemble.kind": "warm", "ensemble.heads": 3},
}


def main() -> None:
    """Run what the command line asks for, and print and write the table."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    source = _pandalm(options.data, options.work) if options.data.name == "testset-v1.json" else options.data
    data_format = "rows" if source != options.data else options.format
    found: dict[str, dict[str, list[float]]] = {}
    for seed in options.seeds:
        for name, metrics in _seed(seed, source, data_format, options):
            print(f"seed {seed}  {name}: {metrics}", file=sys.stderr, flush=True)
            for metric, value in metrics.items():
                found.setdefault(name, {}).setdefault(metric, []).append(value)
    (options.work / "study.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(_table(found, len(options.seeds)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="file of preference pairs")
    parser.add_argument("--format", default="rows", help="hh, ultrafeedback or rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--limit", type=int, default=420, help="rows used of each seed's shuffled data")
    parser.add_argument(
        "--layer", type=int, default=10, help="reward.layer; 4 layers below it train where a trunk does"
    )
    parser.add_argument("--rest", type=float, default=0.01, help="share of prompts of each split that is not used")
    parser.add_argument("--work", type=Path, default=Path(".rrlhf", "study"))
    return parser.parse_args()


def _seed(
    seed: int, source: Path, data_format: str, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    rest = options.rest
    common: dict[str, Json] = {
        "seed": seed,
        "prepare.source": str(source.resolve()),
        "prepare.format": data_format,
        "prepare.revision": None,
        "prepare.limit": options.limit,
        "prepare.shares": {
            "preferences": 0.61 - 3 * rest,
            "heldout": 0.39,
            **dict.fromkeys(("sft", "ppo", "evaluate"), rest),
        },
        "model.prompt_tokens": 64,
        "model.response_tokens": 32,
        "reward.layer": options.layer,
    }
    singles: set[str] = set()
    for variant, changes in VARIANTS.items():
        params = load_params(ROOT, "hh", common | changes)
        folders: dict[str, Path] = {"sft": _base(params.model, options.work)}
        for node in nodes(params):
            if node.stage in {"prepare", "reward", "member", "ensemble"}:
                folders[node.name] = _made(node, folders, options.work)
        trained = "" if params.reward.trunk == "frozen" else ", LoRA trunk"
        if (single := f"single head{trained}") not in singles:
            singles.add(single)
            yield single, _metrics(folders["reward"])
        yield variant, _metrics(folders["ensemble"])


def _base(model: Any, work: Path) -> Path:
    from rrlhf.models.load import load_base, save_model

    folder = work / "base"
    if not folder.exists():
        staged = work / f"base.{os.getpid()}"
        save_model(load_base(model), staged)
        staged.rename(folder)
    return folder


def _made(node: Node, folders: dict[str, Path], work: Path) -> Path:
    """Return a node's folder, made now unless an earlier variant or run did."""
    from rrlhf.pipeline.launch import call

    inputs = {argument: folders[name] for argument, name in node.inputs.items()}
    described = json.dumps([node.stage, node.settings, sorted((k, str(v)) for k, v in inputs.items())], sort_keys=True)
    folder = work / f"{node.stage}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
    if not folder.exists():
        staged = work / f"{folder.name}.{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        rows: list[dict[str, float]] = []
        call({"stage": node.stage, "params": node.settings}, inputs=inputs, out=staged, log=rows.append)
        (staged / "metrics.json").write_text(json.dumps(rows[-1]), encoding="utf-8")
        staged.rename(folder)
    return folder


def _metrics(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    names = ("", "_mean", "_nominal", "_worst")
    kept = {f"accuracy{name}": found.get(f"heldout_accuracy{name}") for name in names}
    kept |= {name: found.get(f"heldout_{name}") for name in ("ece", "nll")}
    return {name: value for name, value in kept.items() if value is not None}


def _pandalm(file: Path, work: Path) -> Path:
    """Write PandaLM's test set as rows of prompt, chosen and rejected."""
    rows: dict[str, None] = {}  # in order, repetitions once
    for item in json.loads(file.read_text(encoding="utf-8")):
        (label, votes), *_ = Counter(item[f"annotator{i}"] for i in (1, 2, 3)).most_common()
        first, second = item["response1"], item["response2"]
        if (
            label
            and votes > 1
            and isinstance(first, str)
            and isinstance(second, str)
            and first.strip()
            and second.strip()
        ):
            prompt = "\n".join(part for part in (item["instruction"], item["input"]) if part)
            chosen, rejected = (first, second) if label == 1 else (second, first)
            if chosen != rejected:
                rows[json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})] = None
    path = work / "pandalm.jsonl"
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return path


def _table(found: dict[str, dict[str, list[float]]], seeds: int) -> str:
    """Return a Markdown table: mean ± half a 95 % t-interval over seeds."""
    columns = ["accuracy", "accuracy_mean", "accuracy_nominal", "accuracy_worst", "ece", "nll"]
    lines = [f"{seeds} seeds", "| model | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metrics in found.items():
        cells = [_figures(metrics[column]) if column in metrics else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figures(values: list[float]) -> str:
    import statistics

    from scipy import stats

    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return f"{mean:.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
