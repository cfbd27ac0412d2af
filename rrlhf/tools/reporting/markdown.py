"""What came out of a run, and from what, as Markdown for pages that draw it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rrlhf.judging.evaluation import Evaluation
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.tracking import version_page
from rrlhf.tools.lineage.text import tree
from rrlhf.tools.reporting.comparison import wide_table
from rrlhf.tools.reporting.tables import escaped, fenced, markdown


def comparison(
    evaluation: Evaluation, sentences: Iterable[str], report: str, links: Mapping[str, str] | None = None
) -> str:
    """Return the comparison of policies and what it says.

    sentences: its conclusions. report: the path of the HTML report. links: a page of each policy.
    """
    pages = ", ".join(f"[{escaped(name)}]({page})" for name, page in (links or {}).items())
    said = "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
    told = [markdown(wide_table(evaluation)), f"in MLflow: {pages}" if pages else "", said]
    return "\n\n".join(filter(None, [*told, f"report: {escaped(report)}"]))


def ancestry(graph: Graph, product: Product, mlflow: str | None = None) -> str:
    """Return what a product was made from as a tree; mlflow: where its pages are, to which models are then linked."""
    models = [made for made in graph.up(product) if mlflow and "/" in "".join(made.names[:1])]
    links = [f"- [{escaped(made.title)}]({version_page(str(mlflow), made.names[0])})" for made in reversed(models)]
    return "\n".join([*links, "", fenced(tree(graph, product))])
