"""What came out of a run, and from what, as Markdown for pages that draw it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rrlhf.lineage.graph import Graph, Product
from rrlhf.lineage.text import mermaid, tree
from rrlhf.reporting.evaluation import Evaluation, highest, in_figures, measured
from rrlhf.reporting.report import METRICS, reward_in_words, visible

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&])")


def comparison(evaluation: Evaluation, sentences: Iterable[str], report: str) -> str:
    """Return the comparison of policies: a table, mean ± standard error over prompts, and what it says.

    sentences: its conclusions. report: the path of the HTML report.
    """
    policies = evaluation["policies"]
    present = {metric for policy in policies for metric in policy["metrics"]}
    metrics = [*(metric for metric in METRICS if metric in present), *sorted(present - set(METRICS))]
    known = {metric: measured(evaluation, metric) for metric in metrics}
    best = highest(known["gold"]) if known.get("gold") else None
    rows = []
    for policy in policies:
        name = policy["name"]
        figures = [in_figures(known[metric][name]) if name in known[metric] else "–" for metric in metrics]
        rows.append([f"★ {name}" if name == best else name, reward_in_words(policy), *figures])
    shown = table(["policy", "trained on", *metrics], rows)
    said = "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
    return f"mean ± standard error over prompts, ★ the highest gold\n\n{shown}\n\n{said}\n\nreport: {escaped(report)}"


def ancestry(graph: Graph, product: Product) -> str:
    """Return what a product was made from: a tree to read, and a Mermaid flowchart to draw."""
    return f"{fenced(tree(graph, product))}\n\n{fenced(mermaid(graph, product), 'mermaid')}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are figures."""
    first, *others = ([escaped(cell) for cell in row] for row in [header, *rows])
    lines = [first, ["---", *["---:"] * (len(header) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return a text of one line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))


def fenced(text: str, language: str = "") -> str:
    """Return a block of code, whatever is in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"
