"""The graph as text: a tree for the terminal, a page, JSON for scripts, pictures, and OpenLineage events."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.cards import filled
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.keys import dotted

SPECIAL = str.maketrans({character: f"#{ord(character)};" for character in '"#&<>`[]{}()|\\;'})
SPECIFICATION = "https://openlineage.io/spec"
NAMESPACE = "rrlhf"
PRODUCER = f"urn:rrlhf:{version('rrlhf')}"

Object = dict[str, Any]  # as JSON


class Branch(NamedTuple):
    """A product where it stands in a tree."""

    product: Product
    depth: int  # 0: the root
    again: bool  # it stands above already, with what is below it


def branches(graph: Graph, start: Product, *, down: bool = False) -> list[Branch]:
    """Return a product with everything it was made from, or `down`, with everything made from it, each below its user.

    What stands there already is not followed again. Downwards, a link that a longer way explains is left out: a policy
    reads the SFT model too, but stands below the ensemble that was made on the way.
    """
    found: list[Branch] = []
    seen: set[Product] = set()
    waiting = [(start, 0)]
    while waiting:
        product, depth = waiting.pop()
        below = _below(graph, product, down)
        again = product in seen and bool(below)
        found.append(Branch(product, depth, again))
        seen.add(product)
        if not again:
            waiting += [(each, depth + 1) for each in reversed(below)]
    return found


def tree(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Draw the branches for a terminal."""
    lines: list[str] = []
    later: set[int] = set()  # depths at which the same branch goes on below
    for product, depth, again in reversed(branches(graph, start, down=down)):
        stems = "".join("│   " if level in later else "    " for level in range(1, depth))
        fork = "" if depth == 0 else "├── " if depth in later else "└── "
        lines.append(stems + fork + line(product) + (" (see above)" if again else ""))
        later = {level for level in later if level < depth} | {depth}
    return "\n".join(reversed(lines))


def page(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a page with the branches, which open to digest, settings and numbers. It needs no network."""
    title = f"{'Made from' if down else 'Lineage of'} {start.title}"
    shown = branches(graph, start, down=down)
    return filled("lineage.html.j2", title=title, branches=shown, line=line, details=details, looks={})


def as_json(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a product's ancestry, or what was made from it: products in order, and the links between them."""
    products, arrows = _picture(graph, start, down)
    told = {
        "of": products.index(start),
        "direction": "down" if down else "up",
        "products": [as_object(product) for product in products],
        "links": [{"from": source, "argument": argument, "to": made} for source, argument, made in arrows],
    }
    return json.dumps(told, indent=1)


def as_object(product: Product) -> dict[str, object]:
    """Return what is known of one product."""
    return {
        "title": product.title,
        "node": product.node,
        "stage": product.stage or None,
        "digest": product.digest,
        "key": product.key or None,
        "names": [*product.names],
        "aliases": [*product.aliases],
        "inputs": dict(product.inputs),
        "git_commit": product.commit or None,
        "created": product.created or None,
        "seconds": product.seconds or None,
        "params": (product.document or {}).get("params"),
        "metrics": dict(product.metrics),
    }


def details(product: Product) -> dict[str, str]:
    """Return what is known of one product by its dotted names, as text."""
    known = as_object(product) | {"names": ", ".join(product.names), "aliases": ", ".join(product.aliases)}
    return dict(dotted({name: value for name, value in known.items() if value and name != "title"}))


def mermaid(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a Mermaid flowchart, which GitHub, GitLab and many editors draw."""
    products, arrows = _picture(graph, start, down)
    texts = [line(product).translate(SPECIAL).replace(" · ", "<br/>") for product in products]
    lines = [f'    n{number}["{text}"]' for number, text in enumerate(texts)]
    lines += [f'    n{source} -->|"{argument.translate(SPECIAL)}"| n{made}' for source, argument, made in arrows]
    return "\n".join(["flowchart LR", *lines, f"    style n{products.index(start)} stroke-width:3px"])


def dot(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a graph in the DOT language, which Graphviz draws."""
    products, arrows = _picture(graph, start, down)
    texts = [line(product).replace(" · ", "\n") for product in products]
    lines = [f"    n{number} [label={_quoted(text)}]" for number, text in enumerate(texts)]
    lines += [f"    n{source} -> n{made} [label={_quoted(argument)}]" for source, argument, made in arrows]
    return "\n".join(["digraph {", "    rankdir=LR", "    node [shape=box]", *lines, "}"])


def line(product: Product) -> str:
    """Return a product on one line: its name, aliases, node and digest."""
    if product.node == DATA or product.node in EXTERNAL:
        return f"{product.title} {product.short}"
    if not product.stage:
        return f"{product.node} · {product.short} (not registered)"
    aliases = f" ({', '.join(alias.partition('@')[2] for alias in product.aliases)})" if product.aliases else ""
    node = f" · {product.node}" if product.names else ""
    return f"{product.title}{aliases}{node} · {product.short}"


def _picture(graph: Graph, start: Product, down: bool) -> tuple[list[Product], list[tuple[int, str, int]]]:
    """Return the products that are drawn, and the links between them by their numbers."""
    products = graph.down(start) if down else graph.up(start)
    numbers = {product: number for number, product in enumerate(products)}
    links = [link for product in products for link in graph.sources[product] if link.source in numbers]
    return products, [(numbers[link.source], link.argument, numbers[link.made]) for link in links]


def _below(graph: Graph, product: Product, down: bool) -> list[Product]:
    """Return the next products; one that reads another under two names is there once."""
    if not down:
        return list(dict.fromkeys(link.source for link in graph.sources[product]))
    direct = dict.fromkeys(link.made for link in graph.readers[product])
    further = set(graph.down(*(link.made for made in direct for link in graph.readers[made])))
    return [made for made in direct if made not in further]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def as_lines(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return OpenLineage's events as JSON, one a line (specification 2-0-2), which Marquez and DataHub read.

    Every stage is a job, every making of a result a run with a START and a COMPLETE event, every data set, model and
    evaluation a dataset in OpenLineage's sense, with the digest of its content as its version.
    """
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


FORMATS = {"tree": tree, "json": as_json, "mermaid": mermaid, "dot": dot, "html": page, "openlineage": as_lines}
