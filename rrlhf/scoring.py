"""Reward models as functions of text: prompts and responses in, normalised scores out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rrlhf.config import Model
from rrlhf.features import trunk_layer
from rrlhf.hardware import device_kind
from rrlhf.heads import RewardHeads
from rrlhf.models import LanguageModel, autocast, encode_prompt, encode_text, load_model
from rrlhf.progress import track
from rrlhf.robust import Scores
from rrlhf.rollout import hidden_states, response_features
from rrlhf.types import Message

Scorer = Callable[[list[list[Message]], list[str]], Scores]


def shared_trunk_scorer(sft: Path, reward: Path, model: Model, batch_size: int) -> Scorer:
    """Return the scorer of heads that read the SFT model's trunk: scores [responses, heads] on the CPU.

    A response's scores do not depend on the others, their order or the batch size (in bfloat16 up to its rounding).
    Prompts and responses are cut to the model's lengths, as in training.
    """
    language, heads, layer = load_model(sft), RewardHeads.load(reward), trunk_layer(reward)
    language.network.to(device_kind(model.device)).requires_grad_(False)
    heads.to(language.device)

    @torch.no_grad()
    def scores(prompts: list[list[Message]], responses: list[str]) -> Scores:
        asked = [(json.dumps(prompt), text) for prompt, text in zip(prompts, responses, strict=True)]
        encoded = {
            name: _encoded(language, prompt, name[1], model) for name, prompt in zip(asked, prompts, strict=True)
        }
        names = sorted(encoded, key=lambda name: sum(map(len, encoded[name])))
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        means: dict[tuple[str, str], Tensor] = {}
        stds: dict[tuple[str, str], Tensor] = {}
        for batch in track(batches, len(batches), "scoring"):
            sequences = [prompt + answer for prompt, answer in (encoded[name] for name in batch)]
            lengths = torch.tensor([[len(part) for part in encoded[name]] for name in batch], device=language.device)
            with autocast(model):
                states = hidden_states(language, sequences, layer)
            found = heads.score(response_features(states, lengths[:, 0], lengths[:, 1]))
            means |= zip(batch, found.mean.cpu(), strict=True)
            stds |= zip(batch, found.std.cpu(), strict=True)
        return Scores(torch.stack([means[name] for name in asked]), torch.stack([stds[name] for name in asked]))

    return scores


def log_odds_scale(reward: Path) -> Tensor:
    """Return how much log-odds one normalised unit of each head is worth, [heads]."""
    scale: Tensor = RewardHeads.load(reward).score_std
    return scale


def share_cut(sft: Path, texts: Sequence[str], model: Model) -> float:
    """Return the share of responses that are longer than the reward model reads."""
    from transformers import AutoTokenizer

    language = LanguageModel(None, AutoTokenizer.from_pretrained(sft, local_files_only=True))
    return sum(len(encode_text(language, text)) > model.response_tokens for text in texts) / len(texts)


def _encoded(
    language: LanguageModel, prompt: list[Message], response: str, model: Model
) -> tuple[list[int], list[int]]:
    return encode_prompt(language, prompt, model), encode_text(language, response)[: model.response_tokens]
