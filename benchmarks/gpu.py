"""PPO on a GPU: is it what a CPU computes, and how fast? `python -m benchmarks.gpu [--device cpu] [PART ...]`.

`step` compares a small model's log-probabilities and optimizer steps on one rollout with a CPU's, in float32. The
other parts are models of random weights in bfloat16. They measure an update behind a first one: response tokens per
second of sampling, beside transformers' own `generate` on the same prompts, and of training; which share the matrix
products of training have of what the card reaches in one large product; and peak memory. Every part is a process of
its own. Neither Prefect, MLflow nor DVC is needed. On a card of 80 GB or more it is meant to take four minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ours_ppo import (
    Job,
    Watch,
    arm_of,
    learner_of,
    matrix_rate,
    model_of,
    prompts_of,
    settings_of,
    updates,
)
from benchmarks.reward import processor, table
from rrlhf.models.layers import PACKED
from rrlhf.models.load import LanguageModel, load_base
from rrlhf.models.processes import accelerator
from rrlhf.models.rollout import Rollout
from rrlhf.policy.reward import Prompts, arm_reward
from rrlhf.stages import ppo

COMMON: Job = {
    "base": "random:4x64",
    "dtype": "bfloat16",
    "trains": "lora",
    "seed": 1,
    "heads": 5,
    "epochs": 2,
    "updates": 1,
    "prompt_tokens": 48,
    "learning_rate": 1e-5,
}
STEP: Job = {"dtype": "float32", "trains": "full", "train_layers": 4, "responses": 32, "minibatch_size": 8}
STEP |= {"response_tokens": 32}
SHAPES: dict[str, dict[str, Any]] = {  # as those of SmolLM2 and Llama 3
    "135M": {"hidden": 576, "inner": 1536, "layers": 30, "heads": (9, 3), "words": 49_152, "tied": True},
    "1B": {"hidden": 2048, "inner": 8192, "layers": 16, "heads": (32, 8), "words": 128_256, "tied": True},
    "8B": {"hidden": 4096, "inner": 14_336, "layers": 32, "heads": (32, 8), "words": 128_256, "tied": False},
    "tiny": {"hidden": 32, "inner": 48, "layers": 2, "heads": (4, 2), "words": 200, "tied": True},
}
SIZES: dict[str, Job] = {
    "135M": {"trains": "full", "train_layers": 30, "responses": 256, "minibatch_size": 64, "response_tokens": 128},
    "1B": {"trains": "full", "train_layers": 16, "responses": 128, "minibatch_size": 32, "response_tokens": 128},
    "8B": {"train_layers": 16, "responses": 64, "minibatch_size": 16, "response_tokens": 128},
    "tiny": {"train_layers": 1, "responses": 4, "minibatch_size": 2, "response_tokens": 4},
}
TOLERANCES = {"log-probability": 1e-4, "value loss": 1e-3, "gradient's norm": 1e-3, "direction of all steps": 1e-2}
PEAK_SIDE = 8192  # of the square matrices whose product tells what the card reaches


def step(device: str, folder: Path) -> Job:
    """Take an update's optimizer steps on one rollout, which the first process makes; write how all weights moved."""
    job = COMMON | STEP | {"device": device}
    torch.manual_seed(1)
    language, engine = load_base(model_of(job)), accelerator(model_of(job))
    job["prompts"] = prompts_of(job, [*range(10, 90)])
    learner = learner_of(engine, language, settings_of(job), job)
    shared = folder / "rollout.safetensors"
    if not shared.exists():
        asked = [*range(job["responses"])]
        rollout, *_ = ppo.collect(learner, Prompts(job["prompts"]), asked, arm_reward(arm_of(job), engine))
        save_file({name: field.contiguous() for name, field in rollout._asdict().items()}, shared)
    rollout = Rollout(**{name: field.to(device) for name, field in load_file(shared).items()})
    read = learner.top.read(*(rollout.entering, rollout.prompt_lengths, rollout.responses, rollout.mask), tokens=4096)
    before = _weights(learner.top)
    found = ppo.optimise(learner, rollout)
    moved = {name: weight - before[name] for name, weight in _weights(learner.top).items()}
    save_file(moved | {"logprobs": read.logprobs.detach().cpu().contiguous()}, folder / f"{device}.safetensors")
    return found


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in module.named_parameters()}


def differences(of: Job, cpu: Job, folder: Path, device: str) -> dict[str, float]:
    """Return by how much a device's step differs from a CPU's: log-probabilities in nats, the others relative."""
    mine, theirs = (load_file(folder / f"{name}.safetensors") for name in (device, "cpu"))
    logprobs = (mine.pop("logprobs") - theirs.pop("logprobs")).abs().max().item()
    moved = [torch.cat([each[name].flatten() for name in sorted(each)]).double() for each in (mine, theirs)]
    cosine = torch.nn.functional.cosine_similarity(*moved, dim=0).item()
    relative = (abs(of[name] / cpu[name] - 1) for name in ("value_loss", "gradient_norm"))
    return dict(zip(TOLERANCES, (logprobs, *relative, 1 - cosine), strict=True))


def speed(device: str, size: str) -> Job:
    """Measure a size: an update, transformers' `generate` on its prompts, and the card's own peak."""
    job = COMMON | SIZES[size] | {"device": device}
    job["prompts"] = prompts_of(job, [*range(10, SHAPES[size]["words"])])
    side = PEAK_SIDE if device == "cuda" else 256
    peak = matrix_rate([torch.randn(side, side, device=device, dtype=torch.bfloat16)], side, device)
    language = drawn(size, job)
    generate_s = _generate(language, job)
    return {"peak": peak, "generate_s": generate_s} | updates(language, job)


def drawn(size: str, job: Job) -> LanguageModel:
    """Return a model of random weights, made on its device; a small model's tokenizer stands in for its own."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape, model = SHAPES[size], model_of(job)
    config = LlamaConfig(
        vocab_size=shape["words"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"][0],
        num_key_value_heads=shape["heads"][1],
        tie_word_embeddings=shape["tied"],
        eos_token_id=1,
    )
    with torch.device(job["device"]):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    language = load_base(model)
    network.set_attn_implementation(PACKED)
    return language._replace(network=network)


@torch.no_grad()
def _generate(language: LanguageModel, job: Job) -> float:
    """Return the seconds that transformers' `generate` takes for the responses of an update, behind a first time."""
    from transformers import GenerationConfig

    network, prompts, watch = language.network, job["prompts"][: job["responses"]], Watch(job["device"])
    width, count = max(map(len, prompts)), job["response_tokens"]
    asked = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=job["device"])
    network.set_attn_implementation("sdpa")
    how = GenerationConfig(do_sample=True, top_k=0, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
    for _ in range(2):
        began = watch.now()
        network.generate(asked, attention_mask=(asked != 0).long(), generation_config=how)
    network.set_attn_implementation(PACKED)
    return watch.now() - began


def row(size: str, found: Job) -> list[str]:
    """Return a size's line of the table."""
    [update], tokens = found["updates"], found["tokens"]
    share = found["train_flop"] / update["train_s"] / found["peak"] / 1e9
    gib = found.get("device_peak_mib", found["peak_mib"]) / 1024
    speeds = [
        tokens / seconds
        for seconds in (update["sampling_s"], found["generate_s"], update["train_s"] / COMMON["epochs"])
    ]
    return [size, (COMMON | SIZES[size])["trains"], *(f"{each:,.0f}" for each in speeds), f"{share:.0%}", f"{gib:.1f}"]


def _asked(part: str, device: str, folder: Path) -> Job:
    """Have a process of its own do a part; return what it found."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--folder", str(folder), part]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} on {device}: {done.stderr[-3000:]}")
    print(f"{part} on {device}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found: Job = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the parts; with --folder, which the processes of parts are given, do one and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["step", *SIZES, []], default=["step", "135M", "1B", "8B"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        [part] = asked.parts
        found = step(asked.device, asked.folder) if part == "step" else speed(asked.device, part)
        print(json.dumps(found))
        return
    name = torch.cuda.get_device_name() if asked.device == "cuda" else processor()
    print(f"{name}, torch {torch.__version__}")
    differs = False
    with tempfile.TemporaryDirectory() as folder:
        if "step" in asked.parts:
            cpu, mine = (_asked("step", device, Path(folder)) for device in ("cpu", asked.device))
            found = differences(mine, cpu, Path(folder), asked.device)
            differs = any(found[name] > limit for name, limit in TOLERANCES.items())
            rows = [[name, f"{found[name]:.1e}", f"{limit:.0e}"] for name, limit in TOLERANCES.items()]
            print(table(["differs from a CPU by at most", "", "allowed"], rows), flush=True)
        sizes = [part for part in asked.parts if part != "step"]
        rows = [row(size, _asked(size, asked.device, Path(folder))) for size in sizes]
    if rows:
        header = ["model", "trains", "sampled tokens / s", "by `generate`", "trained tokens / s", "of peak", "GiB"]
        print(table(header, rows))
    sys.exit(differs)


if __name__ == "__main__":
    main()
