"""The graph as OpenLineage events (specification 2-0-2), which catalogues such as Marquez and DataHub read.

Every stage is a job, every making of a result a run with a START and a COMPLETE event, every data set, model and
evaluation a dataset in OpenLineage's sense, with the digest of its content as its version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import dotted

SPECIFICATION = "https://openlineage.io/spec"
NAMESPACE = "rrlhf"
PRODUCER = f"urn:rrlhf:{version('rrlhf')}"

Object = dict[str, Any]  # as JSON


def as_lines(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return events as JSON, one a line, as OpenLineage's file transport writes them."""
    products = graph.down(start) if down else graph.up(start)
    found = (event for product in products if product.stage for event in _run(graph, product))
    return "\n".join(json.dumps(event, ensure_ascii=False) for event in found)


def _run(graph: Graph, product: Product) -> Iterator[Object]:
    ended = _ended(graph, product)
    started = ended - timedelta(seconds=product.seconds)
    settings = {**(product.document or {}).get("params", {}), "key": product.key, "git_commit": product.commit}
    parameters = [{"key": name, "value": value} for name, value in dotted(settings) if value]
    job = {"processingType": "BATCH", "integration": "RRLHF", "jobType": "STAGE"}
    event: Object = {
        "producer": PRODUCER,
        "schemaURL": f"{SPECIFICATION}/2-0-2/OpenLineage.json#/$defs/RunEvent",
        "run": {
            "runId": str(uuid5(NAMESPACE_URL, f"urn:rrlhf:{product.digest}:{product.key}")),
            "facets": {"executionParameters": _facet("1-0-0", "ExecutionParametersRunFacet", parameters=parameters)},
        },
        "job": {
            "namespace": NAMESPACE,
            "name": product.node,
            "facets": {"jobType": _facet("2-0-4", "JobTypeJobFacet", **job)},
        },
        "inputs": [_dataset(link.source) for link in graph.sources[product]],
    }
    yield {"eventType": "START", "eventTime": started.isoformat()} | event | {"outputs": []}
    yield {"eventType": "COMPLETE", "eventTime": ended.isoformat()} | event | {"outputs": [_dataset(product)]}


def _dataset(product: Product) -> Object:
    """Return a product as a dataset: the name stays from version to version, the digest is the version."""
    name = product.names[0].partition("/")[0] if product.names else product.node
    kind = {DATA: "DATASET", "evaluate": "EVALUATION"}.get(product.node, "MODEL" if product.stage else "SOURCE")
    facets = {
        "version": _facet("1-0-1", "DatasetVersionDatasetFacet", datasetVersion=product.digest),
        "datasetType": _facet("1-0-1", "DatasetTypeDatasetFacet", datasetType=kind),
    }
    return {"namespace": NAMESPACE, "name": f"data/{name}" if product.node == DATA else name, "facets": facets}


def _facet(edition: str, name: str, **content: Any) -> Object:
    return {
        "_producer": PRODUCER,
        "_schemaURL": f"{SPECIFICATION}/facets/{edition}/{name}.json#/$defs/{name}",
        **content,
    }


def _ended(graph: Graph, product: Product) -> datetime:
    """Return when a product was made: as recorded, or else no later than the first that was made from it."""
    known = [product.created] if product.created else [each.created for each in graph.down(product) if each.created]
    return datetime.fromisoformat(min(known)) if known else datetime.fromtimestamp(0, UTC)
