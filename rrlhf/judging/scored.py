"""A judge that is a reward model which the user has: a sequence classifier with one label scores every answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rrlhf.config import Model, RewardJudge
from rrlhf.hardware import device_kind, dtype_name
from rrlhf.judging.evaluation import OwnJudge
from rrlhf.located import ParamsError
from rrlhf.models.load import check_files, pin_date
from rrlhf.models.sources import base_location
from rrlhf.progress import track
from rrlhf.stopping import check_stop
from rrlhf.types import Message


class Scorer:
    """The classifier with its own tokenizer and chat template; it reads one answer at a time, so nothing is padded."""

    def __init__(self, settings: RewardJudge, model: Model) -> None:
        place, options = check_classifier(settings)
        self._settings, device = settings, device_kind(model.device)
        dtype = getattr(torch, dtype_name(model.dtype, device))
        network: Any = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=dtype, use_safetensors=True, **options
        )
        self._network: Any = network.eval().to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
        prints_date = self._tokenizer.chat_template and "strftime_now(" in self._tokenizer.get_chat_template()
        if prints_date and (wrong := pin_date(self._tokenizer, date.fromisoformat(model.date))):
            raise ParamsError(f"evaluate.judge.base {settings.base}: {wrong[0]}")
        self._known: dict[tuple[str, str], float] = {}  # scores of prompts, as JSON, with responses

    def told(self) -> OwnJudge:
        """Return what it is."""
        return OwnJudge(self._settings.base)

    def wins(self, prompts: Sequence[list[Message]], ours: list[str], theirs: list[str], label: str) -> Tensor:
        """Return for each prompt 1 where our answer scores higher, 0 where theirs does, 1/2 for a tie."""
        margins = self.score(prompts, ours, label) - self.score(prompts, theirs, label)
        return margins.sign() / 2 + 0.5

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], label: str) -> Tensor:
        """Return the score of each response, [responses] float64."""
        rows = [(json.dumps(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]
        new = [*dict.fromkeys(row for row in rows if row not in self._known)]
        for prompt, response in track(new, len(new), label):
            self._known[prompt, response] = self._read(json.loads(prompt), response)
            check_stop()
        return torch.tensor([self._known[row] for row in rows], dtype=torch.float64)

    @torch.no_grad()
    def _read(self, prompt: list[Message], response: str) -> float:
        if self._tokenizer.chat_template:
            turns = [*prompt, Message(role="assistant", content=response)]
            read = self._tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
        else:
            asked = "\n\n".join(turn["content"] for turn in prompt)
            read = self._tokenizer(asked, response, truncation=True, return_tensors="pt")
        return float(self._network(**read.to(self._network.device)).logits.item())


def check_classifier(settings: RewardJudge) -> tuple[Path | str, dict[str, Any]]:
    """Return where the classifier is and how it is fetched. Raises ParamsError when it is none with one label."""
    place = base_location(settings, "evaluate.judge")
    options: dict[str, Any] = {"local_files_only": True} if isinstance(place, Path) else {"revision": settings.revision}
    options["trust_remote_code"] = False
    try:
        if isinstance(place, Path):
            check_files(place)
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ParamsError(f"evaluate.judge.base {settings.base}: {str(error).splitlines()[0]}") from None
    kinds = config.architectures or []
    if config.num_labels != 1 or not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ParamsError(
            f"evaluate.judge.base {settings.base}: a judge that scores is a sequence classifier with one label, and "
            f"config.json has {', '.join(kinds) or 'no architecture'} with num_labels {config.num_labels}"
        )
    return place, options
