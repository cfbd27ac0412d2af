"""`rrlhf chat`: prompts from the command line, from stdin, or from a terminal, answered by models found by name.

They are found before torch is imported, for that takes seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict

import typer

from rrlhf import config
from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import MANIFEST, Artifact
from rrlhf.pipeline.stages import STAGES
from rrlhf.tools.command_line import AsJson, Model, Profile, Set, opened
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.types import Message

if TYPE_CHECKING:
    from rrlhf.models.load import LanguageModel

ANSWERS = [stage for stage, spec in STAGES.items() if spec.makes == "language model"]


class Named(NamedTuple):
    """A model that can answer, under the name that it was asked for by."""

    name: str
    folder: Path
    model: config.Model
    artifact: Artifact | None  # None: a plain transformers folder


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


def chat(
    model: Model,
    other: Annotated[str | None, typer.Argument(metavar="MODEL2", help="A second model, side by side.")] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Left out: stdin, or a loop on a terminal.")
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option(help="Whose scores to show; left out, the model's own or the profile's.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Sample at temperature 1; left out, the likeliest tokens.")
    ] = None,
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with one or two models side by side, with the scores of a reward ensemble.

    Every prompt stands alone: the models remember nothing. Scores are normalised: 0 is an average response of the SFT
    model.

    Example: rrlhf chat rrlhf-policy@candidate rrlhf-sft@latest -p "Write one cheerful sentence about bridges."

    Example: echo "Write about rain." | rrlhf chat rrlhf-policy@champion --json
    """
    lookup, asked = opened(profile, set_), prompts(prompt)
    models, judge, trunk = find_models(lookup, [model, *([other] if other else [])], ensemble)
    conversation = Chat(models, judge.path if judge else None, trunk, lookup.params.model.device)
    scored_by = f"{judge.name} {judge.digest[:8]}" if judge else None
    for text in asked:
        found = conversation.answers(text, seed)
        if as_json:
            print(json.dumps({"prompt": text, "ensemble": scored_by, "answers": found}), flush=True)
        else:
            _show(found, scored_by)


def prompts(given: str | None) -> Iterator[str]:
    """Return the prompt that was given, all of stdin as one, or, on a terminal, one line after another until Ctrl-D.

    Raises UsageError at once when there is none.
    """
    if given is None and sys.stdin.isatty():
        return _typed()
    text = sys.stdin.read() if given is None else given
    if not text.strip():
        raise UsageError("the prompt is empty: give one with --prompt, or on stdin")
    return iter([text.strip()])


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            if text := input("› ").strip():
                yield text
    print()


def find_models(
    lookup: Lookup, models: Sequence[str], ensemble: str | None
) -> tuple[list[Named], Artifact | None, Path | None]:
    """Return the models, the ensemble that judges them (named, the first model's own, or the profile's), and its trunk.

    models: registered versions, aliases, digests, or folders of an artifact or of transformers. Raises UsageError that
    says what to do, and TamperedError when a stored file was changed.
    """
    found = [_model(lookup, reference) for reference in models]
    own = (each.artifact for each in found if each.artifact and "ensemble" in each.artifact.inputs)
    policy = None if ensemble else next(own, None)
    judge = lookup.input_of(policy, "ensemble") if policy else lookup.reward_model(ensemble)
    if judge is None:
        return found, None, None
    reward = lookup.input_of(judge, "reward") if judge.stage == "ensemble" else judge
    sft = lookup.input_of(reward, "sft").path if "sft" in reward.inputs else None
    return found, judge, sft  # the SFT model, whose layers its heads may read


def _model(lookup: Lookup, reference: str) -> Named:
    folder, usual = Path(reference), lookup.params.model
    if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        return Named(reference, folder, usual, None)
    artifact = lookup.find(reference)
    if artifact.stage not in ANSWERS:
        raise UsageError(
            f"{reference!r} is made by stage {artifact.stage}, which answers nothing; name one of {', '.join(ANSWERS)}"
        )
    own = config.Model.model_validate(artifact.manifest["document"]["params"]["model"])
    return Named(reference, artifact.path, own.model_copy(update={"device": usual.device}), artifact)


class Chat:
    """The models of one conversation, and the reward model that judges them."""

    def __init__(self, models: Sequence[Named], judge: Path | None, trunk: Path | None, device: str) -> None:
        import torch

        from rrlhf.hardware import device_kind
        from rrlhf.models.load import load_model
        from rrlhf.rewards.scoring import load_reward_model

        kind = torch.device(device_kind(device))
        self.speakers = [(each, load_model(each.folder, each.model)) for each in models]
        for _, language in self.speakers:
            language.network.to(kind).requires_grad_(False)
        self.ensemble = load_reward_model(judge, trunk, kind) if judge else None

    def answers(self, prompt: str, seed: int | None = None) -> list[Answer]:
        """Return every model's answer to a prompt, with its score.

        The most likely tokens; with a seed, a sample at temperature 1, as in training.
        """
        asked = [Message(role="user", content=prompt)]
        return [self._answer(named, language, asked, seed) for named, language in self.speakers]

    def _answer(self, named: Named, language: LanguageModel, asked: list[Message], seed: int | None) -> Answer:
        from rrlhf.models.rollout import most_likely, sample_in_batches
        from rrlhf.models.text import Texts, decode

        texts = Texts(language, named.model)
        tokens = texts.prompt(asked)
        texts.told(named.name)
        if seed is None:
            said = most_likely(language, tokens, named.model.response_tokens)
            finished = said[-1] in language.ends
        else:
            [sampled] = sample_in_batches(language, [tokens], named.model, batch_size=1, seed=seed, label="sampling")
            said, finished = sampled.tokens, sampled.finished
        text = decode(language, said)
        return {"model": named.name, "text": text, "finished": finished, "score": self._score(asked, text)}

    def _score(self, asked: list[Message], text: str) -> Score | None:
        from rrlhf.robust import head_spread, mean_reward, worst_reward

        if self.ensemble is None:
            return None
        scores = self.ensemble.score([asked], [text])
        return {
            "mean": mean_reward(scores).item(),
            "worst": worst_reward(scores).item(),
            "spread": head_spread(scores).item(),
            "heads": scores.mean[0].tolist(),
        }


def _show(found: Sequence[Answer], judge: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rrlhf.redact import visible

    shown = Table(show_lines=True, expand=True)
    for answer in found:
        shown.add_column(Text(answer["model"]), ratio=1, overflow="fold")
    shown.add_row(*(Text(visible(each["text"]) + ("" if each["finished"] else " …")) for each in found))
    if judge:
        shown.add_row(*(Text(in_words(each)) for each in found))
        shown.caption = f"scores: {judge}"
    Console().print(shown)


def in_words(answer: Answer) -> str:
    """Say what the ensemble thinks of an answer."""
    score = answer["score"]
    if score is None:
        return ""
    heads = " ".join(f"{head:z.2f}" for head in score["heads"])
    return f"mean {score['mean']:z.2f}  worst {score['worst']:z.2f}  spread {score['spread']:.2f}\nheads {heads}"
