"""What came out of a run, and from what, as Markdown for pages that draw it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.tracking import version_page
from rrlhf.tools.lineage.text import tree
from rrlhf.tools.pages import visible
from rrlhf.tools.reporting.evaluation import Evaluation, highest, in_figures, measured
from rrlhf.tools.reporting.report import METRICS, WIDE, reward_in_words

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&])")


def comparison(
    evaluation: Evaluation, sentences: Iterable[str], report: str, links: Mapping[str, str] | None = None
) -> str:
    """Return the comparison of policies: a table, mean ± standard error over prompts, and what it says.

    sentences: its conclusions. report: the path of the HTML report. links: a page of each policy. What a terminal shows
    comes first: a page shows five or six columns, and the rest when it is scrolled.
    """
    policies = evaluation["policies"]
    present = {metric for policy in policies for metric in policy["metrics"]}
    order = sorted(METRICS, key=lambda metric: metric not in WIDE)
    metrics = [*(metric for metric in order if metric in present), *sorted(present - set(METRICS))]
    known = {metric: measured(evaluation, metric) for metric in metrics}
    best = highest(known["gold"]) if known.get("gold") else None
    rows = []
    for policy in policies:
        name = policy["name"]
        figures = [in_figures(known[metric][name]) if name in known[metric] else "–" for metric in metrics]
        rows.append([f"★ {name}" if name == best else name, *figures, reward_in_words(policy)])
    shown = table(["policy", *metrics, "trained on"], rows)
    said = "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
    pages = ", ".join(f"[{escaped(name)}]({page})" for name, page in (links or {}).items())
    told = [shown, f"in MLflow: {pages}" if pages else "", said, f"report: {escaped(report)}"]
    return "\n\n".join(["mean ± standard error over prompts, ★ the highest gold", *filter(None, told)])


def ancestry(graph: Graph, product: Product, mlflow: str | None = None) -> str:
    """Return what a product was made from as a tree; mlflow: where its pages are, to which models are then linked."""
    models = [made for made in graph.up(product) if mlflow and "/" in "".join(made.names[:1])]
    links = [f"- [{escaped(made.title)}]({version_page(str(mlflow), made.names[0])})" for made in reversed(models)]
    return "\n".join([*links, "", fenced(tree(graph, product))])


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
