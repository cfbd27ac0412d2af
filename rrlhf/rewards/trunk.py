"""The trunk below reward heads: layers of a language model that turn a response into one feature vector.

Either the policy's own frozen layers, whose states come with every rollout, or a trunk of the reward model's own, with
its own tokenizer and chat template, which reads text. A reward model that people brought, a sequence classifier, is a
trunk of its own whose features are those that its score is a linear map of: the final state of the last token.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.config import Given, Model, TrunkTraining
from rrlhf.hardware import device_kind
from rrlhf.memo import sha256
from rrlhf.models.adapters import FOLDER as ADAPTERS
from rrlhf.models.adapters import load_adapters, lowest_adapted, save_adapters, with_each
from rrlhf.models.load import LanguageModel, load_base, load_model, save_model
from rrlhf.models.processes import autocast, in_parts
from rrlhf.models.rollout import response_features
from rrlhf.models.states import entering, final_states, states_at
from rrlhf.models.text import Texts
from rrlhf.models.whole import decoder_layers
from rrlhf.types import Message

FILE = "trunk.json"
FOLDER = "trunk"  # sub-folder of a reward model's folder with a trunk of its own


class Encoded(NamedTuple):
    """Tokens of a prompt with its response."""

    tokens: list[int]
    prompt_length: int


class Trunk(NamedTuple):
    """The layers below `layer`; with adapters inside (see adapters.py) it gives one feature vector per adapter."""

    language: LanguageModel
    layer: int
    model: Model  # token limits, system prompt, device and precision
    texts: Texts  # as its tokenizer and chat template make tokens of them, within its limits
    reads_end: bool = False  # features are the last token's final state, not the mean over the response at `layer`
    identity: str | None = None  # equal for trunks whose features are the same; None: the policy's own, or not stored

    def encode(self, prompt: list[Message], response: str) -> Encoded:
        """Return a prompt with its response as tokens.

        Where the last token is read, the end of the turn belongs to them, but no padding: transformers' sequence
        classifiers take a row's last token that is not the padding token, whatever stands behind it.
        """
        asked = self.texts.prompt(prompt)
        if not self.reads_end:
            return Encoded([*asked, *self.texts.response(response)], len(asked))
        tokens = self.texts.conversation(prompt, response)
        while tokens[-1] == self.language.padding:
            tokens.pop()
        return Encoded(tokens, min(len(asked), len(tokens)))

    def features(self, rows: Sequence[Encoded], batch_size: int, label: str = "") -> Tensor:
        """Return pooled features in the order of the rows, on the CPU: [rows, width], or [rows, adapters, width].

        Which rows run together changes nothing but rounding.
        """
        # The responses to one prompt side by side: it then runs once for all of them.
        order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt_length, rows[i].tokens))
        found: dict[int, Tensor] = {}
        for part in in_parts(len(order), batch_size, label):
            found |= zip(order[part], self._pooled([rows[i] for i in order[part]]).cpu(), strict=True)
        return torch.stack([found[i] for i in range(len(rows))])

    @torch.no_grad()
    def _pooled(self, rows: list[Encoded]) -> Tensor:
        first = lowest_adapted(self.language, self.layer)
        with autocast(self.model):
            entered = entering(self.language, [row.tokens for row in rows], first)
        return self.upper(entered, first, *lengths(rows, self.language.device))

    def upper(self, entered: Tensor, first: int, prompts: Tensor, texts: Tensor) -> Tensor:
        """Return pooled features of rows, of what `entering` gives for layer `first`."""

        def pooled() -> Tensor:
            if self.reads_end:
                return final_states(self.language, entered, prompts + texts, first).float()
            states = states_at(self.language, entered, prompts + texts, first, self.layer)
            return response_features(states, prompts, texts)

        with autocast(self.model):
            found = with_each(self.language, pooled)
        return found[0] if len(found) == 1 else torch.stack(found, dim=1)


def lengths(rows: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of each prompt and of each response, [rows] each."""
    prompts = torch.tensor([row.prompt_length for row in rows], device=device)
    return prompts, torch.tensor([len(row.tokens) for row in rows], device=device) - prompts


def start_trunk(settings: TrunkTraining, model: Model, sft: Path) -> Trunk:
    """Load the trunk that a reward model starts from: the SFT model's, or that of `reward.base`."""
    own = settings.language_model(model)
    language = load_model(sft, own) if settings.base is None else load_base(own, reward_model=True)
    if language.score is not None:
        return _given(language, own)
    language.network.to(device_kind(model.device)).requires_grad_(False)
    return Trunk(language, settings.layer, own, Texts(language, own))


def given_trunk(given: Given, model: Model) -> Trunk:
    """Load a reward model that people brought, for its own head."""
    own = given.language_model(model)
    return _given(load_base(own, reward_model=True), own)


def _given(language: LanguageModel, own: Model) -> Trunk:
    language.network.to(device_kind(own.device)).requires_grad_(False)
    return Trunk(language, language.layers, own, Texts(language, own), reads_end=True)


def save_trunk(trunk: Trunk, folder: Path, *, own: bool) -> None:
    """Write what is needed to load the trunk again; its own weights and tokenizer go to a sub-folder.

    Cuts an own trunk's language model to the layers in use, in place.
    """
    identity = None
    if own:
        trunk = trunk._replace(language=save_adapters(trunk.language, folder))
        save_model(cut(trunk), folder / FOLDER)
        weights = sorted(path for part in (ADAPTERS, FOLDER) for path in (folder / part).rglob("*.safetensors"))
        identity = "-".join(sha256(path)[:32] for path in weights)
        if trunk.reads_end:  # others of these weights may read more of a text
            identity += f"-{trunk.model.prompt_tokens}-{trunk.model.response_tokens}"
    described = {
        "layer": trunk.layer,
        "identity": identity,
        "model": trunk.model.model_dump() | {"base": FOLDER, "revision": None},
        **({"reads_end": True} if trunk.reads_end else {}),
    }
    (folder / FILE).write_text(json.dumps(described), encoding="utf-8")


def load_trunk(folder: Path, shared: Path | None, device: torch.device | None = None) -> Trunk:
    """Read what `save_trunk` wrote; `shared` is the language model's folder for a trunk that is not its own.

    Raises ValueError when that is missing.
    """
    described = json.loads((folder / FILE).read_text(encoding="utf-8"))
    own = (folder / FOLDER).is_dir()
    if not own and shared is None:
        raise ValueError(f"{folder} has no trunk of its own: give the folder of the SFT model that it was trained on")
    model = Model.model_validate(described["model"])
    language = load_model(folder / FOLDER if own else shared or folder, model)
    language = load_adapters(language, folder)
    language.network.to(device or device_kind(model.device)).requires_grad_(False)
    texts = Texts(language, model)
    return Trunk(language, int(described["layer"]), model, texts, "reads_end" in described, described.get("identity"))


def trunk_layer(folder: Path) -> int:
    """Return the layer whose entering states a reward model's heads expect."""
    return int(json.loads((folder / FILE).read_text(encoding="utf-8"))["layer"])


def identity_of(folder: Path) -> str | None:
    """Return what tells a reward model's trunk from others; None for the policy's own frozen layers."""
    found = json.loads((folder / FILE).read_text(encoding="utf-8")).get("identity")
    return str(found) if found else None


def link_trunk(source: Path, folder: Path) -> None:
    """Give a folder the trunk of another: the same files, linked where the file system can."""
    shutil.copy(source / FILE, folder)
    if (source / FOLDER).is_dir():
        shutil.copytree(source / FOLDER, folder / FOLDER, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def cut(trunk: Trunk) -> LanguageModel:
    """Drop all layers above the trunk, in place.

    The output matrix is never used: tied to the input embeddings, it is not stored.
    """
    network, layer = trunk.language.network, trunk.layer
    del decoder_layers(network)[layer:]
    config = network.config.get_text_config()
    config.num_hidden_layers = layer
    if config.__dict__.get("layer_types"):  # of some makes it follows from their number
        config.layer_types = config.layer_types[:layer]
    network.get_output_embeddings().weight = network.get_input_embeddings().weight
    network.config.tie_word_embeddings = True
    return trunk.language
