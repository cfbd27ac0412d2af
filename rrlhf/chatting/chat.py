"""Chat: one prompt, answered by one or two models side by side, with what an ensemble of reward models thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from rrlhf.config import Model, Params
from rrlhf.hardware import device_kind
from rrlhf.language_models.models import LanguageModel, decode, encode_prompt, load_model
from rrlhf.lineage.lookup import Lookup
from rrlhf.reward_models.scoring import RewardModel, load_reward_model
from rrlhf.robust import head_spread, mean_reward, worst_reward
from rrlhf.rollout import Response, sample_in_batches
from rrlhf.running.plan import Project
from rrlhf.store.artifacts import MANIFEST, Artifact
from rrlhf.types import Message

ANSWERS = ("sft", "ppo", "dpo")  # stages whose artifact is a model that answers


class Score(TypedDict):
    """What the ensemble says of one response, normalised: 0 is the average response of the SFT model."""

    mean: float
    worst: float
    spread: float  # standard deviation over heads
    heads: list[float]


class Answer(TypedDict):
    """One model's answer."""

    model: str
    text: str
    finished: bool
    score: Score | None  # None: no ensemble is at hand


class Speaker(NamedTuple):
    """A model that answers, under the name that it was asked for by."""

    name: str
    language: LanguageModel
    model: Model
    artifact: Artifact | None  # None: a plain transformers folder


class Chat(NamedTuple):
    """The models of one conversation."""

    speakers: list[Speaker]
    ensemble: RewardModel | None
    judge: str | None  # the ensemble's name


def open_chat(root: Path, profile: str, params: Params, models: Sequence[str], ensemble: str | None) -> Chat:
    """Load the models, and the ensemble that judges them: the one named, the first model's own, or the profile's.

    models: registered versions, aliases, digests, or folders of an artifact or of transformers. Raises ValueError that
    says what to do, and TamperedError when a stored file was changed.
    """
    lookup = Lookup(root, profile, params)
    speakers = [_speaker(lookup, reference, params.model) for reference in models]
    judge = _ensemble(lookup, Project(root, profile, params), speakers, ensemble)
    if judge is None:
        return Chat(speakers, None, None)
    reward = judge if judge.stage == "reward" else lookup.input_of(judge, "reward")
    device = torch.device(device_kind(params.model.device))
    loaded = load_reward_model(judge.path, lookup.input_of(reward, "sft").path, device)
    return Chat(speakers, loaded, f"{judge.name} {judge.digest[:8]}")


def answers(chat: Chat, prompt: str, seed: int | None = None) -> list[Answer]:
    """Return every model's answer to a prompt, with its score.

    The most likely tokens; with a seed, a sample at temperature 1, as in training.
    """
    asked = [Message(role="user", content=prompt)]
    spoken = [_response(speaker, asked, seed) for speaker in chat.speakers]
    texts = [decode(speaker.language, said.tokens) for speaker, said in zip(chat.speakers, spoken, strict=True)]
    scores = _scores(chat.ensemble, asked, texts)
    return [
        {"model": speaker.name, "text": text, "finished": said.finished, "score": score}
        for speaker, text, said, score in zip(chat.speakers, texts, spoken, scores, strict=True)
    ]


def _speaker(lookup: Lookup, reference: str, usual: Model) -> Speaker:
    folder, artifact, model = Path(reference), None, usual
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        artifact = lookup.find(reference)
        if artifact.stage not in ANSWERS:
            raise ValueError(
                f"{reference!r} is made by stage {artifact.stage}, which answers nothing; name one of "
                f"{', '.join(ANSWERS)}"
            )
        folder = artifact.path
        model = Model.model_validate(artifact.manifest["document"]["params"]["model"])
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{reference}: neither an artifact's folder nor one of transformers (it has no config.json)")
    language = load_model(folder)
    language.network.to(device_kind(usual.device)).requires_grad_(False)
    return Speaker(reference, language, model.model_copy(update={"device": usual.device}), artifact)


def _ensemble(lookup: Lookup, project: Project, speakers: Sequence[Speaker], named: str | None) -> Artifact | None:
    if named:
        found = lookup.find(named)
        if found.stage not in {"ensemble", "reward"}:
            raise ValueError(f"--ensemble {named!r} is made by stage {found.stage}; name an ensemble or a reward model")
        return found
    for speaker in speakers:
        if speaker.artifact and "ensemble" in speaker.artifact.inputs:
            return lookup.input_of(speaker.artifact, "ensemble")
    return project.artifact("ensemble")


def _response(speaker: Speaker, asked: list[Message], seed: int | None) -> Response:
    language, model = speaker.language, speaker.model
    tokens = encode_prompt(language, asked, model)
    if seed is not None:
        [sampled] = sample_in_batches(language, [tokens], model, batch_size=1, seed=seed, label="sampling")
        return sampled
    entering, end = torch.tensor([tokens], device=language.device), language.tokenizer.eos_token_id
    output = language.network.generate(
        entering,
        attention_mask=torch.ones_like(entering),
        max_new_tokens=model.response_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    said: list[int] = output[0, len(tokens) :].tolist()
    return Response(said, finished=said[-1:] == [end], logprob=0.0)


def _scores(ensemble: RewardModel | None, asked: list[Message], texts: Sequence[str]) -> list[Score | None]:
    if ensemble is None:
        return [None for _ in texts]
    scores = ensemble.score([asked for _ in texts], texts)
    columns = zip(mean_reward(scores), worst_reward(scores), head_spread(scores), scores.mean, strict=True)
    return [
        {"mean": mean.item(), "worst": worst.item(), "spread": spread.item(), "heads": heads.tolist()}
        for mean, worst, spread, heads in columns
    ]
