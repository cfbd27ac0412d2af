"""Stage 6: the comparison of policies, on prompts that none of them was trained on.

The gold judge is read here and in data preparation only; no policy is trained against it, nor against the second judge
(rrlhf/judging/second.py), which is read here only. A judge of the user's own says how often a policy beats its start.
The SFT model stands in the comparison as the optimum under a constant reward. Of best-of-n the responses are there
already; its KL is a bound.
"""

from dataclasses import replace
from itertools import groupby, repeat
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.config import AnyJudge, Arm, BestOfNArm, ChatJudge, Evaluate, Gold, Model, PaidArm, PpoArm
from rrlhf.data.load import further_columns
from rrlhf.data.tables import Rows, preferences, read_table
from rrlhf.judging.calibration import estimate, group_means
from rrlhf.judging.chat import Comparisons
from rrlhf.judging.content import GoldAgreement, Measured, RewardJudgement
from rrlhf.judging.evaluation import Chosen, Evaluation, Excerpt, Point, Policy, Response, Sample, write_evaluation
from rrlhf.judging.metrics import agreement_with_gold, judge_ensemble, judge_single, score_pairs
from rrlhf.judging.scored import Scorer
from rrlhf.judging.second import SecondJudge
from rrlhf.judging.surprise import PromptedGold
from rrlhf.policy.excerpts import read_excerpts
from rrlhf.policy.reading import Judges, Reading, load_judges, read_responses, repetition, sample_responses
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
    rows = read_table(data, "evaluate")
    paid_by = {name: read_arm(folder) for name, folder in policies.items()}
    paths = [path for arm, _ in paid_by.values() if isinstance(arm, PaidArm) for path in arm.functions]
    functions = load_functions(paths, further_columns(data))
    trained = {name: policies[name] for name, (arm, _) in paid_by.items() if isinstance(arm, PpoArm)}
    selecting = {name: arm for name, (arm, _) in paid_by.items() if isinstance(arm, BestOfNArm)}
    responses = {  # before the judges are there: one model at a time takes memory
        name: read_candidates(folder).best
        if name in selecting
        else sample_responses(folder, name, rows, model, evaluate, seed)
        for name, folder in {"sft": sft, **policies}.items()
    }
    judges = load_judges(model, gold, sft, reward, ensemble, functions, has_gold=rows[0]["topic"] is not None)
    readings: dict[str, Reading] = {}
    for name, said in responses.items():
        arm = selecting.get(name)
        reading = read_responses(judges, said, rows, model, evaluate, name)
        bound = torch.full_like(reading.kl, best_of_n_kl(arm.n)) if arm else reading.kl
        readings[name] = reading._replace(kl=bound)
    second = SecondJudge(preferences(data, "heldout"))
    opinions = {
        name: second.score([rows[i]["prompt"] for i in reading.prompt.tolist()], reading.texts)
        for name, reading in readings.items()
    }
    at_length = gold_at_length(readings)
    own = _own_judge(evaluate.judge, model, evaluate.batch_size) if evaluate.judge else None
    verdicts = _against_start(own, readings, rows) if own else {}
    evaluation = Evaluation(
        policies=[
            _policy(
                name,
                reading,
                opinions[name],
                at_length.get(name),
                verdicts.get(name, {}),
                *paid_by.get(name, (None, NO_SCALE)),
            )
            for name, reading in readings.items()
        ],
        curves=[
            point
            for name, folder in trained.items()
            for point in _curve(name, folder, data, judges.gold, second, own, evaluate.curve_responses)
        ],
        selection=[point for name in selecting for point in _selection(name, policies[name], rows, judges.gold)],
        samples=[_sample(number, row, readings) for number, row in enumerate(rows[: evaluate.samples_shown])],
        excerpts={name: found for name, folder in policies.items() if (found := _excerpts(folder, data, judges.gold))},
        reward_models=_judgements(judges, PairFeatures.load(reward), PairFeatures.load(folder_of(ensemble, reward))),
        gold_agreement=_agreements(readings),
        judge=own.told() if own else None,
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
    varied = sum(float((x**2).sum()) for x in inside.values())
    slope = sum(float(inside[name] @ golds[name].double()) for name in golds) / varied if varied else 0.0
    return {name: gold - slope * (words[name] - words["sft"].mean()) for name, gold in golds.items()}


def _own_judge(settings: AnyJudge, model: Model, batch_size: int) -> Comparisons | Scorer:
    return Comparisons(settings) if isinstance(settings, ChatJudge) else Scorer(settings, model, batch_size)


def _against_start(
    judge: Comparisons | Scorer, readings: dict[str, Reading], rows: Rows
) -> dict[str, dict[str, Measured]]:
    """Return how each policy's responses do against the start's, by the user's judge: those of one number meet."""
    start, label = readings["sft"], "evaluate: judge of {}"
    found: dict[str, dict[str, Measured]] = {}
    scores: dict[str, Tensor] = {}
    for name, reading in readings.items():
        each = min(reading.per_prompt, start.per_prompt)
        ours, theirs = ([i for i in range(len(one.texts)) if i % one.per_prompt < each] for one in (reading, start))
        if isinstance(judge, Scorer):
            asked = [rows[i]["prompt"] for i in reading.prompt.tolist()]
            scores[name] = judge.score(asked, reading.texts, label.format(name))
            wins = (scores[name][ours] - scores["sft"][theirs]).sign() / 2 + 0.5
        else:
            asked = [row["prompt"] for row in rows for _ in range(each)]
            both = [reading.texts[i] for i in ours], [start.texts[i] for i in theirs]
            wins = judge.wins(asked, *both, label.format(name))
        known = ~wins.isnan()
        if known.any():
            wins, prompt = wins[known], (torch.arange(len(wins)) // each)[known]
            found[name] = {"judge_win_rate": estimate(wins, prompt), "judge_ties": estimate(wins == 0.5, prompt)}
        if name in scores:
            found[name]["judge_score"] = estimate(scores[name], reading.prompt)
    return found


def _policy(
    name: str,
    reading: Reading,
    second_opinion: Tensor,
    at_length: Tensor | None,
    verdicts: dict[str, Measured],
    arm: Arm | None,
    scale: Scale,
) -> Policy:
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
    reward = arm.reward if isinstance(arm, PaidArm) else "preferences" if arm else "none"
    return Policy(
        name=name,
        reward=reward,
        settings=arm.settings if isinstance(arm, PaidArm) else {},
        metrics={key: estimate(column, reading.prompt) for key, column in columns.items()} | verdicts,
        functions=arm.functions if isinstance(arm, PaidArm) else {},
        method=arm.method if arm else None,
        n=arm.n if isinstance(arm, BestOfNArm) else None,
        gold_by_prompt=() if reading.gold is None else group_means(reading.gold, reading.prompt).tolist(),
    )


def _curve(
    name: str,
    folder: Path,
    data: Path,
    gold: PromptedGold | None,
    second: SecondJudge,
    own: Comparisons | Scorer | None,
    most: int,
) -> list[Point]:
    """Read the responses that a policy gave while it trained, by the judges `most` an update: one point per update."""
    table = read_table(data, "ppo")
    rows: Rows = pq.read_table(folder / "rollouts.parquet").to_pylist()
    updates = [list(some) for _, some in groupby(rows, key=lambda row: row["update"])]
    read = [row for some in updates for row in some[:most]]
    counts = [len(some[:most]) for some in updates]
    asked, texts = [table[row["prompt"]] for row in read], [row["response"] for row in read]
    prompts = [row["prompt"] for row in asked]
    opinions = second.score(prompts, texts).split(counts)
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
                second_opinion=opinion.mean().item(),
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
