"""Responses as everybody who compares policies reads them: sampled on the same prompts, scored by the same judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.config import Evaluate, Gold, Model
from rrlhf.data.tables import Rows, columns_of
from rrlhf.hardware import device_kind
from rrlhf.judging.surprise import PromptedGold
from rrlhf.models.load import LanguageModel, autocast, load_model
from rrlhf.models.rollout import Response, response_features, sample_in_batches
from rrlhf.models.states import entering, hidden_states
from rrlhf.models.text import Texts, decode
from rrlhf.models.top import PolicyTop, split_responses
from rrlhf.policy.learner import Place
from rrlhf.policy.reward import Responses, RewardModels, load_reward_models
from rrlhf.policy.reward_functions import RewardFunction
from rrlhf.progress import track
from rrlhf.rewards.heads import RewardHeads
from rrlhf.robust import Scores
from rrlhf.stopping import check_stop
from rrlhf.types import Metrics

PARTS = ("relevance", "tone", "nonwords", "gibberish")  # of gold; the others are metrics of their own


class Judges(NamedTuple):
    """All that reads responses: the reference with its trunk, reward heads and functions, and the gold judge if any."""

    language: LanguageModel
    texts: Texts  # of the reference
    top: PolicyTop  # the reference's layers above the trunk
    layer: int  # of the reference, whose entering states reward heads read
    rewards: RewardModels  # with the reward functions of all arms
    gold: PromptedGold | None

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
        return self.texts.told("evaluate") | self.rewards.cut


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

    @property
    def prompt(self) -> Tensor:
        """The prompt's row of every response, [responses]."""
        return torch.arange(len(self.texts)) // self.per_prompt

    @property
    def words(self) -> Tensor:
        """Words of every response, [responses] float64."""
        return torch.tensor([float(len(text.split())) for text in self.texts], dtype=torch.float64)


def load_judges(
    model: Model,
    gold: Gold,
    sft: Path,
    reward: Path,
    ensemble: Path,
    functions: list[RewardFunction],
    *,
    has_gold: bool,
) -> Judges:
    """Load the SFT model with the reward models, and the gold judge where the prompts have topics."""
    language = load_model(sft, model)
    language.network.to(device_kind(model.device)).requires_grad_(False)
    rewards = load_reward_models(reward, ensemble, language.device, functions)
    layer = language.layers if rewards.layer is None else rewards.layer
    top, judge = PolicyTop(language, layer), PromptedGold(gold, model) if has_gold else None
    return Judges(language, Texts(language, model), top, layer, rewards, judge)


def sample_responses(
    folder: Path, name: str, rows: Rows, model: Model, evaluate: Evaluate, seed: int
) -> list[Response]:
    """Sample `samples_per_prompt` responses of a policy to every prompt; those of one prompt lie side by side."""
    language = load_model(folder, model)
    language.network.to(device_kind(model.device))
    texts = Texts(language, model)
    prompts = [texts.prompt(row["prompt"]) for row in rows for _ in range(evaluate.samples_per_prompt)]
    return sample_in_batches(
        language, prompts, model, batch_size=evaluate.batch_size, seed=seed, label=f"evaluate: sampling {name}"
    )


@torch.no_grad()
def read_responses(
    judges: Judges, responses: list[Response], rows: Rows, model: Model, evaluate: Evaluate, name: str
) -> Reading:
    """Run the reference once over prompt and response: it gives the KL and the reward features."""
    per_prompt = len(responses) // len(rows)
    asked = [row for row in rows for _ in range(per_prompt)]
    prompts = [judges.texts.prompt(row["prompt"]) for row in asked]
    logprobs, features = [], []
    starts = range(0, len(asked), evaluate.batch_size)
    for start in track(starts, len(starts), f"evaluate: {name}"):
        part = slice(start, start + evaluate.batch_size)
        with autocast(model):
            place = _place(judges.language, judges.top.first, prompts[part], responses[part])
            logprob, _, states = judges.top.read(*place, layer=judges.layer)
        logprobs.append(logprob.sum(1))
        if states is not None:
            features.append(response_features(states, place[1], _spoken(judges.language, responses[part])))
        check_stop()
    said = Responses(
        prompts=[row["prompt"] for row in asked],
        texts=[decode(judges.language, response.tokens) for response in responses],
        tokens=[response.tokens for response in responses],
        finished=[response.finished for response in responses],
        columns=columns_of(asked),
    )
    own = torch.tensor([response.logprob for response in responses])
    scores = judges.rewards.score(said, torch.cat(features), evaluate.batch_size)
    gold = judges.gold.score(asked, said.texts, said.finished) if judges.gold else None
    return Reading(
        texts=said.texts,
        finished=said.finished,
        kl=own - torch.cat(logprobs).cpu(),
        proxy=scores.single.cpu(),
        scores=scores.ensemble.each(Tensor.cpu),
        functions={path: values.cpu() for path, values in scores.functions.items()},
        gold=torch.tensor(gold.total) if gold else None,
        gold_parts={name: torch.tensor(getattr(gold, name)) for name in PARTS} if gold else {},
        per_prompt=per_prompt,
    )


def repetition(text: str) -> float:
    """Return the share of words that occurred before in the text, 0 to 1."""
    words = text.lower().split()
    return 1 - len(set(words)) / len(words) if words else 0.0


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
