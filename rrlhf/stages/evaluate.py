"""Stage 6: the comparison of policies, on prompts that none of them was trained on.

The gold judge is read here and in data preparation only; no policy is trained against it, nor against the second judge
(rrlhf/judging/second.py), which is read here only. The SFT model stands in the comparison as the optimum under a
constant reward. Of best-of-n the responses are there already; its KL is a bound.
"""

from __future__ import annotations

import json
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.config import Arm, BestOfNArm, Evaluate, Gold, Model, PaidArm, PpoArm
from rrlhf.data.tables import Rows, further_columns, preferences, read_table
from rrlhf.judging.calibration import estimate, group_means
from rrlhf.judging.content import GoldAgreement, RewardJudgement
from rrlhf.judging.metrics import agreement_with_gold, judge_ensemble, judge_single, score_pairs
from rrlhf.judging.second import SecondJudge
from rrlhf.judging.surprise import PromptedGold
from rrlhf.policy.arm_record import NO_SCALE, Scale, read_arm
from rrlhf.policy.candidates import read_candidates
from rrlhf.policy.excerpts import Excerpt, read_excerpts
from rrlhf.policy.judgement import aggregated, paid
from rrlhf.policy.reading import Judges, Reading, load_judges, read_responses, repetition, sample_responses
from rrlhf.policy.reward_functions import load_functions, metric_names
from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, curve_points
from rrlhf.rewards.features import PairFeatures, folder_of
from rrlhf.robust import READINGS, head_spread
from rrlhf.types import Log


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
    paid_by = {name: read_arm(folder) for name, folder in policies.items()}
    paths = [path for arm, _ in paid_by.values() if isinstance(arm, PaidArm) for path in arm.functions]
    functions = load_functions(paths, further_columns(data))
    judges = load_judges(model, gold, sft, reward, ensemble, functions, has_gold=rows[0]["topic"] is not None)
    trained = {name: policies[name] for name, (arm, _) in paid_by.items() if isinstance(arm, PpoArm)}
    selecting = {name: arm for name, (arm, _) in paid_by.items() if isinstance(arm, BestOfNArm)}
    readings: dict[str, Reading] = {}
    for name, folder in {"sft": sft, **policies}.items():
        arm = selecting.get(name)
        sampled = None if arm else sample_responses(folder, name, rows, model, evaluate, seed)
        reading = read_responses(judges, sampled or read_candidates(folder).best, rows, model, evaluate, name)
        bound = torch.full_like(reading.kl, best_of_n_kl(arm.n)) if arm else reading.kl
        readings[name] = reading._replace(kl=bound)
    second = SecondJudge(preferences(data, "heldout"))
    opinions = {
        name: second.score([rows[i]["prompt"] for i in reading.prompt.tolist()], reading.texts)
        for name, reading in readings.items()
    }
    at_length = gold_at_length(readings)
    compared = [
        _summary(name, reading, opinions[name], at_length.get(name), *paid_by.get(name, (None, NO_SCALE)))
        for name, reading in readings.items()
    ]
    result = {
        "policies": compared,
        "curves": [
            point
            for name, folder in trained.items()
            for point in _curve(name, folder, data, judges.gold, second, evaluate.curve_responses)
        ],
        "selection": [point for name in selecting for point in _selection(name, policies[name], rows, judges.gold)],
        "samples": _samples(readings, rows, evaluate),
        "excerpts": {name: found for name, folder in policies.items() if (found := _excerpts(folder, data, judges))},
        "reward_models": _judgements(judges, PairFeatures.load(reward), PairFeatures.load(folder_of(ensemble, reward))),
        "gold_agreement": _agreements(readings),
    }
    log({"step": 0, **judges.told()})
    for policy in compared:
        log({"step": 0, **{f"{policy['name']}_{key}": value["mean"] for key, value in policy["metrics"].items()}})
    (out / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def gold_at_length(readings: dict[str, Reading]) -> dict[str, Tensor]:
    """Return each policy's gold, by response, at the start's length; nothing without a gold judge.

    What a longer response of the same policy gains, by least squares on log(1 + words), is taken off: policies that
    differ in nothing but length come out equal (the idea of Dubois et al. 2024, arXiv 2404.04475).
    """
    words = {name: reading.words.log1p() for name, reading in readings.items()}
    golds = {name: reading.gold for name, reading in readings.items() if reading.gold is not None}
    inside = {name: words[name] - words[name].mean() for name in golds}
    varied = sum(float((x**2).sum()) for x in inside.values())
    slope = sum(float(inside[name] @ golds[name].double()) for name in golds) / varied if varied else 0.0
    return {name: gold - slope * (words[name] - words["sft"].mean()) for name, gold in golds.items()}


def _summary(
    name: str, reading: Reading, second_opinion: Tensor, at_length: Tensor | None, arm: Arm | None, scale: Scale
) -> dict[str, Any]:
    """Return one row of the comparison: means with standard errors over prompts."""
    columns = {
        "second_opinion": second_opinion,
        "proxy": reading.proxy,
        **{reader: read(reading.scores) for reader, read in READINGS.items()},
        "spread": head_spread(reading.scores),
        "sigma": reading.scores.std.mean(1),
        "kl": reading.kl,
        "words": reading.words,
        "repetition": torch.tensor([repetition(text) for text in reading.texts]),
        "finished": torch.tensor(reading.finished).double(),
        **reading.gold_parts,
    }
    if reading.gold is not None and at_length is not None:
        columns = {"gold": reading.gold, **columns, "gold_at_length": at_length}
    names = metric_names(reading.functions)
    columns |= {names[path]: value for path, value in reading.functions.items()}
    if isinstance(arm, PaidArm) and (arm.reward != "single" or arm.functions):
        columns["reward"] = paid(arm, scale, aggregated(arm, reading.proxy, reading.scores), reading.functions)
    return {
        "name": name,
        **_made(arm),
        "metrics": {key: estimate(column, reading.prompt)._asdict() for key, column in columns.items()},
        **({"gold_by_prompt": group_means(reading.gold, reading.prompt).tolist()} if reading.gold is not None else {}),
    }


def _made(arm: Arm | None) -> dict[str, Any]:
    """Tell how a policy was made; None: it is the SFT model."""
    if arm is None:
        return {"reward": "none", "settings": {}}
    told: dict[str, Any] = {"reward": "preferences", "settings": {}, "method": arm.method}
    if isinstance(arm, PaidArm):
        told |= {"reward": arm.reward, "settings": arm.settings}
        told |= {"functions": arm.functions} if arm.functions else {}
    return told | ({"n": arm.n} if isinstance(arm, BestOfNArm) else {})


def _curve(name: str, folder: Path, data: Path, gold: PromptedGold | None, second: SecondJudge, most: int) -> Rows:
    """Read the responses that a policy gave while it trained, by the judges `most` an update: one point per update."""
    table = read_table(data, "ppo")
    rows: Rows = pq.read_table(folder / "rollouts.parquet").to_pylist()
    updates = [list(some) for _, some in groupby(rows, key=lambda row: row["update"])]
    read = [row for some in updates for row in some[:most]]
    asked, texts = [table[row["prompt"]] for row in read], [row["response"] for row in read]
    opinions = iter(second.score([row["prompt"] for row in asked], texts).tolist())
    golds = iter(gold.score(asked, texts, [row["finished"] for row in read]).total if gold else [])
    points: Rows = []
    for some in updates:
        count = len(some[:most])
        point: dict[str, Any] = {
            "policy": name,
            "update": some[0]["update"],
            "kl": _mean(row["kl"] for row in some),
            "proxy": _mean(row["proxy"] for row in some),
            "sigma": _mean(row["sigma"] for row in some),
            "words": _mean(len(row["response"].split()) for row in some),
            "second_opinion": _mean(islice(opinions, count)),
            "heads": torch.tensor([row["heads"] for row in some]).mean(0).tolist(),
        }
        if gold:
            found = estimate(torch.tensor(list(islice(golds, count))))
            point |= {"gold": found.mean, "gold_stderr": found.stderr}
        points.append(point)
    return points


def _selection(name: str, folder: Path, rows: Rows, gold: PromptedGold | None) -> Rows:
    """Read the candidates of best-of-n: what its choice gives for every n up to the number of samples.

    Means of an unbiased estimate per prompt, with standard errors over prompts.
    """
    candidates = read_candidates(folder)
    reward = candidates.reward
    samples = reward.shape[1]
    columns = {"reward": reward}
    if gold:
        asked = [row for row in rows for _ in range(samples)]
        finished = [response.finished for response in candidates.responses]
        columns["gold"] = torch.tensor(gold.score(asked, candidates.texts, finished).total).view_as(reward)
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
        table = read_table(data, "ppo")
        asked, texts = [table[row["row"]] for row in found], [row["response"] for row in found]
        golds = judges.gold.score(asked, texts, [row["finished"] for row in found]).total
        for row, gold in zip(found, golds, strict=True):
            row["gold"] = gold
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
