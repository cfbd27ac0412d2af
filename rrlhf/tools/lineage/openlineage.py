"""The graph as OpenLineage events (specification 2-0-2), which catalogues such as Marquez and DataHub read.

Every stage is a job, every making of a result a run with a START and a COMPLETE event, every data set, model and
evaluation a dataset in OpenLineage's sense, with the digest of its content as its version.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import version
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import canonical

SPECIFICATION = "https://openlineage.io/spec"
CORE = f"{SPECIFICATION}/2-0-2/OpenLineage.json#/$defs"
NAMESPACE = "rrlhf"

Object = dict[str, Any]  # as JSON


def events(graph: Graph, products: Iterable[Product]) -> Iterator[Object]:
    """Yield the events of all stages that made these products, in the order in which they come."""
    for product in products:
        if product.stage:
            yield from _run(graph, product)


def as_lines(found: Iterable[Object]) -> str:
    """Return events as JSON, one a line, as OpenLineage's file transport writes them."""
    return "\n".join(json.dumps(event, ensure_ascii=False) for event in found)


def _run(graph: Graph, product: Product) -> Iterator[Object]:
    ended = _ended(graph, product)
    started = ended - timedelta(seconds=product.seconds)
    event: Object = {
        "producer": _producer(product),
        "schemaURL": f"{CORE}/RunEvent",
        "run": {
            "runId": str(uuid5(NAMESPACE_URL, f"urn:rrlhf:{product.digest}:{product.key}")),
            "facets": _run_facets(product, started, ended),
        },
        "job": {
            "namespace": NAMESPACE,
            "name": product.node,
            "facets": {
                "jobType": _facet(
                    product, "2-0-4", "JobTypeJobFacet", processingType="BATCH", integration="RRLHF", jobType="STAGE"
                )
            },
        },
        "inputs": [_dataset(link.source) for link in graph.sources(product)],
    }
    yield {"eventType": "START", "eventTime": started.isoformat()} | event | {"outputs": []}
    yield {"eventType": "COMPLETE", "eventTime": ended.isoformat()} | event | {"outputs": [_dataset(product)]}


def _run_facets(product: Product, started: datetime, ended: datetime) -> Object:
    facets = {
        "nominalTime": _facet(
            product,
            "1-0-1",
            "NominalTimeRunFacet",
            nominalStartTime=started.isoformat(),
            nominalEndTime=ended.isoformat(),
        )
    }
    if product.document:
        settings = product.document["params"] | {"key": product.key} if product.key else product.document["params"]
        parameters = [{"key": name, "value": _as_text(value)} for name, value in settings.items()]
        facets["executionParameters"] = _facet(product, "1-0-0", "ExecutionParametersRunFacet", parameters=parameters)
    return facets


def _dataset(product: Product) -> Object:
    """Return a product as a dataset: the name stays from version to version, the digest is the version."""
    name = product.names[0].partition("/")[0] if product.names else product.node
    facets = {"version": _facet(product, "1-0-1", "DatasetVersionDatasetFacet", datasetVersion=product.digest)}
    if product.node == DATA:
        facets["schema"] = _facet(product, "1-2-0", "SchemaDatasetFacet", fields=_tables())
        name = f"data/{name}"
    kind = {"data": "DATASET", "evaluate": "EVALUATION"}.get(product.node, "MODEL" if product.stage else "SOURCE")
    facets["datasetType"] = _facet(product, "1-0-1", "DatasetTypeDatasetFacet", datasetType=kind)
    return {"namespace": NAMESPACE, "name": name, "facets": facets}


def _tables() -> list[Object]:
    """Return the columns of a data set's tables, nested as they are."""
    from rrlhf.data.tables import SCHEMAS

    def fields(names: Iterable[Any]) -> list[Object]:
        described = []
        for column in names:
            inner = getattr(column.type, "value_type", column.type)
            nested = [inner.field(i) for i in range(inner.num_fields)] if hasattr(inner, "num_fields") else []
            kind = "array" if inner is not column.type else str(column.type)
            described.append({"name": column.name, "type": kind} | ({"fields": fields(nested)} if nested else {}))
        return described

    return [{"name": name, "type": "table", "fields": fields(schema)} for name, schema in SCHEMAS.items()]


def _facet(product: Product, edition: str, name: str, **content: Any) -> Object:
    schema = f"{SPECIFICATION}/facets/{edition}/{name}.json#/$defs/{name}"
    return {"_producer": _producer(product), "_schemaURL": schema, **content}


def _producer(product: Product) -> str:
    commit = product.commit.removesuffix("-dirty")
    return f"urn:rrlhf:{_edition()}" + (f":{commit}" if commit else "")


@cache
def _edition() -> str:
    return version("rrlhf")


def _as_text(value: Any) -> str:
    return canonical(value) if isinstance(value, dict) else str(value)


def _ended(graph: Graph, product: Product) -> datetime:
    """Return when a product was made: as recorded, or else no later than the first that was made from it."""
    known = [product.created] if product.created else [each.created for each in graph.down(product) if each.created]
    return datetime.fromisoformat(min(known)) if known else datetime.fromtimestamp(0, UTC)
