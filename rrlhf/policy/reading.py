"""Responses as everybody who compares policies reads them: sampled on the same prompts, scored by the same judges."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.config import ChatJudge, Evaluate, Gold, Model
from rrlhf.data.tables import Rows, columns_of
from rrlhf.hardware import device_kind
from rrlhf.judging.chat import Comparisons
from rrlhf.judging.scored import Scorer
from rrlhf.judging.second import SecondJudge
from rrlhf.judging.surprise import PromptedGold
from rrlhf.models.load import LanguageModel, load_model
from rrlhf.models.processes import autocast, in_parts
from rrlhf.models.rollout import Response, response_features, sample_in_batches
from rrlhf.models.states import entering, hidden_states
from rrlhf.models.text import Texts, decode, most_cut
from rrlhf.models.top import PolicyTop, split_responses
from rrlhf.policy.learner import Place
from rrlhf.policy.reward import Responses, RewardModels, load_reward_models
from rrlhf.policy.reward_functions import RewardFunction
from rrlhf.rewards.heads import RewardHeads
from rrlhf.robust import Scores
from rrlhf.types import Metrics

PARTS = ("relevance", "tone", "nonwords", "gibberish")  # of gold; the others are metrics of their own


class Asked(NamedTuple):
    """The prompts that every policy of a comparison answers, and how."""

    rows: Rows
    model: Model
    evaluate: Evaluate
    seed: int

    @property
    def has_gold(self) -> bool:
        """Whether the prompts have topics, for which the gold judge knows what is good."""
        return self.rows[0]["topic"] is not None

    def each(self, responses: int) -> Rows:
        """Return the row of every response, so many to a prompt side by side."""
        return [row for row in self.rows for _ in range(responses)]


class Judges(NamedTuple):
    """All that reads responses: the reference with its trunk, reward heads and functions, and what judges there are."""

    language: LanguageModel
    texts: Texts  # of the reference
    top: PolicyTop  # the reference's layers above the trunk
    layer: int  # of the reference, whose entering states reward heads read
    rewards: RewardModels  # with the reward functions of all arms
    gold: PromptedGold | None
    own: Comparisons | Scorer | None  # the user's
    second: SecondJudge | None = None

    @property
    def single(self) -> RewardHeads:
        """The single head."""
        return self.rewards.single.heads

    @property
    def ensemble(self) -> RewardHeads:
        """The ensemble's heads."""
        return self.rewards.ensemble.heads

    def told(self) -> Metrics:
        """Say on the terminal what was cut of prompts; return it with what reward models cut that read text."""
        return most_cut([self.texts.told("evaluate"), self.rewards.cut])


class Reading(NamedTuple):
    """What the judges say about sampled responses, one row a response."""

    texts: list[str]
    finished: list[bool]
    kl: Tensor  # [responses] log(pi / pi_ref), nats
    proxy: Tensor  # [responses]
    scores: Scores  # [responses, heads]
    functions: dict[str, Tensor]  # [responses] value of each function, by import path
    gold: Tensor | None  # [responses]
    gold_parts: dict[str, Tensor]  # what gold is made of, [responses] each; empty without a gold judge
    per_prompt: int
    own: Tensor | None = None  # [responses] score by the user's judge, if that is a reward model

    @property
    def prompt(self) -> Tensor:
        """The prompt's row of every response, [responses]."""
        return torch.arange(len(self.texts)) // self.per_prompt

    @property
    def words(self) -> Tensor:
        """Words of every response, [responses] float64."""
        return torch.tensor([float(len(text.split())) for text in self.texts], dtype=torch.float64)


def load_judges(asked: Asked, gold: Gold, models: Mapping[str, Path], functions: Sequence[RewardFunction]) -> Judges:
    """Load the SFT model with the reward models, the gold judge where it knows the prompts, and the user's own.

    models: the folders of "sft", "reward" and "ensemble".
    """
    _, model, settings, _ = asked
    language = load_model(models["sft"], model)
    language.network.to(device_kind(model.device)).requires_grad_(False)
    rewards = load_reward_models(models["reward"], models["ensemble"], language.device, functions)
    layer = language.layers if rewards.layer is None else rewards.layer
    own: Comparisons | Scorer | None = None
    if isinstance(settings.judge, ChatJudge):
        own = Comparisons(settings.judge)
    elif settings.judge:
        own = Scorer(settings.judge, model, settings.batch_size)
    return Judges(
        language,
        Texts(language, model),
        PolicyTop(language, layer),
        layer,
        rewards,
        gold=PromptedGold(gold, model) if asked.has_gold else None,
        own=own,
    )


def sample_responses(asked: Asked, folder: Path, name: str) -> list[Response]:
    """Sample `samples_per_prompt` responses of a policy to every prompt; those of one prompt lie side by side."""
    _, model, settings, seed = asked
    language = load_model(folder, model)
    language.network.to(device_kind(model.device))
    texts = Texts(language, model)
    prompts = [texts.prompt(row["prompt"]) for row in asked.each(settings.samples_per_prompt)]
    return sample_in_batches(
        language, prompts, model, batch_size=settings.batch_size, seed=seed, label=f"evaluate: sampling {name}"
    )


@torch.no_grad()
def read_responses(judges: Judges, asked: Asked, responses: list[Response], name: str) -> Reading:
    """Run the reference once over prompt and response: it gives the KL and the reward features."""
    per_prompt, batch_size = len(responses) // len(asked.rows), asked.evaluate.batch_size
    rows = asked.each(per_prompt)
    prompts = [judges.texts.prompt(row["prompt"]) for row in rows]
    logprobs, features = [], []
    for part in in_parts(len(rows), batch_size, f"evaluate: {name}"):
        with autocast(asked.model):
            place = _place(judges.language, judges.top.first, prompts[part], responses[part])
            logprob, _, states = judges.top.read(*place, layer=judges.layer)
        logprobs.append(logprob.sum(1))
        if states is not None:
            features.append(response_features(states, place[1], _spoken(judges.language, responses[part])))
    said = as_said(judges.language, rows, responses)
    logprob = torch.tensor([response.logprob for response in responses])
    scores = judges.rewards.score(said, torch.cat(features), batch_size)
    gold = judges.gold.score(rows, said.texts, said.finished) if judges.gold else None
    scorer = judges.own if isinstance(judges.own, Scorer) else None
    return Reading(
        texts=said.texts,
        finished=said.finished,
        kl=logprob - torch.cat(logprobs).cpu(),
        proxy=scores.single.cpu(),
        scores=scores.ensemble.each(Tensor.cpu),
        functions={path: values.cpu() for path, values in scores.functions.items()},
        gold=torch.tensor(gold.total) if gold else None,
        gold_parts={name: torch.tensor(getattr(gold, name)) for name in PARTS} if gold else {},
        per_prompt=per_prompt,
        own=scorer.score(said.prompts, said.texts, f"evaluate: judge of {name}") if scorer else None,
    )


def wins_over(judges: Judges, asked: Asked, ours: Reading, theirs: Reading, name: str) -> tuple[Tensor, Tensor]:
    """Return by the user's judge what our responses win, 1, 1/2 or 0, and their prompts' rows; both [verdicts].

    The first response to a prompt meets the first of theirs, and so on. Without a judge, or a verdict, there is none.
    """
    each = min(ours.per_prompt, theirs.per_prompt)
    mine, other = ([i for i in range(len(one.texts)) if i % one.per_prompt < each] for one in (ours, theirs))
    prompt = torch.arange(len(mine)) // each
    if ours.own is not None and theirs.own is not None:
        wins = (ours.own[mine] - theirs.own[other]).sign() / 2 + 0.5
    elif isinstance(judges.own, Comparisons):
        prompts = [row["prompt"] for row in asked.each(each)]
        both = [ours.texts[i] for i in mine], [theirs.texts[i] for i in other]
        wins = judges.own.wins(prompts, *both, f"evaluate: judge of {name}")
    else:
        return torch.empty(0), torch.empty(0)
    known = ~wins.isnan()
    return wins[known], prompt[known]


def repetition(text: str) -> float:
    """Return the share of words that occurred before in the text, 0 to 1."""
    words = text.lower().split()
    return 1 - len(set(words)) / len(words) if words else 0.0


def as_said(language: LanguageModel, rows: Rows, responses: Sequence[Response]) -> Responses:
    """Return responses to rows of the data as reward models and functions read them."""
    return Responses(
        prompts=[row["prompt"] for row in rows],
        texts=[decode(language, response.tokens) for response in responses],
        tokens=[response.tokens for response in responses],
        finished=[response.finished for response in responses],
        columns=columns_of(rows),
    )


def pooled_states(
    language: LanguageModel, layer: int, prompts: Sequence[list[int]], responses: Sequence[Response]
) -> Tensor:
    """Return what reward heads that read the states entering `layer` see of responses, [batch, width]."""
    states = hidden_states(language, _sequences(prompts, responses), layer)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=language.device)
    return response_features(states, lengths, _spoken(language, responses))


def _place(
    language: LanguageModel, first: int | None, prompts: Sequence[list[int]], responses: Sequence[Response]
) -> Place:
    """Return where a `PolicyTop` from `first` on reads responses."""
    sequences = _sequences(prompts, responses)
    lengths = [len(prompt) for prompt in prompts]
    return entering(language, sequences, first), *split_responses(sequences, lengths, language.device)


def _sequences(prompts: Sequence[list[int]], responses: Sequence[Response]) -> list[list[int]]:
    return [prompt + response.tokens for prompt, response in zip(prompts, responses, strict=True)]


def _spoken(language: LanguageModel, responses: Sequence[Response]) -> Tensor:
    """Return how many tokens of each response are text, its end excluded, [batch]."""
    return torch.tensor([len(each.tokens) - each.finished for each in responses], device=language.device)
