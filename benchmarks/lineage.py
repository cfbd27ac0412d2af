"""Lineage at 10,000 nodes, and the audit against plain hashing.

    python benchmarks/lineage.py            # both, into benchmarks/lineage.json
    python benchmarks/lineage.py --skip audit

Lineage: a made-up registry of 10,000 products in memory (experiments of ten: one of twenty data sets, an SFT model, a
reward model, an ensemble, six policies, an evaluation; half of the experiments start from an earlier SFT model). What a
query costs, in CPU time on one core, is finding the product by its name and answering. Making the graph from the
registry's answers is timed apart. Asking MLflow for its versions is not timed: that depends on its database.

Audit: `rrlhf audit --deep` over artifacts of many megabytes against hashlib.sha256 over the very same files, in turns
in one process with the files in the page cache; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rrlhf.data.fingerprints import row_hash, write_hashes
from rrlhf.data.tables import write_tables
from rrlhf.files import clear
from rrlhf.pipeline.ancestry import Graph
from rrlhf.pipeline.artifacts import HISTORY
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Version
from rrlhf.tools.auditing.audit import Audit
from rrlhf.tools.lineage.diff import sightings
from rrlhf.tools.lineage.lookup import Lookup, graph_of
from rrlhf.tools.lineage.text import as_json, as_lines, mermaid, page, tree

NODES, ROWS, TURNS = 10_000, 10_000, 7
MEGABYTES, ARTIFACTS = 64, 6


def hexadecimal(*names: object) -> str:
    return hashlib.sha256("/".join(map(str, names)).encode()).hexdigest()


def registry(nodes: int) -> list[Version]:
    """Return versions as MLflow would tell them, newest first."""
    draw, versions, numbers, keys = random.Random(0), [], {}, {}

    def add(model: str, node: str, experiment: int, inputs: dict[str, str]) -> str:
        digest = hexadecimal(node, experiment)
        numbers[model] = numbers.get(model, 0) + 1
        keys[digest] = hexadecimal("key", node, experiment)
        input_keys = {argument: keys[each] for argument, each in inputs.items() if each in keys}
        made = {"stage": node.partition("-")[0], "digest": digest, "inputs": inputs, "input_keys": input_keys}
        tags = {
            "rrlhf.node": node,
            "rrlhf.data": "default",
            "rrlhf.key": keys[digest],
            "rrlhf.made": json.dumps(made | {"git_commit": None}),
        }
        versions.append(Version(model, str(numbers[model]), (), tags, created=1_700_000_000_000 + len(versions)))
        return digest

    for experiment in range(nodes // 10):
        data = f"md5:{hexadecimal('data', experiment % 20)[:32]}.dir"
        base = hexadecimal("sft", draw.randrange(experiment)) if experiment and draw.random() < 0.5 else "package:base"
        made = {"data": data}
        made["sft"] = add("rrlhf-sft", "sft", experiment, {**made, "base": base})
        made["reward"] = add("rrlhf-reward", "reward", experiment, dict(made))
        made["ensemble"] = add("rrlhf-ensemble", "ensemble", experiment, {"reward": made["reward"]})
        arms = {f"ppo-{arm}": add("rrlhf-policy", f"ppo-{arm}", experiment, dict(made)) for arm in range(6)}
        add("rrlhf-evaluation", "evaluate", experiment, {**made, **arms})
    return versions[::-1]


def seconds(call: Callable[[], object], turns: int = TURNS) -> list[float]:
    """Return the CPU time of each of several calls, after one that does not count."""
    call()
    return [_once(call, time.process_time) for _ in range(turns)]


def _once(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def row_files(folder: Path, graph: Graph) -> tuple[dict[str, dict[str, Path]], str]:
    """Write ROWS rows for every data set; return their files by digest, and a row's hash."""
    files, wanted = {}, ""
    for number, data in enumerate(product for product in graph.products if product.stage == "prepare"):
        place = folder / str(number)
        place.mkdir()
        rows = [
            {"prompt": [{"role": "user", "content": f"{number} {n}"}], "chosen": "a", "rejected": "b", "flipped": None}
            for n in range(ROWS)
        ]
        write_tables(place, (("preferences", each) for each in rows))
        write_hashes(place, {"preferences": map(row_hash, rows)})
        files[data.digest] = {path.name: path for path in place.iterdir()}
        wanted = row_hash(rows[17])
    return files, wanted


def measure_lineage() -> dict[str, dict[str, float]]:
    versions = registry(NODES)
    found = {"make the graph from 10,000 versions": seconds(lambda: graph_of(versions))}
    newest, oldest = f"rrlhf-policy/{6 * NODES // 10}", "rrlhf-sft/1"
    fresh = [graph_of(versions) for _ in range(TURNS)]
    found["the first query: up, tree"] = [
        _once(lambda graph=graph: tree(graph, graph.find(newest)), time.process_time) for graph in fresh
    ]
    graph = fresh[0]
    data = max((p for p in graph.products if p.stage == "prepare"), key=lambda each: len(graph.down(each)))
    queries: dict[str, Callable[[], object]] = {
        "up, tree": lambda: tree(graph, graph.find(newest)),
        "up, JSON": lambda: as_json(graph, graph.find(newest)),
        "up, Mermaid": lambda: mermaid(graph, graph.find(newest)),
        "up, HTML": lambda: page(graph, graph.find(newest)),
        "up, OpenLineage": lambda: as_lines(graph, graph.find(newest)),
        "down from the oldest model": lambda: graph.down(graph.find(oldest)),
        "down from the largest data set": lambda: graph.down(graph.find(data.digest)),
        "down from the largest data set, JSON": lambda: as_json(graph, graph.find(data.digest), down=True),
        "down from the largest data set, tree": lambda: tree(graph, graph.find(data.digest), down=True),
        "start of a digest": lambda: graph.find(hexadecimal("ensemble", 500)[:12]),
    }
    found |= {name: seconds(query) for name, query in queries.items()}
    with tempfile.TemporaryDirectory() as folder:
        files, row = row_files(Path(folder), graph)
        found[f"who saw a row ({len(files)} data sets of {ROWS:,} rows)"] = seconds(
            lambda: sightings(graph, row, files)
        )
    sizes = {"products": len(graph.products), "below the largest data set": len(graph.down(data))}
    times = {name: {"median_ms": 1000 * statistics.median(t), "worst_ms": 1000 * max(t)} for name, t in found.items()}
    return times | {"sizes": {name: float(size) for name, size in sizes.items()}}


def artifacts(root: Path) -> Iterator[Path]:
    """Publish artifacts of random bytes, each made from the one before; yield their folders."""
    store, inputs = Store(root), {}
    for number in range(ARTIFACTS):
        document = {"stage": "sft", "params": {"seed": number}, "inputs": inputs, "code": {}, "numerics": {}}
        staged = clear(store.staging("sft", key_digest(document)))
        (staged / "model.safetensors").write_bytes(os.urandom(MEGABYTES << 20))
        (staged / "config.json").write_text("{}")
        (staged / HISTORY).write_text('{"step": 1}\n')
        made = store.publish("sft", document, staged, seconds=1.0)
        inputs = {"sft": made.digest}
        yield made.path


def plain(folders: list[Path]) -> None:
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with path.open("rb") as handle:
                hashlib.file_digest(handle, "sha256").hexdigest()


def measure_audit() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folders = list(artifacts(root))
        params = load_params(Path(__file__).parents[1])

        def audit() -> None:
            report = Audit(Lookup(root, "default", params), deep=True).run()
            assert not report.broken

        plain(folders)
        audit()
        turns = [(_once(lambda: plain(folders)), _once(audit)) for _ in range(TURNS)]
    hashing, auditing = ([turn[i] for turn in turns] for i in range(2))
    size = MEGABYTES * ARTIFACTS
    return {
        "megabytes": size,
        "plain_mb_per_s": size / statistics.median(hashing),
        "audit_mb_per_s": size / statistics.median(auditing),
        "ratio": statistics.median(hashing) / statistics.median(auditing),
        "least_ratio_of_a_turn": min(one / other for one, other in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", choices=["lineage", "audit"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    found: dict[str, object] = {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
    if options.skip != "lineage":
        found["lineage"] = measure_lineage()
    if options.skip != "audit":
        found["audit"] = measure_audit()
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
