"""rrlhf's part of benchmarks/ppo.py: `python -m benchmarks.ours_ppo TASK JOB.json ANSWER.json`, a process per task.

`prepare` makes the model's folder and the prompts' tokens; `train` measures updates; `rate` measures how fast this
processor multiplies the model's own matrices.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - loaded on demand, it would count as the trainer's memory
from accelerate import Accelerator
from torch import Tensor, nn

from rrlhf.config import Model, Ppo, PpoArm, typed_arm
from rrlhf.models.load import LanguageModel, load_base, load_model, save_model
from rrlhf.models.processes import accelerator
from rrlhf.pipeline.params import load_params
from rrlhf.policy.learner import Learner, prepare_learner
from rrlhf.policy.reward import Prompts, arm_reward, load_reward_models
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import FILE
from rrlhf.stages import ppo
from rrlhf.types import Metrics

ROOT = Path(__file__).resolve().parents[1]
RATE_S = 0.5  # CPU-seconds over which a rate is averaged

Job = dict[str, Any]


def main(task: str, asked: Path, answer: Path) -> None:
    """Do one task and write what it measured."""
    torch.set_num_threads(1)
    job = json.loads(asked.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(TASKS[task](job)), encoding="utf-8")


def prepare(job: Job) -> Job:
    """Save the base model as a folder; return prompts of log-normal length (median 20 tokens)."""
    language = load_base(model_of(job))
    save_model(language, Path(job["folder"]))
    special = set(language.tokenizer.all_special_ids)
    plain = [token for token in range(len(language.tokenizer)) if token not in special]
    return {"prompts": prompts_of(job, plain)}


def train(job: Job) -> Job:
    """Measure updates of the model in a folder."""
    libraries_mib = _peak_mib()
    return {"libraries_mib": libraries_mib} | updates(load_model(Path(job["folder"]), model_of(job)), job)


def updates(language: LanguageModel, job: Job) -> Job:
    """Measure `job["updates"]` updates behind a first one: seconds, tokens, floating-point operations, memory."""
    settings = settings_of(job)
    if job["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what was done before with the model does not count
    language.network.generation_config.eos_token_id = [-1]  # no token, so that responses have the full length
    torch.manual_seed(job["seed"])
    engine = accelerator(model_of(job))
    learner = learner_of(engine, language, settings, job)
    watch = Watch(job["device"])
    clocks = {name: watch.timed(name, getattr(ppo, name)) for name in ("collect", "optimise")}
    vars(learner)["sample"] = watch.timed("sample", learner.sample)
    told: list[Metrics] = []
    with _replaced(clocks):
        began = watch.now()
        for row, _ in ppo.train(learner, Prompts(job["prompts"]), arm_reward(arm_of(job), engine)):
            ended = watch.now()
            told.append({"update_s": ended - began, "steps": row["optimizer_steps"]} | watch.seconds)
            began = ended
    found = {"updates": [_told(update) for update in told[1:]], "peak_mib": _peak_mib()}
    found |= {"trained": sum(p.numel() for p in _trained(learner))}
    if job["device"] == "cuda":
        found["device_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found | {"tokens": job["responses"] * job["response_tokens"]} | _operations(learner, settings, job)


def prompts_of(job: Job, tokens: list[int]) -> list[list[int]]:
    """Return prompts of these tokens, of log-normal length (median 20 tokens)."""
    draw = random.Random(job["seed"])
    lengths = [round(draw.lognormvariate(math.log(20), 0.6)) for _ in range(4 * job["responses"])]
    return [draw.choices(tokens, k=min(job["prompt_tokens"], max(6, length))) for length in lengths]


def rate(job: Job) -> Job:
    """Measure GFLOP/s of the matrix products of one forward pass: at a minibatch's tokens, and at one per response."""
    language = load_model(Path(job["folder"]), model_of(job))
    network = language.network.to(job["device"], getattr(torch, job["dtype"]))
    maps = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    tokens = job["minibatch_size"] * (sum(map(len, job["prompts"])) // len(job["prompts"]) + job["response_tokens"])
    return {
        "train": matrix_rate(maps, tokens, job["device"]),
        "rollout": matrix_rate(maps, job["responses"], job["device"]),
    }


class Watch:
    """CPU-seconds of this process, or on a GPU seconds until it is done; and the seconds of named functions."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: Metrics = {}

    def now(self) -> float:
        """Return the time."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a clock around it, which shows its latest call."""

        def call(*arguments: Any, **options: Any) -> Any:
            start = self.now()
            result = function(*arguments, **options)
            self.seconds[name] = self.now() - start
            return result

        return call


class _replaced:  # noqa: N801 - reads as a verb
    """Have functions of the ppo module replaced."""

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.before = {name: getattr(ppo, name) for name in functions}
        self.functions = functions

    def __enter__(self) -> None:
        for name, function in self.functions.items():
            setattr(ppo, name, function)

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(ppo, name, function)


def _told(update: Metrics) -> Metrics:
    rollout_s = update["update_s"] - update["optimise"]
    return {
        "update_s": update["update_s"],
        "sampling_s": update["sample"],
        "rollout_s": rollout_s,
        "train_s": update["optimise"],
        "steps": update["steps"],
    }


def settings_of(job: Job) -> Ppo:
    """Return the default profile's settings but for what is compared; no epoch ends early."""
    wanted = {
        "updates": job["updates"] + 1,
        "prompts_per_update": job["responses"],
        "minibatch_size": job["minibatch_size"],
        "epochs": job["epochs"],
        "learning_rate": job["learning_rate"],
        "trains": job["trains"],
        "train_layers": job["train_layers"],
        "max_step_kl": 1e9,
    }
    return load_params(ROOT).ppo.model_copy(update=wanted)


def arm_of(job: Job) -> PpoArm:
    """Return the robust reward."""
    return typed_arm(reward="robust", nominal_weight=0.4, credible=2.0, seed=job["seed"])


def learner_of(engine: Accelerator, language: LanguageModel, settings: Ppo, job: Job) -> Learner:
    """Return a learner whose single head and ensemble are random and read the middle layer, as by default."""
    with tempfile.TemporaryDirectory() as name:
        for folder, heads in (Path(name, "reward"), 1), (Path(name, "ensemble"), job["heads"]):
            folder.mkdir()
            RewardHeads(language.width, heads, hidden=0, sigma_floor=0.05).save(folder)
            (folder / FILE).write_text(json.dumps({"layer": language.layers // 2}), encoding="utf-8")
        rewards = load_reward_models(Path(name, "reward"), Path(name, "ensemble"), engine.device)
        return prepare_learner(engine, language, rewards, model=model_of(job), ppo=settings, seed=job["seed"])


def _operations(learner: Learner, settings: Ppo, job: Job) -> Job:
    """Count the floating-point operations of an update's matrix products, without attention and without padding.

    A product with a matrix of P elements takes 2 P a token forward, 2 P more where the gradient passes through it, and
    2 P more where the matrix itself trains. Logits are counted for response tokens only.
    """
    network, first = learner.language.network, learner.top.first or 0
    layers = [sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear)) for layer in _layers(network)]
    head = network.lm_head.weight.numel()
    responses = job["responses"] * job["response_tokens"]
    tokens = responses + job["responses"] * sum(map(len, job["prompts"])) / len(job["prompts"])
    sampled = 2 * (sum(layers) * tokens + head * responses)
    reference = 2 * (sum(layers[first:]) * tokens + head * responses)
    factor = {"full": (6, 6), "layers": (6, 4), "lora": (4, 4)}[settings.trains]
    step = factor[0] * sum(layers[first:]) * tokens + factor[1] * head * responses
    one_by_one = 2 * (sum(layers) + head) * responses  # products with one token per response
    return {"rollout_flop": sampled + reference, "decode_flop": one_by_one, "train_flop": settings.epochs * step}


def _layers(network: Any) -> list[nn.Module]:
    return list(network.model.layers)


def _trained(learner: Learner) -> list[nn.Parameter]:
    return [parameter for parameter in learner.top.parameters() if parameter.requires_grad]


@torch.no_grad()
def matrix_rate(maps: list[Tensor], rows: int, device: str) -> float:
    """Return GFLOP/s of products of so many rows with each of these matrices in turn."""
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], device=device, dtype=weight.dtype) for weight in maps}
    watch, passes = Watch(device), 0
    for warm in (True, False):
        start, passes = watch.now(), 0
        while passes == 0 or (not warm and watch.now() - start < RATE_S):
            for weight in maps:
                nn.functional.linear(inputs[weight.shape[1]], weight)
            passes += 1
    return 2 * rows * passes * sum(weight.numel() for weight in maps) / (watch.now() - start) / 1e9


def model_of(job: Job) -> Model:
    """Return the settings of the job's model."""
    return Model(
        base=job["base"],
        revision=None,
        device=job["device"],
        dtype=job["dtype"],
        save_dtype="auto",
        date="2025-01-01",
        system_prompt=None,
        prompt_tokens=job["prompt_tokens"],
        response_tokens=job["response_tokens"],
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


TASKS: dict[str, Callable[[Job], Job]] = {"prepare": prepare, "train": train, "rate": rate}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
