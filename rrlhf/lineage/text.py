"""The graph as text: a tree for the terminal, JSON for scripts, Mermaid for documents."""

from __future__ import annotations

from rrlhf.lineage.graph import Graph, Link, Product
from rrlhf.stages import DATA, EXTERNAL
from rrlhf.types import Json

SPECIAL = str.maketrans({character: f"#{ord(character)};" for character in '"#&<>`[]{}()|\\;'})


def tree(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Draw a product with everything it was made from, or `down`, with everything made from it.

    What was drawn already is not drawn again. Downwards, a link that a longer way explains is left out: a policy
    reads the SFT model too, but stands below the ensemble that was made on the way.
    """
    lines = [line(start)]
    seen = {start}
    waiting = [("", link) for link in reversed(_below(graph, start, down))]
    last = {id(link): i == 0 for i, (_, link) in enumerate(waiting)}
    while waiting:
        before, link = waiting.pop()
        product = link.made if down else link.source
        below = _below(graph, product, down)
        again = product in seen and bool(below)
        branch, stem = ("└── ", "    ") if last.pop(id(link)) else ("├── ", "│   ")
        lines.append(before + branch + line(product) + (" (see above)" if again else ""))
        seen.add(product)
        if not again:
            following = [(before + stem, each) for each in reversed(below)]
            last |= {id(each): i == 0 for i, (_, each) in enumerate(following)}
            waiting += following
    return "\n".join(lines)


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


def _mermaid_box(product: Product) -> str:
    rows = [product.title, ", ".join(product.called), product.node if product.names else "", product.short]
    if not product.stage:
        rows = [product.node, product.short]
    text = "<br/>".join(row.translate(SPECIAL) for row in dict.fromkeys(rows) if row and row != DATA)
    left, right = ('[("', '")]') if product.node == DATA or not product.stage else ('["', '"]')
    return f"{left}{text}{right}"


def _mermaid_arrow(numbers: dict[Product, str], link: Link) -> str:
    return f'    {numbers[link.source]} -->|"{link.argument.translate(SPECIAL)}"| {numbers[link.made]}'
