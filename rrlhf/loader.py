"""How `mlflow.pyfunc.load_model` loads a registered policy; MLflow finds this module by its name in MLmodel."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rrlhf.config import Model
from rrlhf.pipeline.artifacts import MANIFEST
from rrlhf.types import Message


class Policy:
    """A policy that answers prompts with its most likely tokens, in the format and length it was trained with."""

    def __init__(self, folder: Path) -> None:
        from rrlhf.models.load import load_model

        document = json.loads((folder / MANIFEST).read_bytes())["document"]
        self._model = Model.model_validate(document["params"]["model"])
        self._language = load_model(folder, self._model)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return a response to each prompt of a list or of a table's first column; `params` may set response_tokens."""
        prompts: Iterable[str] = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        response_tokens = (params or {}).get("response_tokens", self._model.response_tokens)
        return [self._response(prompt, response_tokens) for prompt in prompts]

    def _response(self, prompt: str, response_tokens: int) -> str:
        from rrlhf.models.rollout import most_likely
        from rrlhf.models.text import Texts, decode

        tokens = Texts(self._language, self._model).prompt([Message(role="user", content=prompt)])
        return decode(self._language, most_likely(self._language, tokens, response_tokens))


def _load_pyfunc(path: str) -> Policy:
    return Policy(Path(path))
