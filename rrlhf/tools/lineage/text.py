"""The graph as text: a tree for the terminal, a page, JSON for scripts, Mermaid and DOT for pictures."""

from __future__ import annotations

import json
from typing import NamedTuple

from rrlhf.pipeline.ancestry import Graph, Link, Product
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.keys import dotted
from rrlhf.types import Json

SPECIAL = str.maketrans({character: f"#{ord(character)};" for character in '"#&<>`[]{}()|\\;'})


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
            waiting += [(link.made if down else link.source, depth + 1) for link in reversed(below)]
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
    from rrlhf.tools import pages  # here, so that no tree in a terminal waits for it

    title = f"{'Made from' if down else 'Lineage of'} {start.title}"
    shown = branches(graph, start, down=down)
    return pages.page("lineage.html.j2", title=title, branches=shown, line=line, details=details, looks={})


def as_json(graph: Graph, start: Product, *, down: bool = False) -> Json:
    """Return a product's ancestry, or what was made from it: products in order, and the links between them."""
    products = graph.down(start) if down else graph.up(start)
    numbers = {product: number for number, product in enumerate(products)}
    links: list[Json] = [
        {"from": numbers[link.source], "argument": link.argument, "to": numbers[link.made]}
        for link in graph.links(products)
    ]
    return {
        "of": numbers[start],
        "direction": "down" if down else "up",
        "products": [as_object(product) for product in products],
        "links": links,
    }


def as_object(product: Product) -> Json:
    """Return what is known of one product."""
    inputs: dict[str, Json] = dict(product.inputs)
    metrics: dict[str, Json] = dict(product.metrics)
    return {
        "title": product.title,
        "node": product.node,
        "stage": product.stage or None,
        "digest": product.digest,
        "key": product.key or None,
        "names": [*product.names],
        "aliases": [*product.aliases],
        "inputs": inputs,
        "params": (product.document or {}).get("params"),
        "metrics": metrics,
        "git_commit": product.commit or None,
        "created": product.created or None,
    }


def mermaid(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a Mermaid flowchart, which GitHub, GitLab and many editors draw."""
    products = graph.down(start) if down else graph.up(start)
    numbers = {product: f"n{number}" for number, product in enumerate(products)}
    lines = ["flowchart LR", *(f"    {numbers[product]}{_mermaid_box(product)}" for product in products)]
    lines += [_mermaid_arrow(numbers, link) for link in graph.links(products)]
    lines.append(f"    style {numbers[start]} stroke-width:3px")
    return "\n".join(lines)


def dot(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a graph in the DOT language, which Graphviz draws."""
    products = graph.down(start) if down else graph.up(start)
    numbers = {product: f"n{number}" for number, product in enumerate(products)}
    boxes = [f"    {numbers[product]} [label={_quoted(chr(10).join(_box(product)))}]" for product in products]
    arrows = [
        f"    {numbers[link.source]} -> {numbers[link.made]} [label={_quoted(link.argument)}]"
        for link in graph.links(products)
    ]
    return "\n".join(["digraph {", "    rankdir=LR", "    node [shape=box]", *boxes, *arrows, "}"])


def line(product: Product) -> str:
    """Return a product on one line: its name, aliases, node and digest."""
    if product.node == DATA:
        return f"{product.title} {product.short}"
    if not product.stage:
        unknown = "" if product.node in EXTERNAL else " (not registered)"
        separator = " " if product.node in EXTERNAL else " · "
        return f"{product.node}{separator}{product.short}{unknown}"
    aliases = f" ({', '.join(product.called)})" if product.aliases else ""
    node = f" · {product.node}" if product.names else ""
    return f"{product.title}{aliases}{node} · {product.short}"


def _below(graph: Graph, product: Product, down: bool) -> list[Link]:
    """Return the links to the next products; one that reads another under two names is there once."""
    if not down:
        return list({link.source: link for link in reversed(graph.sources(product))}.values())[::-1]
    direct = {link.made: link for link in graph.readers(product)}
    further = {link.made for reader in direct for link in graph.readers(reader)}
    waiting = list(further)
    while waiting:
        new = {link.made for link in graph.readers(waiting.pop())} - further
        further |= new
        waiting += new
    return [link for made, link in direct.items() if made not in further]


def details(product: Product) -> dict[str, str]:
    """Return what is known of a product as lines for people: identity first, then settings and numbers."""
    known = {
        "names": ", ".join((*product.names, *product.aliases)),
        "node": product.node,
        "digest": product.digest,
        "key": product.key,
        "git commit": product.commit,
        "made": product.created,
        "seconds": f"{product.seconds:g}" if product.seconds else "",
        **{f"read as {argument}": digest for argument, digest in product.inputs.items()},
    }
    params = (product.document or {}).get("params", {})
    return (
        {name: value for name, value in known.items() if value}
        | dict(dotted(params))
        | {name: f"{value:.6g}" for name, value in product.metrics.items()}
    )


def _box(product: Product) -> list[str]:
    """Return what stands in a product's box, without repetition."""
    rows = [product.title, ", ".join(product.called), product.node if product.names else "", product.short]
    if not product.stage:
        rows = [product.node, product.short]
    return [row for row in dict.fromkeys(rows) if row and row != DATA]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _mermaid_box(product: Product) -> str:
    text = "<br/>".join(row.translate(SPECIAL) for row in _box(product))
    left, right = ('[("', '")]') if product.node == DATA or not product.stage else ('["', '"]')
    return f"{left}{text}{right}"


def _mermaid_arrow(numbers: dict[Product, str], link: Link) -> str:
    return f'    {numbers[link.source]} -->|"{link.argument.translate(SPECIAL)}"| {numbers[link.made]}'
