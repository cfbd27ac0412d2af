"""What a person reads about one reward model: tables for the terminal, and a page that needs no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rrlhf import files
from rrlhf.judging.content import Calibration, Heads, Share
from rrlhf.tools.judging import plots as reward_plots
from rrlhf.tools.judging.judge import RewardReport
from rrlhf.tools.pages import page, visible
from rrlhf.tools.reporting.evaluation import in_figures
from rrlhf.tools.reporting.report import known
from rrlhf.types import Json


def tables(report: RewardReport) -> Iterator[Table]:
    """Yield the tables for the terminal: the ranking, its honesty, the heads, subsets, and perturbed texts."""
    answer = report["answer"]
    judgement = answer["judgement"]
    title = f"{report['model']} on {report['data']}: {judgement['pairs']} pairs of {judgement['prompts']} prompts"
    shown = _table(title, "", "value", "95 %", "what it means")
    meaning = "chosen response scores higher; a coin: 0.50"
    for reading, accuracy in judgement["accuracy"].items():
        name = "accuracy" if len(judgement["accuracy"]) == 1 else f"accuracy, {reading}"
        shown.add_row(name, in_figures(accuracy), _interval(accuracy), meaning)
        meaning = ""
    for row in _calibration_rows(judgement["calibration"]):
        shown.add_row(row[0], row[1], "", row[2])
    if "heads" in judgement:
        for row in _head_rows(judgement["heads"]):
            shown.add_row(row[0], row[1], "", row[2])
    yield shown
    if "subsets" in answer:
        found = answer["subsets"]
        parts = _table("by subset", "", "accuracy", "95 %", "prompts")
        for name, part in found["subsets"].items():
            parts.add_row(Text(visible(name)), in_figures(part), _interval(part), str(part["n"]))
        parts.add_section()
        parts.add_row("mean of subsets (macro)", in_figures(found["macro"]), "", "")
        parts.add_row("all prompts (micro)", in_figures(found["micro"]), _interval(found["micro"]), "")
        yield parts
    if "robustness" in answer:
        rows = _table("with perturbed texts", "", "P(chosen wins)", "95 %", "order turned", "shift of the score")
        for kind in answer["robustness"]:
            name = kind["kind"].replace("_", " ") + ("" if kind["keeps_meaning"] else " *")
            cells = (in_figures(kind["wins"]), _interval(kind["wins"]), in_figures(kind["turned"]))
            rows.add_row(name, *cells, in_figures(kind["shift"]))
        rows.caption = "* may change the meaning"
        yield rows


def notes(report: RewardReport) -> Iterator[str]:
    """Yield what a reader should know before trusting the numbers."""
    answer = report["answer"]
    if answer.get("left_out"):
        yield f"{answer['left_out']} bad rows of the file were left out."
    if answer.get("cut"):
        yield f"{answer['cut']:.0%} of the responses are longer than the model reads, and were cut as in training."
    if "questions" in answer:
        yield (
            f"{answer['questions']} questions, some with several responses: by subset, a question counts as right when "
            "each chosen response scores above each rejected one; elsewhere every pair of them counts. RewardBench 2's "
            "own score of its subset Ties weighs margins as well."
        )
    if answer["judgement"]["prompts"] < 30:
        yield "Fewer than 30 prompts: the intervals are rough."


def show(report: RewardReport, file: Path) -> None:
    """Print the tables and notes, and where the page lies."""
    console = Console()
    for table in tables(report):
        console.print(table)
    for note in notes(report):
        console.print(note, highlight=False, markup=False)
    console.print(f"\nreport: {file}", highlight=False, markup=False, soft_wrap=True)


def write(report: RewardReport, folder: Path) -> tuple[Path, Path]:
    """Write the report as JSON and as one HTML file into a folder, and return both paths."""
    data = Path(report["data"])
    about = data.name.split(".")[0].strip("*?[]") or data.parent.name
    stem = re.sub(r"[^\w-]+", "-", f"{report['model']}-{about}").strip("-")
    texts = {
        folder / f"{stem}.json": json.dumps(strict(report), indent=1, ensure_ascii=False),
        folder / f"{stem}.html": render(report),
    }
    for path, text in texts.items():
        files.write(path, text)
    html, as_json = sorted(texts)
    return as_json, html


def render(report: RewardReport) -> str:
    """Return the report as one HTML file."""
    return page(
        "reward.html.j2",
        report=report,
        evaluation={"reward_models": [report["answer"]["judgement"]]},
        reward_charts=reward_plots.charts([report["answer"]["judgement"]]),
        notes=list(notes(report)),
        measured=in_figures,
        known=known,
        looks={},
    )


def strict(value: object) -> Json:
    """Return a value as JSON that every reader takes: what is not a finite number is null."""
    if isinstance(value, dict):
        return {str(name): strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value  # type: ignore[return-value]


def _calibration_rows(found: Calibration) -> Iterator[tuple[str, str, str]]:
    yield "ECE", known(found["ece"]), "mean gap of confidence and accuracy; honest: 0"
    yield "MCE", known(found["mce"]), "largest such gap"
    yield "Brier score", known(found["brier"]), "error of P(chosen wins); a coin: 0.250"
    yield "likelihood loss", known(found["nll"]), "nats; a coin: 0.693"
    yield "temperature", known(found["temperature"], 2), "divides the log-odds; above 1: too sure"


def _head_rows(heads: Heads) -> Iterator[tuple[str, str, str]]:
    each = ", ".join(known(head["mean"], 2) for head in heads["accuracy"])
    yield "accuracy of each head", each, "of its mean"
    yield "spread of the heads", in_figures(heads["spread"]), "standard deviation between them"
    yield "stated σ", known(heads["sigma"], 2), "mean over heads and responses"
    meaning = "of the other heads' margins; less: too sure"
    for row in heads["coverage"]:
        yield f"coverage of {row['level']:.0%}", in_figures(row["share"]), meaning
        meaning = ""
    yield "spread warns", known(heads["spread_warns"], 2), "rank correlation with wrong orders"
    yield "σ warns", known(heads["sigma_warns"], 2), "the same of the stated σ"


def _interval(share: Share) -> str:
    return f"{share['low']:.2f} to {share['high']:.2f}"


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=Text(visible(title)), title_justify="left", caption_justify="left")
    for column in columns:
        left = column in {"", "what it means"}
        shown.add_column(column, justify="left" if left else "right", no_wrap=column in {"", "95 %"})
    return shown
