"""Best of n: sample n responses of the SFT model and keep the one that an arm's reward likes best. Nothing is trained.

A policy like any other to the evaluation, and the simplest optimiser that a reward model meets: what it exploits at a
growing n is the reward's alone, no training gets in between (Gao et al. 2022, arXiv 2210.10760).
"""

from pathlib import Path

import torch

from rrlhf.config import BestOfN, BestOfNArm, Model
from rrlhf.data.load import further_columns
from rrlhf.data.tables import read_table
from rrlhf.models.load import load_model
from rrlhf.models.processes import accelerator, autocast, in_parts
from rrlhf.models.rollout import sample_in_batches
from rrlhf.models.text import Texts
from rrlhf.policy.reading import as_said, pooled_states
from rrlhf.policy.reward import arm_reward, load_reward_models, reference_scale, write_arm
from rrlhf.policy.reward_functions import load_functions
from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, curve_points, write_candidates
from rrlhf.types import Log


def run(
    *,
    model: Model,
    best_of_n: BestOfN,
    arm: BestOfNArm,
    data: Path,
    sft: Path,
    reward: Path,
    ensemble: Path,
    out: Path,
    log: Log,
) -> None:
    """Sample responses to the evaluation prompts, score them, choose, and save all of it; nothing is trained."""
    n = arm.n
    samples = best_of_n.samples or n
    functions = load_functions(arm.functions, further_columns(data))
    engine, language = accelerator(model), load_model(sft, model)
    language.network.to(engine.device).requires_grad_(False)
    rewards = load_reward_models(reward, ensemble, engine.device, functions)
    rows = [row for row in read_table(data, "evaluate") for _ in range(samples)]
    texts = Texts(language, model)
    encoded = [texts.prompt(row["prompt"]) for row in rows]
    log({"step": 0, **texts.told("best of n")})
    batch_size = best_of_n.batch_size
    responses = sample_in_batches(
        language, encoded, model, batch_size=batch_size, seed=arm.seed, label="best of n: sampling"
    )
    said = as_said(language, rows, responses)
    pooled = None
    if rewards.layer is not None:
        read = []
        for part in in_parts(len(rows), batch_size, "best of n: reading"):
            with torch.no_grad(), autocast(model):
                read.append(pooled_states(language, rewards.layer, encoded[part], responses[part]))
        pooled = torch.cat(read)
    scores = rewards.score(said, pooled, batch_size, "best of n: scoring")
    scale = reference_scale(arm, reward, ensemble)
    paid = arm_reward(arm, engine, scale)(scores).cpu()
    score = torch.where(torch.tensor(said.finished), paid, best_of_n.missing_eos_score).double().view(-1, samples)
    write_candidates(out, responses, said.texts, scores, score, n)
    write_arm(out, arm, scale)
    curve = best_of_n_curve(score, score, n).mean(0)
    for number in curve_points(n):
        log({"step": number, "reward": curve[number - 1].item(), "kl_bound": best_of_n_kl(number)})
