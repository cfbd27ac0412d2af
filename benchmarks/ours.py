"""rrlhf's side of benchmarks/reward.py: `python -m benchmarks.ours TASK JOB.json ANSWER.json`, on one thread.

Tasks: `prepare` writes the model's folder and the tokens that every competitor trains on; `frozen` trains K heads on
features of the frozen trunk, as the stages `reward` and `ensemble` do; `full` trains every layer and one head.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rrlhf.config import Model, Reward
from rrlhf.losses import gaussian_bradley_terry
from rrlhf.models.load import LanguageModel, load_base, load_model, save_model
from rrlhf.models.text import Texts
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.features import pair_features
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import Pairs, RewardHeads, bootstrap_weights, fit
from rrlhf.rewards.objectives import single_loss
from rrlhf.rewards.trunk import Trunk
from rrlhf.types import Message, Preference

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 4  # pairs whose features are computed before the clock is read
FIRST_STEPS = 1  # optimizer steps of `full` before the clock is read
SCALED = 16  # pairs whose features tell the head their scale
SCORING_S = 0.3  # CPU-seconds over which scoring is averaged

Job = dict[str, Any]


def main(task: str, asked: Path, answer: Path) -> None:
    """Do one task and write what it measured."""
    torch.set_num_threads(1)
    job = json.loads(asked.read_text(encoding="utf-8"))
    answer.write_text(json.dumps(TASKS[task](job)), encoding="utf-8")


def prepare(job: Job) -> Job:
    """Save the base model as a folder; return the tasks, the settings all share, and the token ids of every pair."""
    language = load_base(_model(job))
    save_model(language, Path(job["folder"]))
    shared = {"tasks": [*TASKS], "schedule": "linear", "weight_decay": 0.0, "max_grad_norm": 1.0}
    return shared | {f"{part}_ids": _tokens(language, _pairs(job, part), _model(job)) for part in ("train", "heldout")}


def frozen(job: Job) -> Job:
    """Measure features of the default layer (half of the trunk), the training of K heads on them, and scoring."""
    language = load_model(Path(job["folder"]), _model(job))
    trunk = Trunk(language, language.layers // 2, _model(job), Texts(language, _model(job)))
    train, heldout = _pairs(job, "train"), _pairs(job, "heldout")
    settings = load_params(ROOT).reward
    _features(trunk, heldout[:WARM_UP], settings.batch_size)
    start = time.process_time()
    found = _features(trunk, train, settings.batch_size)
    features_s = time.process_time() - start
    _trained(found, job, settings, epochs=2)
    start = time.process_time()
    heads = _trained(found, job, settings, settings.epochs)
    fit_s = time.process_time() - start
    score_s = _scoring(heads, found)
    times = {"features_s": features_s, "fit_s": fit_s, "score_s": score_s, "train_s": features_s + fit_s}
    measured = times | {"pairs": len(train), "epochs": settings.epochs, "peak_mib": _peak_mib()}
    if job["heads"] == 1:  # accuracy is shown once, and costs another pass of the trunk
        measured["accuracy"] = _accuracy(heads, _features(trunk, heldout, settings.batch_size))
    return measured


def full(job: Job) -> Job:
    """Measure the training of all layers and one head, from a head that knows no more than the features' scale."""
    language = load_model(Path(job["folder"]), _model(job))
    trunk = Trunk(language, language.layers, _model(job), Texts(language, _model(job)))
    train, heldout = _pairs(job, "train"), _pairs(job, "heldout")
    settings = _full_settings(job, language.layers)
    torch.manual_seed(job["seed"])
    heads = RewardHeads(language.width, heads=1, hidden=0, sigma_floor=1e-3)
    heads.standardise(torch.cat(_features(trunk, train[:SCALED], settings.batch_size)))
    generator = torch.Generator().manual_seed(job["seed"])
    weights, started = torch.ones(len(train), 1), 0.0
    with trainable(trunk, settings):
        loss = single_loss(settings)
        engine = Accelerator(cpu=True)
        for row in finetune(trunk, heads, loss, train, weights, settings, engine=engine, generator=generator):
            if row["step"] == FIRST_STEPS:
                started = time.process_time()
    measured = {"train_s": time.process_time() - started, "peak_mib": _peak_mib()}
    unseen = _features(trunk, heldout, settings.batch_size)
    accuracy = _accuracy(heads, unseen)
    return measured | {"pairs": len(train) * job["epochs"] - FIRST_STEPS * job["batch_size"], "accuracy": accuracy}


def _full_settings(job: Job, layers: int) -> Reward:
    wanted = {
        "layer": layers,
        "train_layers": layers,
        "trunk": "full",
        "trunk_epochs": job["epochs"],
        "trunk_pairs_per_batch": job["batch_size"],
        "trunk_learning_rate": job["learning_rate"],
        "batch_size": 2 * job["batch_size"],  # one graph a step, as TRL's
    }
    return load_params(ROOT).reward.model_copy(update=wanted)


def _features(trunk: Trunk, pairs: list[Preference], batch_size: int) -> Pairs:
    return pair_features(trunk, pairs, pairs[:1], batch_size).train  # a held-out pair of its own adds no work


@torch.no_grad()
def _accuracy(heads: RewardHeads, pairs: Pairs) -> float:
    return (heads(pairs.chosen).mean > heads(pairs.rejected).mean).float().mean().item()


def _trained(features: Pairs, job: Job, settings: Reward, epochs: int) -> RewardHeads:
    """Train Gaussian heads on bootstrap samples with the reward stage's settings."""
    torch.manual_seed(job["seed"])
    generator = torch.Generator().manual_seed(job["seed"])
    pairs, width = features.chosen.shape
    heads = RewardHeads(width, job["heads"], hidden=0, sigma_floor=0.05)
    rows = fit(
        heads,
        lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected),
        features,
        bootstrap_weights(pairs, job["heads"], generator),
        settings.model_copy(update={"epochs": epochs}),
        accelerator=Accelerator(cpu=True),
        generator=generator,
    )
    for _ in rows:
        pass
    return heads.eval()


def _scoring(heads: RewardHeads, features: Pairs) -> float:
    """Return CPU-seconds to score every response of the pairs once, from its features."""
    responses = torch.cat(features)
    heads.normalise(responses)
    passes, start = 0, time.process_time()
    while time.process_time() - start < SCORING_S:
        heads.score(responses)
        passes += 1
    return (time.process_time() - start) / passes


def _tokens(language: LanguageModel, pairs: list[Preference], model: Model) -> dict[str, list[list[int]]]:
    rows: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
    texts = Texts(language, model)
    for pair in pairs:
        prompt = texts.prompt(pair.prompt)
        for name, text in ("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected):
            rows[name].append([*prompt, *texts.response(text)])
    return rows


def _model(job: Job) -> Model:
    return Model(
        base=job["base"],
        revision=None,
        device="cpu",
        dtype="float32",
        save_dtype="auto",
        date="2025-01-01",
        system_prompt=None,
        prompt_tokens=job["prompt_tokens"],
        response_tokens=job["response_tokens"],
    )


def _pairs(job: Job, part: str) -> list[Preference]:
    return [
        Preference([Message(role="user", content=pair["prompt"])], pair["chosen"], pair["rejected"])
        for pair in job[part]
    ]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


TASKS: dict[str, Callable[[Job], Job]] = {"prepare": prepare, "frozen": frozen, "full": full}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
