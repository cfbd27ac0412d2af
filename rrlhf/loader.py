"""How `mlflow.pyfunc.load_model` loads a registered policy; MLflow finds this module by its name in MLmodel."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rrlhf.config import Model
from rrlhf.store.artifacts import MANIFEST
from rrlhf.types import Message


class Policy:
    """A policy that answers prompts with its most likely tokens, in the format and length it was trained with."""

    def __init__(self, folder: Path) -> None:
        from rrlhf.language_models.models import load_model

        document = json.loads((folder / MANIFEST).read_bytes())["document"]
        self._model = Model.model_validate(document["params"]["model"])
        self._language = load_model(folder)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return a response to each prompt of a list or of a table's first column; `params` may set response_tokens."""
        prompts: Iterable[str] = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        response_tokens = (params or {}).get("response_tokens", self._model.response_tokens)
        return [self._response(prompt, response_tokens) for prompt in prompts]

    def _response(self, prompt: str, response_tokens: int) -> str:
        import torch

        from rrlhf.language_models.models import decode, encode_prompt

        language = self._language
        tokens = encode_prompt(language, [Message(role="user", content=prompt)], self._model)
        entering = torch.tensor([tokens])
        output = language.network.generate(
            entering,
            attention_mask=torch.ones_like(entering),
            max_new_tokens=response_tokens,
            do_sample=False,
            eos_token_id=language.tokenizer.eos_token_id,
            pad_token_id=language.tokenizer.eos_token_id,
        )
        return decode(language, output[0, len(tokens) :].tolist())


def _load_pyfunc(path: str) -> Policy:
    return Policy(Path(path))
