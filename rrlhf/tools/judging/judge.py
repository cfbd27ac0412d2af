"""One reward model, judged on its own held-out pairs or on a file of labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rrlhf.config import Params
from rrlhf.data.tables import preferences
from rrlhf.hardware import device_kind
from rrlhf.judging.content import RewardJudgement, Robustness, SubsetAccuracy
from rrlhf.judging.labelled import LabelledPairs, accuracy_by_subset, prompt_numbers, question_wins
from rrlhf.judging.metrics import PairScores, judge_ensemble, judge_single, score_pairs
from rrlhf.judging.perturbations import robustness
from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.plan import Project
from rrlhf.rewards.features import PairFeatures, folder_of
from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.rewards.scoring import load_reward_model
from rrlhf.robust import mean_reward
from rrlhf.tools.lineage.lookup import Lookup

HELDOUT = "held-out pairs"


@dataclass(frozen=True)
class Answer:
    """What the pairs say about the model."""

    judgement: RewardJudgement
    left_out: int | None = None  # bad rows of the file
    cut: float | None = None  # share of the responses that are longer than the model reads
    subsets: SubsetAccuracy | None = None
    questions: int | None = None  # where some have several chosen or rejected responses
    robustness: Sequence[Robustness] = ()


@dataclass(frozen=True)
class RewardReport:
    """What `rrlhf evaluate-reward` writes: which model was judged on what, and how."""

    model: str
    digest: str
    data: str  # the file, or "held-out pairs"
    answer: Answer


def judged(
    project: Project,
    lookup: Lookup,
    artifact: Artifact,
    pairs: LabelledPairs | None,
    *,
    perturb: int,
    limit: int | None,
) -> RewardReport:
    """Judge a reward model.

    pairs: None means the first `limit` that the model was not trained on. perturb: how many perturbed texts of each
    kind are sampled for every response. Raises ValueError that says what to do, and TamperedError when a stored file
    was changed.
    """
    features = artifact if artifact.stage == "reward" else lookup.input_of(artifact, "reward")
    if perturb and pairs is None:
        pairs = _heldout_texts(project, features, limit)
    if pairs:
        answer = _judged_texts(artifact, lookup.input_of(features, "sft").path, pairs, perturb, project.params)
    else:
        stored = PairFeatures.load(folder_of(artifact.path, features.path))
        first = Pairs(*(side[:limit] for side in stored.heldout))
        scores = score_pairs(RewardHeads.load(artifact.path), first, stored.heldout_prompts[:limit])
        answer = Answer(_judged(artifact, scores))
    source = pairs.source if pairs else HELDOUT
    return RewardReport(f"{artifact.name} {artifact.digest[:8]}", artifact.digest, source, answer)


def _judged_texts(artifact: Artifact, sft: Path, labelled: LabelledPairs, perturb: int, params: Params) -> Answer:
    """Score the pairs' texts, whole and perturbed."""
    pairs, prompts = labelled.pairs, prompt_numbers(labelled.pairs)
    model = load_reward_model(artifact.path, sft, torch.device(device_kind(params.model.device)))
    score = partial(model.score, batch_size=params.reward.batch_size, label="scoring")
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores, cut = score([pair.prompt for pair in pairs] * 2, texts), model.cut["cut_responses"]
    chosen, rejected = (scores.of([*range(start, start + len(pairs))]) for start in (0, len(pairs)))
    subsets = None
    if labelled.subsets:
        wins = question_wins(mean_reward(chosen) - mean_reward(rejected), labelled.questions)
        asked = dict(zip(labelled.questions, prompts.tolist(), strict=True))
        subsets = accuracy_by_subset(wins, labelled.subsets, torch.tensor([*asked.values()]))
    questions = len(set(labelled.questions))
    return Answer(
        judgement=_judged(artifact, PairScores(chosen, rejected, model.heads.score_std.cpu(), prompts)),
        left_out=len(labelled.rejected),
        cut=cut,
        subsets=subsets,
        questions=questions if questions < len(pairs) else None,
        robustness=robustness(score, pairs, prompts, draws=perturb, seed=params.seed) if perturb else (),
    )


def _judged(artifact: Artifact, scores: PairScores) -> RewardJudgement:
    return (judge_single if artifact.stage == "reward" else judge_ensemble)(artifact.name, scores)


def _heldout_texts(project: Project, features: Artifact, limit: int | None) -> LabelledPairs:
    """Return the pairs that a model was not trained on, when the profile's data set is the one that it came from."""
    dataset = project.data()
    if dataset is None or dataset.digest != features.inputs[DATA]:
        raise UsageError(
            "--perturb needs the texts of the held-out pairs, and the data set of this model is not that of profile "
            f"{project.profile}: name its --profile, or a file with --data"
        )
    pairs = preferences(dataset.path, "heldout")[:limit]
    return LabelledPairs(HELDOUT, pairs, [*range(len(pairs))], [], [])
