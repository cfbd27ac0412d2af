"""One reward model, judged on its own held-out pairs or on a file of labelled pairs, as tables and as a page."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter

from rrlhf import files
from rrlhf.config import Params
from rrlhf.data.tables import preferences
from rrlhf.hardware import device_kind
from rrlhf.judging.content import RewardJudgement, Robustness, SubsetAccuracy
from rrlhf.judging.labelled import LabelledPairs, accuracy_by_subset, prompt_numbers, question_wins
from rrlhf.judging.metrics import PairScores, judge_ensemble, judge_single, score_pairs
from rrlhf.judging.perturbations import robustness
from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.cards import filled
from rrlhf.pipeline.graph import DATA
from rrlhf.rewards.features import PairFeatures, folder_of
from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.rewards.scoring import load_reward_model
from rrlhf.robust import mean_reward
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.reporting.report import interval, reward_charts, reward_tables
from rrlhf.tools.reporting.tables import Table, figures, show

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
    lookup: Lookup, artifact: Artifact, pairs: LabelledPairs | None, *, perturb: int, limit: int | None
) -> RewardReport:
    """Judge a reward model.

    pairs: None means the first `limit` that the model was not trained on. perturb: how many perturbed texts of each
    kind are sampled for every response. Raises ValueError that says what to do, and TamperedError when a stored file
    was changed.
    """
    features = lookup.input_of(artifact, "reward") if artifact.stage == "ensemble" else artifact
    if perturb and pairs is None:
        pairs = _heldout_texts(lookup, features, limit)
    if pairs:
        sft = lookup.input_of(features, "sft").path if "sft" in features.inputs else None
        answer = _judged_texts(artifact, sft, pairs, perturb, lookup.params)
    else:
        stored = PairFeatures.load(folder_of(artifact.path, features.path))
        first = Pairs(*(side[:limit] for side in stored.heldout))
        scores = score_pairs(RewardHeads.load(artifact.path), first, stored.heldout_prompts[:limit])
        answer = Answer(_judged(artifact, scores))
    source = pairs.source if pairs else HELDOUT
    return RewardReport(f"{artifact.name} {artifact.digest[:8]}", artifact.digest, source, answer)


def _judged_texts(
    artifact: Artifact, sft: Path | None, labelled: LabelledPairs, perturb: int, params: Params
) -> Answer:
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
    return (judge_ensemble if artifact.stage == "ensemble" else judge_single)(artifact.name, scores)


def _heldout_texts(lookup: Lookup, features: Artifact, limit: int | None) -> LabelledPairs:
    """Return the pairs that a model was not trained on, when the profile's data set is the one that it came from."""
    dataset = lookup.project.data()
    if dataset is None or dataset.digest != features.inputs[DATA]:
        raise UsageError(
            "--perturb needs the texts of the held-out pairs, and the data set of this model is not that of profile "
            f"{lookup.profile}: name its --profile, or a file with --data"
        )
    pairs = preferences(dataset.path, "heldout")[:limit]
    return LabelledPairs(HELDOUT, pairs, [*range(len(pairs))], [], [])


PERTURBED = (
    "Both responses of a pair are changed a little, each on its own, many times. P(chosen wins): how often the better "
    "one still scores higher. Order turned: how often the order differs from that of the texts as they are. Shift: of "
    "the score, in normalised units; away from 0 the reward pays for the change itself. * may change the meaning."
)


def notes(answer: Answer) -> Iterator[str]:
    """Yield what a reader should know before trusting the numbers."""
    if answer.left_out:
        yield f"{answer.left_out} bad rows of the file were left out."
    if answer.cut:
        yield f"{answer.cut:.0%} of the responses are longer than the model reads, and were cut as in training."
    if answer.questions:
        yield (
            f"{answer.questions} questions, some with several responses: by subset, a question counts as right when "
            "each chosen response scores above each rejected one; elsewhere every pair of them counts. RewardBench 2's "
            "own score of its subset Ties weighs margins as well."
        )
    if answer.judgement.prompts < 30:
        yield "Fewer than 30 prompts: the intervals are rough."


def show_report(report: RewardReport, file: Path) -> None:
    """Print the tables and notes, and where the page lies."""
    show(_title(report), *_all_tables(report.answer), *notes(report.answer))
    print(f"\nreport: {file}")


def write(report: RewardReport, folder: Path) -> Path:
    """Write the report as JSON and as one HTML file into a folder, and return the path of the second."""
    data = Path(report.data)
    about = data.name.split(".")[0].strip("*?[]") or data.parent.name
    html = folder / (re.sub(r"[^\w-]+", "-", f"{report.model}-{about}").strip("-") + ".html")
    files.write(html.with_suffix(".json"), content(report))
    files.write(html, render(report))
    return html


def render(report: RewardReport) -> str:
    """Return the report as one HTML file."""
    return filled(
        "reward.html.j2",
        report=report,
        title=_title(report),
        tables=_all_tables(report.answer),
        charts=reward_charts([report.answer.judgement]),
        notes=list(notes(report.answer)),
        looks={},
    )


def content(report: RewardReport) -> str:
    """Return the report as JSON that every reader takes: what is not a finite number is null."""
    return TypeAdapter(RewardReport).dump_json(report, indent=1, exclude_defaults=True).decode()


def _title(report: RewardReport) -> str:
    judgement = report.answer.judgement
    return f"{report.model} on {report.data}: {judgement.pairs} pairs of {judgement.prompts} prompts"


def _all_tables(answer: Answer) -> list[Table]:
    """Return those of the judgement, and by subset and kind of perturbation where these were asked for."""
    found = [*reward_tables([answer.judgement])]
    if answer.subsets:
        lines = [[name, figures(part), interval(part), str(part.n)] for name, part in answer.subsets.subsets.items()]
        lines.append(["mean of subsets (macro)", figures(answer.subsets.macro), "", ""])
        lines.append(["all prompts (micro)", figures(answer.subsets.micro), interval(answer.subsets.micro), ""])
        found.append(Table("By subset", ["", "accuracy", "95 %", "prompts"], lines))
    if answer.robustness:
        lines = [
            [
                kind.kind.replace("_", " ") + ("" if kind.keeps_meaning else " *"),
                figures(kind.wins),
                interval(kind.wins),
                figures(kind.turned),
                figures(kind.shift),
            ]
            for kind in answer.robustness
        ]
        header = ["", "P(chosen wins)", "95 %", "order turned", "shift of the score"]
        found.append(Table("With perturbed texts", header, lines, PERTURBED))
    return found
