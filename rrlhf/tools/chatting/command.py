"""`rrlhf chat`: prompts from the command line, from stdin, or from a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.located import UsageError
from rrlhf.tools.command_line import AsJson, Profile, Set, overrides

if TYPE_CHECKING:
    from rrlhf.tools.chatting.chat import Answer


def chat(
    model: Annotated[
        str, typer.Argument(help="rrlhf-policy@candidate, rrlhf-policy/3, the start of a digest, or a folder.")
    ],
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
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.chatting.named import find_models

    params = load_params(Path.cwd(), profile, overrides(profile, set_))
    asked = prompts(prompt)
    models, judge = find_models(Path.cwd(), profile, params, [model, *([other] if other else [])], ensemble)
    from rrlhf.tools.chatting.chat import Chat

    conversation = Chat(models, judge, params.model.device)
    scored_by = f"{judge.artifact.name} {judge.artifact.digest[:8]}" if judge else None
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


def _show(found: Sequence[Answer], judge: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rrlhf.tools.pages import visible

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
