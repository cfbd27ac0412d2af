"""What a run shows in Prefect's pages: its plan, how far it is, what came out, and what that was made from."""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from textwrap import indent
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

from rrlhf.judging.evaluation import Evaluation
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.plan import Planned, computing, total
from rrlhf.pipeline.tracking.server import version_page
from rrlhf.progress import in_words
from rrlhf.redact import visible
from rrlhf.tools.lineage.text import tree
from rrlhf.tools.reporting.comparison import table
from rrlhf.tools.reporting.tables import escaped, markdown


class Pages:
    """The artifacts of one flow run; under one key Prefect shows those of all runs of a profile.

    They only tell: when the server does not take one, a warning says so once, and the run goes on without the rest.
    """

    def __init__(self, profile: str) -> None:
        self._profile = re.sub("[^a-z0-9]+", "-", profile.lower()).strip("-")
        self._planned: Sequence[Planned] = ()
        self._progress: UUID | None = None
        self._away = False

    def plan(self, planned: Sequence[Planned]) -> None:
        """Show what will run, and why; `advance` then tells how far that is."""
        self._planned = planned
        expected = total(planned) or "Nothing is to be done."
        self._tell(lambda: create_table_artifact(plan_rows(planned), self._key("plan"), expected))
        self._progress = self._tell(
            lambda: create_progress_artifact(
                percent_done(planned, ()), self._key("progress"), "Done, of the stages that compute."
            )
        )

    def advance(self, done: Collection[str]) -> None:
        """Show that these nodes are done."""
        if progress := self._progress:
            self._tell(lambda: update_progress_artifact(progress, percent_done(self._planned, done)))

    def comparison(
        self, evaluation: Evaluation, conclusions: Sequence[str], report: str, links: Mapping[str, str]
    ) -> None:
        """Show the comparison of policies; links: the page of each in MLflow, where it is known."""
        shown = comparison(evaluation, conclusions, report, links)
        self._tell(lambda: create_markdown_artifact(shown, self._key("comparison")))

    def lineage(self, graph: Graph, product: Product, mlflow: str | None) -> None:
        """Show what a product was made from; mlflow: where its pages are, if they are known."""
        shown = ancestry(graph, product, mlflow)
        self._tell(lambda: create_markdown_artifact(shown, self._key("lineage"), product.title))

    def report(self, address: str, name: str) -> None:
        """Link to the report."""
        told = "The comparison with its charts and samples."
        self._tell(lambda: create_link_artifact(address, name, self._key("report"), told))

    def sweep(self, table: str, files: Sequence[str]) -> None:
        """Show a sweep's table, and say which files were written."""
        shown = f"{table}\n\nfiles: {escaped(', '.join(files))}"
        self._tell(lambda: create_markdown_artifact(shown, self._key("sweep")))

    def _key(self, kind: str) -> str:
        return f"{kind}-{self._profile}"

    def _tell(self, create: Callable[[], Any]) -> UUID | None:
        """Return the id of what the server took; None when it did not, now or before."""
        if self._away:
            return None
        try:
            made: UUID = create()
        except (HTTPError, PrefectException) as error:
            self._away = True
            reason = str(error).partition("\n")[0] or type(error).__name__
            print(f"Prefect's server takes no artifacts; the run goes on without ({reason})", file=sys.stderr)
            return None
        return made


def plan_rows(planned: Sequence[Planned]) -> list[dict[str, str]]:
    """Return a plan as the rows of a table."""
    return [
        {
            "node": visible(one.node),
            "action": one.action,
            "first reason": visible(one.reasons[0]) if one.reasons else "",
            "expected time": in_words(one.seconds) if one.seconds is not None else "",
        }
        for one in planned
    ]


def percent_done(planned: Sequence[Planned], done: Collection[str]) -> float:
    """Return how much of a plan's computing is done, 0 to 100."""
    work = computing(planned)
    return 100 * sum(one.node in done for one in work) / len(work) if work else 100.0


def comparison(evaluation: Evaluation, sentences: Iterable[str], report: str, links: Mapping[str, str]) -> str:
    """Return the comparison of policies as Markdown, their pages in MLflow, and what it says."""
    pages = ", ".join(f"[{escaped(name)}]({page})" for name, page in links.items())
    said = "\n".join(f"- {escaped(sentence)}" for sentence in sentences)
    told = [markdown(table(evaluation)), f"in MLflow: {pages}" if pages else "", said]
    return "\n\n".join(filter(None, [*told, f"report: {escaped(report)}"]))


def ancestry(graph: Graph, product: Product, mlflow: str | None) -> str:
    """Return what a product was made from as a tree in Markdown, with links to the models' pages in MLflow."""
    models = [made for made in graph.up(product) if mlflow and "/" in "".join(made.names[:1])]
    links = [f"- [{escaped(made.title)}]({version_page(str(mlflow), made.names[0])})" for made in reversed(models)]
    return "\n".join([indent(visible(tree(graph, product)), "    "), "", *links])  # four spaces: shown as it is
