"""What a person reads about one reward model: tables for the terminal, and a page that needs no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from rrlhf import files
from rrlhf.tools.judging.judge import Answer, RewardReport
from rrlhf.tools.pages import page
from rrlhf.tools.reporting.rewards import charts, interval, tables
from rrlhf.tools.reporting.tables import Table, figures, show

PERTURBED = (
    "Both responses of a pair are changed a little, each on its own, many times. P(chosen wins): how often the better "
    "one still scores higher. Order turned: how often the order differs from that of the texts as they are. Shift: of "
    "the score, in normalised units; away from 0 the reward pays for the change itself. * may change the meaning."
)


def notes(answer: Answer) -> Iterator[str]:
    """Yield what a reader should know before trusting the numbers."""
    if answer.left_out:
        yield f"{answer.left_out} bad rows of the file were left out."
    if answer.cut:
        yield f"{answer.cut:.0%} of the responses are longer than the model reads, and were cut as in training."
    if answer.questions:
        yield (
            f"{answer.questions} questions, some with several responses: by subset, a question counts as right when "
            "each chosen response scores above each rejected one; elsewhere every pair of them counts. RewardBench 2's "
            "own score of its subset Ties weighs margins as well."
        )
    if answer.judgement.prompts < 30:
        yield "Fewer than 30 prompts: the intervals are rough."


def show_report(report: RewardReport, file: Path) -> None:
    """Print the tables and notes, and where the page lies."""
    console = Console()
    console.print(_title(report), highlight=False, markup=False)
    for table in _all_tables(report.answer):
        show(table, console)
    for note in notes(report.answer):
        console.print(note, highlight=False, markup=False)
    console.print(f"\nreport: {file}", highlight=False, markup=False, soft_wrap=True)


def write(report: RewardReport, folder: Path) -> Path:
    """Write the report as JSON and as one HTML file into a folder, and return the path of the second."""
    data = Path(report.data)
    about = data.name.split(".")[0].strip("*?[]") or data.parent.name
    html = folder / (re.sub(r"[^\w-]+", "-", f"{report.model}-{about}").strip("-") + ".html")
    files.write(html.with_suffix(".json"), content(report))
    files.write(html, render(report))
    return html


def render(report: RewardReport) -> str:
    """Return the report as one HTML file."""
    return page(
        "reward.html.j2",
        report=report,
        title=_title(report),
        tables=_all_tables(report.answer),
        charts=charts([report.answer.judgement]),
        notes=list(notes(report.answer)),
        looks={},
    )


def content(report: RewardReport) -> str:
    """Return the report as JSON that every reader takes: what is not a finite number is null."""
    return TypeAdapter(RewardReport).dump_json(report, indent=1, exclude_defaults=True).decode()


def _title(report: RewardReport) -> str:
    judgement = report.answer.judgement
    return f"{report.model} on {report.data}: {judgement.pairs} pairs of {judgement.prompts} prompts"


def _all_tables(answer: Answer) -> list[Table]:
    """Return those of the judgement, and by subset and kind of perturbation where these were asked for."""
    found = [*tables([answer.judgement])]
    if answer.subsets:
        lines = [[name, figures(part), interval(part), str(part.n)] for name, part in answer.subsets.subsets.items()]
        lines.append(["mean of subsets (macro)", figures(answer.subsets.macro), "", ""])
        lines.append(["all prompts (micro)", figures(answer.subsets.micro), interval(answer.subsets.micro), ""])
        found.append(Table("By subset", ["", "accuracy", "95 %", "prompts"], lines))
    if answer.robustness:
        lines = [
            [
                kind.kind.replace("_", " ") + ("" if kind.keeps_meaning else " *"),
                figures(kind.wins),
                interval(kind.wins),
                figures(kind.turned),
                figures(kind.shift),
            ]
            for kind in answer.robustness
        ]
        header = ["", "P(chosen wins)", "95 %", "order turned", "shift of the score"]
        found.append(Table("With perturbed texts", header, lines, PERTURBED))
    return found
