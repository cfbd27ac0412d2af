"""What `rrlhf plan --memory` says of a stage, and what the stage takes: `python benchmarks/memory.py [CASE ...]`.

Every case is a process of its own, or two where weights are spread, which notes its resident set once the libraries
are loaded, then loads a random model and runs the stage's own loops on rows of full length. Measured is by how much
the resident set grew at most; the peak is begun anew when the model is there. glibc is told to give back what is
free: what it keeps otherwise depends on the order in which memory was asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reward import processor, table  # noqa: E402 - run as a script, the project is not on the path before
from rrlhf.environment import SHARDING  # noqa: E402
from rrlhf.pipeline.launch import launcher  # noqa: E402

COMMON: dict[str, Any] = {
    "model.base": "random:6x512",
    "model.dtype": "float32",
    "model.prompt_tokens": 96,
    "model.response_tokens": 32,
    "sft.batch_size": 32,
    "sft.microbatch_size": 32,
    "dpo.pairs_per_batch": 16,
    "dpo.microbatch_size": 16,
    "reward.layer": 4,
    "reward.train_layers": 2,
    "reward.batch_size": 64,
    "ppo.prompts_per_update": 64,
    "ppo.minibatch_size": 32,
    "ppo.microbatch_tokens": 4096,
    "ppo.train_layers": 3,
    "launch.threads": 1,
}
SLOW = {  # bfloat16 on a processor without units for it
    "model.dtype": "bfloat16",
    "sft.batch_size": 8,
    "sft.microbatch_size": 8,
    "ppo.prompts_per_update": 16,
    "ppo.minibatch_size": 8,
}
WORDS = {"model.vocabulary": 24_000}  # rows of the output matrix: a case with large logits
SPREAD = {"launch.processes": 2, "launch.sharding": "full"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft, all layers": ("sft", {}),
    "sft, two layers": ("sft", {"sft.train_layers": 2}),
    "sft, checkpointing": ("sft", {"model.gradient_checkpointing": True}),
    "sft, bfloat16": ("sft", SLOW),
    "sft, bfloat16, checkpointing": ("sft", SLOW | {"model.gradient_checkpointing": True}),
    "sft, 24k words": ("sft", WORDS),
    "sft, parts of a batch": ("sft", {"sft.microbatch_size": 8}),
    "dpo, three layers": ("dpo-direct", {"dpo.train_layers": 3}),
    "reward, frozen": ("reward", {"reward.batch_size": 256}),
    "reward, lora": ("reward", {"reward.trunk": "lora"}),
    "reward, full": ("reward", {"reward.trunk": "full"}),
    "ppo, layers": ("ppo-robust", {}),
    "ppo, lora": ("ppo-robust", {"ppo.trains": "lora"}),
    "ppo, lora, bfloat16": ("ppo-robust", {"ppo.trains": "lora", **SLOW}),
    "ppo, lora, checkpointing": ("ppo-robust", {"ppo.trains": "lora", "model.gradient_checkpointing": True}),
    "ppo, full": ("ppo-robust", {"ppo.trains": "full"}),
    "ppo, full, 24k words": ("ppo-robust", {"ppo.trains": "full", **WORDS}),
    "sft, all layers, spread": ("sft", SPREAD),
    "sft, two layers, spread": ("sft", SPREAD | {"sft.train_layers": 2}),
    "sft, checkpointing, spread": ("sft", SPREAD | {"model.gradient_checkpointing": True}),
    "sft, parts of a batch, spread": ("sft", SPREAD | {"sft.microbatch_size": 4}),
    "sft, 24k words, spread": ("sft", SPREAD | WORDS),
    "sft, bfloat16, spread": ("sft", SPREAD | SLOW),
    "ppo, layers, spread": ("ppo-robust", SPREAD),
    "ppo, lora, spread": ("ppo-robust", SPREAD | {"ppo.trains": "lora"}),
    "ppo, full, spread": ("ppo-robust", SPREAD | {"ppo.trains": "full"}),
    "ppo, sampling": ("ppo-robust", {"ppo.prompts_per_update": 384, "ppo.microbatch_tokens": 512}),
}


class Measured(NamedTuple):
    """Bytes of a case."""

    case: str
    when: str  # the plan has the peak
    planned: int
    measured: int

    @property
    def ratio(self) -> float:
        """The plan over what was measured."""
        return self.planned / self.measured


def measure(names: list[str]) -> Iterator[Measured]:
    """Yield what each case was planned with and took."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", SHARDING: "full"}
    for name in names:
        node, changed = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            job = json.dumps({"node": node, "settings": COMMON | changed, "folder": folder})
            processes = changed.get("launch.processes", 1)
            launch = launcher(processes) if processes > 1 else ()
            command = [sys.executable, *launch, "-m", "benchmarks.ours_memory", job]
            told = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if told.returncode:
            raise SystemExit(f"{name}: {told.stderr[-3000:]}")
        yield Measured(name, **json.loads(told.stdout.splitlines()[-1]))


def main(names: list[str]) -> None:
    """Measure, and print the table."""
    rows = []
    for one in measure(names or [*CASES]):
        mib = [f"{number / 2**20:.0f}" for number in (one.planned, one.measured)]
        rows.append([one.case, one.when, *mib, f"{one.ratio:.2f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    print(processor())
    print(table(["case", "peak while", "planned MiB", "measured MiB", "planned / measured"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
