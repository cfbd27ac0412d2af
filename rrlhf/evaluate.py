"""Stage 6: the comparison of policies, on prompts that none of them was trained on.

The gold judge is read here and in data preparation only; no policy is trained against it. The SFT model stands in
the comparison as the optimum under a constant reward. Of best-of-n the responses are there already; its KL is a bound.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.calibration import estimate
from rrlhf.candidates import read_candidates
from rrlhf.config import Arm, Evaluate, Gold, Model
from rrlhf.excerpts import Excerpt, read_excerpts
from rrlhf.gold import GoldJudge
from rrlhf.hardware import device_kind
from rrlhf.judgement import function_values, with_functions
from rrlhf.judging.content import GoldAgreement, RewardJudgement
from rrlhf.judging.metrics import agreement_with_gold, judge_ensemble, judge_single, score_pairs
from rrlhf.models import LanguageModel, PolicyTop, autocast, decode, encode_prompt, load_model
from rrlhf.progress import track
from rrlhf.reward_functions import RewardFunction, load_functions, metric_names
from rrlhf.reward_models.features import PairFeatures, features_of
from rrlhf.reward_models.heads import RewardHeads
from rrlhf.reward_models.scoring import RewardModel, load_for_policy, read_by, shared_layer
from rrlhf.robust import AGGREGATIONS, READINGS, Scores, head_spread
from rrlhf.rollout import Response, hidden_states, response_features, sample_in_batches
from rrlhf.selection import best_of_n_curve, best_of_n_kl, curve_points
from rrlhf.tables import Rows, read_table
from rrlhf.types import Log


class Judges(NamedTuple):
    """All that reads responses: the reference with its trunk, reward heads and functions, and the gold judge if any."""

    language: LanguageModel
    top: PolicyTop  # the reference's layers above the trunk
    layer: int
    models: tuple[RewardModel, RewardModel]
    functions: list[RewardFunction]  # of all arms
    gold: GoldJudge | None

    @property
    def single(self) -> RewardHeads:
        """The single head."""
        return self.models[0].heads

    @property
    def ensemble(self) -> RewardHeads:
        """The ensemble's heads."""
        return self.models[1].heads


class Reading(NamedTuple):
    """What the judges say about sampled responses, one row a response."""

    texts: list[str]
    finished: list[bool]
    kl: Tensor  # [responses] log(pi / pi_ref), nats
    proxy: Tensor  # [responses]
    scores: Scores  # [responses, heads]
    functions: dict[str, Tensor]  # [responses] value of each function, by import path
    gold: Tensor | None  # [responses]
    per_prompt: int

    @property
    def prompt(self) -> Tensor:
        """The prompt's row of every response, [responses]."""
        return torch.arange(len(self.texts)) // self.per_prompt


def run(
    *,
    seed: int,
    model: Model,
    gold: Gold,
    evaluate: Evaluate,
    data: Path,
    sft: Path,
    reward: Path,
    ensemble: Path,
    policies: dict[str, Path],
    out: Path,
    log: Log,
) -> None:
    """Sample from every policy on the evaluation prompts, judge the responses, and write evaluation.json."""
    rows = read_table(data, "evaluate")
    arms = {name: Arm.model_validate_json((folder / "arm.json").read_bytes()) for name, folder in policies.items()}
    functions = load_functions(path for arm in arms.values() for path in arm.functions)
    judges = _judges(model, gold, sft, reward, ensemble, functions, has_gold=rows[0]["topic"] is not None)
    trained, selecting = (
        {name: policies[name] for name, arm in arms.items() if arm.method == method} for method in ("ppo", "best_of_n")
    )
    readings: dict[str, Reading] = {}
    for name, folder in {"sft": sft, **policies}.items():
        chosen = name in selecting
        responses = read_candidates(folder).best if chosen else _sample(folder, name, rows, model, evaluate, seed)
        reading = _read(judges, responses, rows, model, evaluate, name)
        bound = torch.full_like(reading.kl, best_of_n_kl(arms[name].n or 1)) if chosen else reading.kl
        readings[name] = reading._replace(kl=bound)
    compared = [_summary(name, reading, arms.get(name)) for name, reading in readings.items()]
    result = {
        "policies": compared,
        "curves": [point for name, folder in trained.items() for point in _curve(name, folder, data, judges.gold)],
        "selection": [
            point for name, folder in selecting.items() for point in _selection(name, folder, rows, judges.gold)
        ],
        "samples": _samples(readings, rows, evaluate),
        "excerpts": {name: found for name, folder in policies.items() if (found := _excerpts(folder, data, judges))},
        "reward_models": _judgements(judges, PairFeatures.load(reward), features_of(ensemble, reward)),
        "gold_agreement": _agreements(readings),
    }
    for policy in compared:
        log({"step": 0, **{f"{policy['name']}_{key}": value["mean"] for key, value in policy["metrics"].items()}})
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def repetition(text: str) -> float:
    """Return the share of words that occurred before in the text, 0 to 1."""
    words = text.lower().split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def _judges(
    model: Model,
    gold: Gold,
    sft: Path,
    reward: Path,
    ensemble: Path,
    functions: list[RewardFunction],
    *,
    has_gold: bool,
) -> Judges:
    language = load_model(sft)
    language.network.to(device_kind(model.device)).requires_grad_(False)
    models = (load_for_policy(reward, language.device), load_for_policy(ensemble, language.device))
    layer = shared_layer(models, reward)
    layer = language.layers if layer is None else layer
    return Judges(language, PolicyTop(language, layer), layer, models, functions, GoldJudge(gold) if has_gold else None)


def _sample(folder: Path, name: str, rows: Rows, model: Model, evaluate: Evaluate, seed: int) -> list[Response]:
    """Sample `samples_per_prompt` responses of a policy to every prompt; those of one prompt lie side by side."""
    language = load_model(folder)
    language.network.to(device_kind(model.device))
    prompts = [
        encode_prompt(language, row["prompt"], model) for row in rows for _ in range(evaluate.samples_per_prompt)
    ]
    return sample_in_batches(
        language, prompts, model, batch_size=evaluate.batch_size, seed=seed, label=f"evaluate: sampling {name}"
    )


@torch.no_grad()
def _read(
    judges: Judges, responses: list[Response], rows: Rows, model: Model, evaluate: Evaluate, name: str
) -> Reading:
    """Run the reference once over prompt and response: it gives the KL and the reward features."""
    per_prompt = len(responses) // len(rows)
    asked = [row for row in rows for _ in range(per_prompt)]
    logprobs, features = [], []
    for start in track(
        range(0, len(asked), evaluate.batch_size), -(-len(asked) // evaluate.batch_size), f"evaluate: {name}"
    ):
        part = slice(start, start + evaluate.batch_size)
        with autocast(model):
            logprob, pooled = _reference_pass(judges, asked[part], responses[part], model)
        logprobs.append(logprob)
        features.append(pooled)
    pooled = torch.cat(features)
    texts = [decode(judges.language, response.tokens) for response in responses]
    finished = [response.finished for response in responses]
    own = torch.tensor([response.logprob for response in responses])
    prompts = [row["prompt"] for row in asked]
    single, scores = read_by(judges.models, pooled, prompts, texts, evaluate.batch_size)
    gold = judges.gold.score([row["topic"] for row in asked], texts, finished).total if judges.gold else None
    return Reading(
        texts=texts,
        finished=finished,
        kl=own - torch.cat(logprobs).cpu(),
        proxy=single.mean[:, 0].cpu(),
        scores=Scores(scores.mean.cpu(), scores.std.cpu()),
        functions=function_values(judges.functions, prompts, texts, [row.tokens for row in responses], finished),
        gold=torch.tensor(gold) if gold is not None else None,
        per_prompt=per_prompt,
    )


def _reference_pass(judges: Judges, rows: Rows, responses: list[Response], model: Model) -> tuple[Tensor, Tensor]:
    """Return the reference's log-probability [batch] of each response, and the pooled trunk features."""
    language, device = judges.language, judges.language.device
    prompts = [encode_prompt(language, row["prompt"], model) for row in rows]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    counts = torch.tensor([len(response.tokens) for response in responses], device=device)
    finished = torch.tensor([response.finished for response in responses], device=device)
    width = int(counts.max())
    eos = language.tokenizer.eos_token_id
    padded = torch.tensor([row.tokens + [eos] * (width - len(row.tokens)) for row in responses], device=device)
    sequences = [prompt + response.tokens for prompt, response in zip(prompts, responses, strict=True)]
    states = hidden_states(language, sequences, judges.layer)
    mask = torch.arange(width, device=device) < counts[:, None]
    logprobs, _ = judges.top(states, lengths, padded, mask)
    return logprobs.sum(1), response_features(states, lengths, counts - finished.long())


def _summary(name: str, reading: Reading, arm: Arm | None) -> dict[str, Any]:
    """Return one row of the comparison: means with standard errors over prompts."""
    columns = {
        "proxy": reading.proxy,
        **{reader: read(reading.scores) for reader, read in READINGS.items()},
        "spread": head_spread(reading.scores),
        "kl": reading.kl,
        "words": torch.tensor([float(len(text.split())) for text in reading.texts]),
        "repetition": torch.tensor([repetition(text) for text in reading.texts]),
        "finished": torch.tensor(reading.finished).double(),
    }
    if reading.gold is not None:
        columns = {"gold": reading.gold, **columns}
    names = metric_names(reading.functions)
    columns |= {names[path]: value for path, value in reading.functions.items()}
    if arm and (arm.reward in AGGREGATIONS or arm.functions):
        columns["reward"] = with_functions(arm, _bare_reward(arm, reading), reading.functions)
    return {
        "name": name,
        "reward": (arm.reward or "preferences") if arm else "none",
        "settings": arm.settings if arm else {},
        **({"functions": arm.functions} if arm and arm.functions else {}),
        **({"method": arm.method} if arm else {}),
        **({"n": arm.n} if arm and arm.n else {}),
        "metrics": {key: estimate(column, reading.prompt)._asdict() for key, column in columns.items()},
    }


def _bare_reward(arm: Arm, reading: Reading) -> Tensor:
    """Return what an arm's reward models say, [responses]."""
    return reading.proxy if arm.reward == "single" else AGGREGATIONS[str(arm.reward)](reading.scores, **arm.settings)


def _curve(name: str, folder: Path, data: Path, gold: GoldJudge | None) -> Rows:
    """Read the responses that a policy gave while it trained: one point per update."""
    topics = [row["topic"] for row in read_table(data, "ppo")]
    rows: Rows = pq.read_table(folder / "rollouts.parquet").to_pylist()
    judged: list[float] | None = None
    if gold:
        asked = [topics[row["prompt"]] for row in rows]
        judged = gold.score(asked, [row["response"] for row in rows], [row["finished"] for row in rows]).total
    points: Rows = []
    for update, numbered in groupby(enumerate(rows), key=lambda item: item[1]["update"]):
        index, group = zip(*numbered, strict=True)
        heads = torch.tensor([row["heads"] for row in group])
        point: dict[str, Any] = {
            "policy": name,
            "update": update,
            "kl": _mean(row["kl"] for row in group),
            "proxy": _mean(row["proxy"] for row in group),
            "spread": heads.std(dim=1, correction=0).mean().item(),
            "words": _mean(len(row["response"].split()) for row in group),
            "heads": heads.mean(0).tolist(),
        }
        if judged:
            found = estimate(torch.tensor([judged[i] for i in index]))
            point |= {"gold": found.mean, "gold_stderr": found.stderr}
        points.append(point)
    return points


def _selection(name: str, folder: Path, rows: Rows, gold: GoldJudge | None) -> Rows:
    """Read the candidates of best-of-n: what its choice gives for every n up to the number of samples.

    Means of an unbiased estimate per prompt, with standard errors over prompts.
    """
    candidates = read_candidates(folder)
    reward = candidates.reward
    samples = reward.shape[1]
    columns = {"reward": reward}
    if gold:
        topics = [row["topic"] for row in rows for _ in range(samples)]
        finished = [response.finished for response in candidates.responses]
        columns["gold"] = torch.tensor(gold.score(topics, candidates.texts, finished).total).view_as(reward)
    curves = {key: best_of_n_curve(reward, values, samples) for key, values in columns.items()}
    return [
        {"policy": name, "n": n, "kl": best_of_n_kl(n)}
        | {key: estimate(curve[:, n - 1])._asdict() for key, curve in curves.items()}
        for n in curve_points(samples)
    ]


def _samples(readings: dict[str, Reading], rows: Rows, evaluate: Evaluate) -> Rows:
    """Return the first response of every policy to the first prompts."""
    shown: Rows = []
    for number, row in enumerate(rows[: evaluate.samples_shown]):
        responses: dict[str, Any] = {}
        for name, reading in readings.items():
            i = number * reading.per_prompt
            response: dict[str, Any] = {
                "text": reading.texts[i],
                "proxy": reading.proxy[i].item(),
                "heads": reading.scores.mean[i].tolist(),
            }
            responses[name] = response | ({"gold": reading.gold[i].item()} if reading.gold is not None else {})
        shown.append({"prompt": row["prompt"][-1]["content"], "responses": responses})
    return shown


def _excerpts(folder: Path, data: Path, judges: Judges) -> list[Excerpt]:
    """Return what a policy wrote as it trained, with gold if there is a judge."""
    found = read_excerpts(folder)
    if judges.gold and found:
        topics = [row["topic"] for row in read_table(data, "ppo")]
        asked, texts = [topics[row["row"]] for row in found], [row["response"] for row in found]
        for row, gold in zip(found, judges.gold.score(asked, texts, [r["finished"] for r in found]).total, strict=True):
            row["gold"] = float(gold)
    return found


def _judgements(judges: Judges, features: PairFeatures, several: PairFeatures) -> list[RewardJudgement]:
    """Judge the single head and the ensemble on pairs that neither was trained on, each on its own features."""
    single = score_pairs(judges.single.cpu(), features.heldout, features.heldout_prompts)
    ensemble = score_pairs(judges.ensemble.cpu(), several.heldout, several.heldout_prompts)
    return [judge_single("single head", single), judge_ensemble("ensemble", ensemble)]


def _agreements(readings: dict[str, Reading]) -> list[GoldAgreement]:
    """Compare the ensemble's beliefs about every policy's responses with gold; none without a gold judge."""
    start = readings["sft"].gold
    agreements = []
    for name, reading in readings.items():
        if start is not None and reading.gold is not None:
            agreements.append(agreement_with_gold(name, reading.scores, reading.gold, start, reading.prompt))
    return agreements


def _mean(numbers: Any) -> float:
    collected = list(numbers)
    return float(sum(collected) / len(collected))
