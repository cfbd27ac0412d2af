"""Best of n: sample n responses of the SFT model and keep the one that an arm's reward likes best. Nothing is trained.

A policy like any other to the evaluation, and the simplest optimiser that a reward model meets: what it exploits at a
growing n is the reward's alone, no training gets in between (Gao et al. 2022, arXiv 2210.10760).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rrlhf.config import Arm, BestOfN, Model
from rrlhf.data.tables import columns_of, further_columns, read_table
from rrlhf.models.layers import hidden_states
from rrlhf.models.load import LanguageModel, accelerator, autocast, load_model
from rrlhf.models.rollout import Response, response_features, sample_in_batches
from rrlhf.models.text import Texts, decode
from rrlhf.policy.arm_record import write_arm
from rrlhf.policy.candidates import choose, write_candidates
from rrlhf.policy.judgement import Judgement, arm_reward, function_values, reference_scale
from rrlhf.policy.reward_functions import load_functions
from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, curve_points
from rrlhf.progress import track
from rrlhf.rewards.scoring import RewardModel, load_for_policy, read_by, shared_layer
from rrlhf.robust import joined
from rrlhf.types import Log, Message


def run(
    *,
    model: Model,
    best_of_n: BestOfN,
    arm: Arm,
    data: Path,
    sft: Path,
    reward: Path,
    ensemble: Path,
    out: Path,
    log: Log,
) -> None:
    """Sample responses to the evaluation prompts, score them, choose, and save all of it; nothing is trained."""
    n = arm.n or 1
    samples = best_of_n.samples or n
    questions = read_table(data, "evaluate")
    functions = load_functions(arm.functions, further_columns(data))
    engine, language = accelerator(model), load_model(sft)
    language.network.to(engine.device).requires_grad_(False)
    rows = [question for question in questions for _ in range(samples)]
    asked = [row["prompt"] for row in rows]
    read = Texts(language, model)
    encoded = [read.prompt(question) for question in asked]
    log({"step": 0, **read.told("best of n")})
    responses = sample_in_batches(
        language, encoded, model, batch_size=best_of_n.batch_size, seed=arm.seed, label="best of n: sampling"
    )
    texts = [decode(language, response.tokens) for response in responses]
    models = [load_for_policy(folder, engine.device) for folder in (reward, ensemble)]
    layer = shared_layer(models, reward)
    judgement = judged(language, models, layer, encoded, responses, asked, texts, model, best_of_n.batch_size)
    tokens, ended = [response.tokens for response in responses], [response.finished for response in responses]
    values = function_values(functions, asked, texts, tokens, ended, columns_of(rows))
    judgement, finished = judgement._replace(functions=values), torch.tensor(ended)
    scale = reference_scale(arm, reward, ensemble)
    score = torch.where(finished, arm_reward(arm, engine, scale)(judgement).cpu(), best_of_n.missing_eos_score)
    score = score.double().view(len(questions), samples)
    write_candidates(out, responses, texts, judgement, score, choose(score, n))
    write_arm(out, arm, scale)
    curve = best_of_n_curve(score, score, n).mean(0)
    for number in curve_points(n):
        log({"step": number, "reward": curve[number - 1].item(), "kl_bound": best_of_n_kl(number)})


@torch.no_grad()
def judged(
    language: LanguageModel,
    models: Sequence[RewardModel],
    layer: int | None,
    encoded: list[list[int]],
    responses: list[Response],
    asked: list[list[Message]],
    texts: list[str],
    model: Model,
    batch_size: int,
) -> Judgement:
    """Score responses by the single head and the ensemble, `models`, on the CPU.

    layer: whose entering states the reward heads without a trunk of their own read; None: every one has its own.
    """
    singles, several = [], []
    batches = range(0, len(responses), batch_size)
    for start in track(batches, len(batches), "best of n: scoring"):
        part = slice(start, start + batch_size)
        pooled = None
        if layer is not None:
            sequences = [prompt + said.tokens for prompt, said in zip(encoded[part], responses[part], strict=True)]
            lengths = torch.tensor([len(prompt) for prompt in encoded[part]], device=language.device)
            spoken = [len(said.tokens) - said.finished for said in responses[part]]
            with autocast(model):
                states = hidden_states(language.network, sequences, layer)
            pooled = response_features(states, lengths, torch.tensor(spoken, device=language.device))
        single, scores = read_by(models, pooled, asked[part], texts[part], batch_size)
        singles.append(single.mean[:, 0].cpu())
        several.append(scores.each(Tensor.cpu))
    return Judgement(torch.cat(singles), joined(several))
