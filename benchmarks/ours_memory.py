"""A case of benchmarks/memory.py in a process of its own, or in several: `python -m benchmarks.ours_memory JOB`."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 - loaded on demand, it would count as the stage's memory

from rrlhf.config import Params, typed_arm
from rrlhf.models.load import LanguageModel, load_base, load_model, save_model
from rrlhf.models.processes import accelerator
from rrlhf.models.text import Texts
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.memory import moments
from rrlhf.pipeline.params import load_params
from rrlhf.policy.answers import Answer, Answers
from rrlhf.policy.learner import prepare_learner, top_layers, with_optimizer
from rrlhf.policy.reward import Prompts, RewardModels, arm_reward
from rrlhf.progress import is_main_process
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.objectives import single_loss
from rrlhf.rewards.scoring import RewardModel
from rrlhf.rewards.trunk import Encoded, Trunk
from rrlhf.stages import dpo, ppo, sft
from rrlhf.types import Message, Preference

ROOT = Path(__file__).resolve().parents[1]


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Plan a case and measure it."""
    torch.set_num_threads(1)
    settings, folder = dict(job["settings"]), Path(job["folder"], "model")
    model = load_params(ROOT, "tiny").model.model_copy(update={"base": settings["model.base"]})
    base = load_base(model)
    if words := settings.pop("model.vocabulary", None):
        base.network.resize_token_embeddings(words, mean_resizing=False)
    save_model(base, folder)
    accelerator(model).wait_for_everyone()
    del base
    params = load_params(ROOT, "tiny", settings | {"model.base": str(folder)})
    node = next(node for node in nodes(params) if node.name == job["node"])
    peak = max(moments(node.stage, params), key=lambda moment: moment.total)
    _warm_up()
    before = _resident("VmRSS")
    STAGES[node.stage](load_model(folder, params.model), params)
    return {"when": peak.when, "planned": peak.total, "measured": _resident("VmHWM") - before}


def _warm_up() -> None:
    """Have libraries load what they load with the first use."""
    language = load_base(load_params(ROOT, "tiny").model)
    language.network(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    torch.optim.Adam(language.network.parameters(), fused=True).step()
    accelerator(load_params(ROOT, "tiny").model)
    gc.collect()


def _sft(language: LanguageModel, params: Params) -> None:
    settings, model = params.sft, params.model
    engine = accelerator(model)
    top = top_layers(language, torch.device("cpu"), settings.train_layers)
    trained = with_optimizer(engine, language, top, 1e-4, 2)
    _reset_peak()
    answers = Answers(trained, _answers(params, settings.batch_size), model)
    batch = [*range(settings.batch_size)]
    _all(sft.train(answers, [batch, batch], settings))


def _dpo(language: LanguageModel, params: Params) -> None:
    settings, model = params.dpo, params.model
    top = top_layers(language, torch.device("cpu"), settings.train_layers)
    trained = with_optimizer(accelerator(model), language, top, 1e-4, 2, eps=1e-8, fused=None)
    _reset_peak()
    rows = _answers(params, 2 * settings.pairs_per_batch)
    pairs = dpo.prepare_pairs(trained, [*zip(rows[::2], rows[1::2], strict=True)], model, settings)
    batch = [*range(settings.pairs_per_batch)]
    _all(dpo.train(pairs, pairs, [batch, batch], settings))


def _reward(language: LanguageModel, params: Params) -> None:
    settings, model = params.reward, params.model
    _reset_peak()
    language.network.requires_grad_(False)
    trunk = Trunk(language, settings.layer, model, Texts(language, model))
    encoded = [Encoded([*row.tokens], row.prompt_length) for row in _answers(params, settings.batch_size)]
    trunk.features(encoded, settings.batch_size)
    if settings.trunk == "frozen":
        return
    said = ["x" * (model.response_tokens - 1) + letter for letter in map(chr, range(48, 112))]
    prompt = [Message(role="user", content="y" * (model.prompt_tokens - 3))]
    pairs = [Preference(prompt, one, other) for one, other in zip(said[::2], said[1::2], strict=True)]
    heads = RewardHeads(language.width, 1, 0, 1e-3)
    with trainable(trunk, settings):
        some, weights = pairs * 2, torch.ones(2 * len(pairs), 1)
        generator, engine = torch.Generator(), accelerator(model)
        loss = single_loss(settings)
        _all(finetune(trunk, heads, loss, some, weights, settings, engine=engine, generator=generator))


def _ppo(language: LanguageModel, params: Params) -> None:
    language.network.generation_config.eos_token_id = [-1]  # no token, so that responses have the full length
    model, settings = params.model, params.ppo.model_copy(update={"updates": 2, "epochs": 1, "max_step_kl": 1e9})
    engine, layer = accelerator(model), params.reward.layer
    single, several = (RewardModel(RewardHeads(language.width, heads, 0, 0.05), ()) for heads in (1, 3))
    rewards = RewardModels(single, several, layer)
    learner = prepare_learner(engine, language, rewards, model=model, ppo=settings, seed=0)
    _reset_peak()
    prompts = Prompts([[8 + n % 50, *[9] * (model.prompt_tokens - 1)] for n in range(settings.prompts_per_update)])
    _all(ppo.train(learner, prompts, arm_reward(typed_arm(reward="single", seed=0), engine)))


STAGES = {"sft": _sft, "dpo": _dpo, "reward": _reward, "ppo": _ppo}


def _answers(params: Params, count: int) -> list[Answer]:
    prompt, response = params.model.prompt_tokens, params.model.response_tokens
    return [Answer((8 + n % 50, *[9] * (prompt + response - 2), 8 + n // 50), prompt) for n in range(count)]


def _all(rows: Iterable[object]) -> None:
    for _ in rows:
        pass


def _resident(name: str) -> int:
    """Return a number of /proc/self/status: VmRSS, the resident set, or VmHWM, its peak; bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    found = json.dumps(main(json.loads(sys.argv[1])))
    if is_main_process():
        print(found)
