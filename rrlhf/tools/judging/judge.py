"""One reward model, judged on its own held-out pairs or on a file of labelled pairs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from rrlhf.config import Params
from rrlhf.judging.content import RewardJudgement, Robustness, SubsetAccuracy
from rrlhf.judging.labelled import LabelledPairs, accuracy_by_subset, prompt_numbers, question_wins
from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.plan import Project
from rrlhf.tools.lineage.lookup import Lookup

if TYPE_CHECKING:
    from rrlhf.judging.metrics import PairScores

STAGES = ("reward", "ensemble")
HELDOUT = "held-out pairs"


class About(TypedDict):
    """Which model was judged on what."""

    model: str
    digest: str
    data: str  # the file, or "held-out pairs"


class Answer(TypedDict):
    """What the pairs say about the model."""

    judgement: RewardJudgement
    left_out: NotRequired[int]  # bad rows of the file
    questions: NotRequired[int]  # where some have several chosen or rejected responses
    cut: NotRequired[float]  # share of the responses that are longer than the model reads
    subsets: NotRequired[SubsetAccuracy]
    robustness: NotRequired[list[Robustness]]


class RewardReport(About):
    """What `rrlhf evaluate-reward` writes."""

    answer: Answer


def judged(
    root: Path,
    profile: str,
    params: Params,
    *,
    model: str | None,
    pairs: LabelledPairs | None,
    perturb: int,
    limit: int | None,
) -> RewardReport:
    """Judge a reward model; what a person may have got wrong is checked before anything is scored.

    model: None means the profile's ensemble. pairs: None means the first `limit` that the model was not trained on.
    perturb: how many perturbed texts of each kind are sampled for every response. Raises ValueError that says what to
    do, and TamperedError when a stored file was changed.
    """
    lookup, project = Lookup(root, profile, params), Project(root, profile, params)
    artifact = _reward_model(lookup.find(model), model) if model else _of_profile(project)
    features = artifact if artifact.stage == "reward" else lookup.input_of(artifact, "reward")
    labelled = pairs
    if perturb and labelled is None:
        labelled = _heldout_texts(project, features, limit)
    about: About = {
        "model": f"{artifact.name} {artifact.digest[:8]}",
        "digest": artifact.digest,
        "data": labelled.source if labelled else HELDOUT,
    }
    if labelled is None:
        answer: Answer = {"judgement": _judged(artifact, _stored_scores(artifact, features, limit))}
    else:
        answer = _judged_texts(artifact, lookup.input_of(features, "sft").path, labelled, perturb, params)
    return {**about, "answer": answer}


def _judged_texts(artifact: Artifact, sft: Path, labelled: LabelledPairs, perturb: int, params: Params) -> Answer:
    """Score the pairs' texts, whole and perturbed."""
    import torch

    from rrlhf.hardware import device_kind
    from rrlhf.judging.metrics import PairScores
    from rrlhf.judging.robustness import robustness
    from rrlhf.rewards.scoring import load_reward_model
    from rrlhf.robust import mean_reward

    pairs, prompts = labelled.pairs, prompt_numbers(labelled.pairs)
    responses = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    names = [json.dumps(response) for response in responses]
    once = dict(zip(names, responses, strict=True))  # a response of a question with several stands in many pairs
    texts = [text for _, text in once.values()]
    model = load_reward_model(artifact.path, sft, torch.device(device_kind(params.model.device)))
    score = partial(model.score, batch_size=params.reward.batch_size, label="scoring")
    scores = score([prompt for prompt, _ in once.values()], texts)
    place = {name: i for i, name in enumerate(once)}
    rows = [place[name] for name in names]
    chosen, rejected = scores.of(rows[: len(pairs)]), scores.of(rows[len(pairs) :])
    answer: Answer = {
        "judgement": _judged(artifact, PairScores(chosen, rejected, model.heads.score_std.cpu(), prompts)),
        "left_out": len(labelled.rejected),
        "cut": model.cut["cut_responses"],
    }
    if labelled.subsets:
        wins = question_wins(mean_reward(chosen) - mean_reward(rejected), labelled.questions)
        asked = dict(zip(labelled.questions, prompts.tolist(), strict=True))
        answer["subsets"] = accuracy_by_subset(wins, labelled.subsets, torch.tensor([*asked.values()]))
    if len(set(labelled.questions)) < len(pairs):
        answer["questions"] = len(set(labelled.questions))
    if perturb:
        answer["robustness"] = robustness(score, pairs, prompts, draws=perturb, seed=params.seed)
    return answer


def _judged(artifact: Artifact, scores: PairScores) -> RewardJudgement:
    from rrlhf.judging.metrics import judge_ensemble, judge_single

    judge = judge_single if artifact.stage == "reward" else judge_ensemble
    return judge(artifact.name, scores)


def _stored_scores(artifact: Artifact, features: Artifact, limit: int | None) -> PairScores:
    from rrlhf.judging.metrics import score_pairs
    from rrlhf.rewards.features import PairFeatures, folder_of
    from rrlhf.rewards.heads import Pairs, RewardHeads

    stored = PairFeatures.load(folder_of(artifact.path, features.path))
    first = Pairs(*(side[:limit] for side in stored.heldout))
    return score_pairs(RewardHeads.load(artifact.path), first, stored.heldout_prompts[:limit])


def _heldout_texts(project: Project, features: Artifact, limit: int | None) -> LabelledPairs:
    """Return the pairs that a model was not trained on, when the profile's data set is the one that it came from."""
    from rrlhf.data.tables import preferences

    dataset = project.data()
    if dataset is None or dataset.digest != features.inputs[DATA]:
        raise UsageError(
            "--perturb needs the texts of the held-out pairs, and the data set of this model is not that of profile "
            f"{project.profile}: name its --profile, or a file with --data"
        )
    pairs = preferences(dataset.path, "heldout")[:limit]
    return LabelledPairs(HELDOUT, pairs, [*range(len(pairs))], [], [])


def _of_profile(project: Project) -> Artifact:
    artifact = project.artifact("ensemble")
    if artifact is None:
        raise ValueError(
            f"the ensemble of profile {project.profile} is not up to date; `rrlhf run` comes first, or name a model: "
            "rrlhf evaluate-reward rrlhf-ensemble@latest"
        )
    return artifact


def _reward_model(artifact: Artifact, reference: str) -> Artifact:
    if artifact.stage not in STAGES:
        raise UsageError(f"{reference!r} is made by stage {artifact.stage}; name a model of {' or '.join(STAGES)}")
    return artifact
