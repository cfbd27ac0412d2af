"""Stage 6: the comparison of policies, on prompts that none of them was trained on.

The gold judge is read here and in data preparation only; no policy is trained against it, nor against the second judge
(rrlhf/judging/second.py), which is read here only. A judge of the user's own says how often a policy beats its start.
The SFT model stands in the comparison as the optimum under a constant reward. Of best-of-n the responses are there
already; its KL is a bound.
"""

from dataclasses import replace
from itertools import groupby, repeat
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.config import Arm, BestOfNArm, Evaluate, Gold, Model, PaidArm, PpoArm
from rrlhf.data.load import further_columns
from rrlhf.data.tables import Rows, preferences, read_table
from rrlhf.judging.calibration import estimate, group_means
from rrlhf.judging.content import GoldAgreement, Measured, RewardJudgement
from rrlhf.judging.evaluation import Chosen, Evaluation, Excerpt, Point, Policy, Response, Sample, write_evaluation
from rrlhf.judging.metrics import agreement_with_gold, judge_ensemble, judge_single, score_pairs
from rrlhf.judging.scored import Scorer
from rrlhf.judging.second import SecondJudge
from rrlhf.judging.surprise import PromptedGold
from rrlhf.policy.excerpts import read_excerpts
from rrlhf.policy.reading import (
    Asked,
    Judges,
    Reading,
    load_judges,
    read_responses,
    repetition,
    sample_responses,
    wins_over,
)
from rrlhf.policy.reward import NO_SCALE, Scale, aggregated, paid, read_arm
from rrlhf.policy.reward_functions import load_functions, metric_names
from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, curve_points, read_candidates
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
    asked = Asked(read_table(data, "evaluate"), model, evaluate, seed)
    paid_by = {name: read_arm(folder) for name, folder in policies.items()}
    paths = [path for arm, _ in paid_by.values() if isinstance(arm, PaidArm) for path in arm.functions]
    functions = load_functions(paths, further_columns(data))
    selecting = {name: arm for name, (arm, _) in paid_by.items() if isinstance(arm, BestOfNArm)}
    responses = {  # before the judges are there: one model at a time takes memory
        name: read_candidates(folder).best if name in selecting else sample_responses(asked, folder, name)
        for name, folder in {"sft": sft, **policies}.items()
    }
    judges = load_judges(asked, gold, {"sft": sft, "reward": reward, "ensemble": ensemble}, functions)
    readings = {name: read_responses(judges, asked, said, name) for name, said in responses.items()}
    for name, arm in selecting.items():
        reading = readings[name]
        readings[name] = reading._replace(kl=torch.full_like(reading.kl, best_of_n_kl(arm.n)))
    judges = judges._replace(second=SecondJudge(preferences(data, "heldout")))
    further = {name: _further(judges, asked, reading, readings["sft"], name) for name, reading in readings.items()}
    for name, gold_there in gold_at_length(readings).items():
        further[name]["gold_at_length"] = estimate(gold_there, readings[name].prompt)
    evaluation = Evaluation(
        policies=[
            _policy(name, reading, further[name], *paid_by.get(name, (None, NO_SCALE)))
            for name, reading in readings.items()
        ],
        curves=[
            point
            for name, (arm, _) in paid_by.items()
            if isinstance(arm, PpoArm)
            for point in _curve(judges, name, policies[name], data, evaluate.curve_responses)
        ],
        selection=[point for name in selecting for point in _selection(name, policies[name], asked.rows, judges.gold)],
        samples=[_sample(number, row, readings) for number, row in enumerate(asked.rows[: evaluate.samples_shown])],
        excerpts={name: found for name, folder in policies.items() if (found := _excerpts(folder, data, judges.gold))},
        reward_models=_judgements(judges, PairFeatures.load(reward), PairFeatures.load(folder_of(ensemble, reward))),
        gold_agreement=_agreements(readings),
        judge=judges.own.told() if judges.own else None,
    )
    log({"step": 0, **judges.told(), **(evaluation.judge.costs if evaluation.judge else {})})
    for policy in evaluation.policies:
        log({"step": 0, **{f"{policy.name}_{metric}": value.mean for metric, value in policy.metrics.items()}})
    write_evaluation(evaluation, out)


def gold_at_length(readings: dict[str, Reading]) -> dict[str, Tensor]:
    """Return each policy's gold, by response, at the start's length; nothing without a gold judge.

    What a longer response of the same policy gains, by least squares on log(1 + words), is taken off: policies that
    differ in nothing but length come out equal (the idea of Dubois et al. 2024, arXiv 2404.04475).
    """
    words = {name: reading.words.log1p() for name, reading in readings.items()}
    golds = {name: reading.gold for name, reading in readings.items() if reading.gold is not None}
    inside = {name: words[name] - words[name].mean() for name in golds}
    varied = fsum(float((x**2).sum()) for x in inside.values())
    slope = fsum(float(inside[name] @ golds[name].double()) for name in golds) / varied if varied else 0.0
    return {name: gold - slope * (words[name] - words["sft"].mean()) for name, gold in golds.items()}


def _further(judges: Judges, asked: Asked, reading: Reading, start: Reading, name: str) -> dict[str, Measured]:
    """Return what the second judge says of a policy's responses, and how they do against the start's by the user's."""
    found: dict[str, Measured] = {}
    if judges.second:
        prompts = [row["prompt"] for row in asked.each(reading.per_prompt)]
        found["second_opinion"] = estimate(judges.second.score(prompts, reading.texts), reading.prompt)
    wins, prompt = wins_over(judges, asked, reading, start, name)
    if len(wins):
        found |= {"judge_win_rate": estimate(wins, prompt), "judge_ties": estimate(wins == 0.5, prompt)}
    if reading.own is not None:
        found["judge_score"] = estimate(reading.own, reading.prompt)
    return found


def _policy(name: str, reading: Reading, further: dict[str, Measured], arm: Arm | None, scale: Scale) -> Policy:
    """Return one row of the comparison: means with standard errors over prompts."""
    columns = {
        **({} if reading.gold is None else {"gold": reading.gold}),
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
    names = metric_names(reading.functions)
    columns |= {names[path]: value for path, value in reading.functions.items()}
    if isinstance(arm, PaidArm) and (arm.reward != "single" or arm.functions):
        columns["reward"] = paid(arm, scale, aggregated(arm, reading.proxy, reading.scores), reading.functions)
    reward = arm.reward if isinstance(arm, PaidArm) else "preferences" if arm else "none"
    return Policy(
        name=name,
        reward=reward,
        settings=arm.settings if isinstance(arm, PaidArm) else {},
        metrics={key: estimate(column, reading.prompt) for key, column in columns.items()} | further,
        functions=arm.functions if isinstance(arm, PaidArm) else {},
        method=arm.method if arm else None,
        n=arm.n if isinstance(arm, BestOfNArm) else None,
        gold_by_prompt=() if reading.gold is None else group_means(reading.gold, reading.prompt).tolist(),
    )


def _curve(judges: Judges, name: str, folder: Path, data: Path, most: int) -> list[Point]:
    """Read the responses that a policy gave while it trained, by the judges `most` an update: one point per update."""
    gold, second, own = judges.gold, judges.second, judges.own
    table = read_table(data, "ppo")
    rows: Rows = pq.read_table(folder / "rollouts.parquet").to_pylist()
    updates = [list(some) for _, some in groupby(rows, key=lambda row: row["update"])]
    read = [row for some in updates for row in some[:most]]
    counts = [len(some[:most]) for some in updates]
    asked, texts = [table[row["prompt"]] for row in read], [row["response"] for row in read]
    prompts = [row["prompt"] for row in asked]
    opinions = second.score(prompts, texts).split(counts) if second else repeat(None)
    scores = own.score(prompts, texts, f"evaluate: judge of {name}'s training") if isinstance(own, Scorer) else None
    finished = [row["finished"] for row in read]
    golds = torch.tensor(gold.score(asked, texts, finished).total).split(counts) if gold else repeat(None)
    points = []
    own_scores = repeat(None) if scores is None else scores.split(counts)
    for some, opinion, own_score, judged in zip(updates, opinions, own_scores, golds, strict=False):
        found = None if judged is None else estimate(judged)
        points.append(
            Point(
                policy=name,
                update=some[0]["update"],
                kl=fmean(row["kl"] for row in some),
                proxy=fmean(row["proxy"] for row in some),
                words=fmean(len(row["response"].split()) for row in some),
                heads=torch.tensor([row["heads"] for row in some]).mean(0).tolist(),
                sigma=fmean(row["sigma"] for row in some),
                second_opinion=None if opinion is None else opinion.mean().item(),
                judge_score=None if own_score is None else own_score.mean().item(),
                gold=found.mean if found else None,
                gold_stderr=found.stderr if found else None,
            )
        )
    return points


def _selection(name: str, folder: Path, rows: Rows, gold: PromptedGold | None) -> list[Chosen]:
    """Read the candidates of best-of-n: what its choice gives for every n up to the number of samples.

    Means of an unbiased estimate per prompt, with standard errors over prompts.
    """
    candidates = read_candidates(folder)
    reward = candidates.reward
    samples = reward.shape[1]
    rewards = best_of_n_curve(reward, reward, samples)
    golds = None
    if gold:
        asked = [row for row in rows for _ in range(samples)]
        finished = [response.finished for response in candidates.responses]
        scores = torch.tensor(gold.score(asked, candidates.texts, finished).total).view_as(reward)
        golds = best_of_n_curve(reward, scores, samples)
    return [
        Chosen(
            policy=name,
            n=n,
            kl=best_of_n_kl(n),
            reward=estimate(rewards[:, n - 1]),
            gold=None if golds is None else estimate(golds[:, n - 1]),
        )
        for n in curve_points(samples)
    ]


def _sample(number: int, row: dict[str, Any], readings: dict[str, Reading]) -> Sample:
    """Return the first response of every policy to a prompt."""
    responses = {}
    for name, reading in readings.items():
        i = number * reading.per_prompt
        gold = None if reading.gold is None else reading.gold[i].item()
        responses[name] = Response(reading.texts[i], reading.proxy[i].item(), reading.scores.mean[i].tolist(), gold)
    return Sample(row["prompt"][-1]["content"], responses)


def _excerpts(folder: Path, data: Path, gold: PromptedGold | None) -> list[Excerpt]:
    """Return what a policy wrote as it trained, with gold if there is a judge."""
    found = read_excerpts(folder)
    if gold is None or not found:
        return found
    table = read_table(data, "ppo")
    asked, texts = [table[one.row] for one in found], [one.response for one in found]
    golds = gold.score(asked, texts, [one.finished for one in found]).total
    return [replace(one, gold=score) for one, score in zip(found, golds, strict=True)]


def _judgements(judges: Judges, features: PairFeatures, several: PairFeatures) -> list[RewardJudgement]:
    """Judge the single head and the ensemble on pairs that neither was trained on, each on its own features."""
    single = score_pairs(judges.single.cpu(), features.heldout, features.heldout_prompts)
    ensemble = score_pairs(judges.ensemble.cpu(), several.heldout, several.heldout_prompts)
    return [judge_single("single head", single), judge_ensemble("ensemble", ensemble)]


def _agreements(readings: dict[str, Reading]) -> list[GoldAgreement]:
    """Compare the ensemble's beliefs about every policy's responses with gold; none without a gold judge."""
    start = readings["sft"].gold
    return [
        agreement_with_gold(name, reading.scores, reading.gold, start, reading.prompt)
        for name, reading in readings.items()
        if start is not None and reading.gold is not None
    ]
