"""The graph as a picture: SVG, and a page around it with the details of every box. Nothing is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import pairwise
from typing import Any

from rrlhf.lineage.graph import Graph, Product
from rrlhf.lineage.layout import HEIGHT, WIDTH, Point, layout
from rrlhf.lineage.text import line
from rrlhf.stages import DATA, EXTERNAL, METHODS
from rrlhf.store.units import telling

COLOURS = {"data": "#2a78b5", "outside": "#777777", "policy": "#c0561f", "evaluate": "#5a4fa2", "model": "#2d7d46"}
LETTERS = 27  # of a line in a box

STYLE = """
.graph text{font-family:system-ui,sans-serif;font-size:12px;fill:#1b1b1b}
.graph .box rect{fill:#fff;stroke-width:1.5}.graph .box.start rect{stroke-width:4}.graph .title{font-weight:600}
.graph .small{fill:#555;font-size:11px}
.graph .arrow{fill:none;stroke:#999;stroke-width:1.2}.graph .arrow.far{stroke:#ddd}
.graph .arrow.lit{stroke:#111;stroke-width:2.2}
.graph .box:hover rect,.graph .box:target rect{fill:#fff6d6}.graph .box a{cursor:pointer}
"""
PAGE_STYLE = """
body{font-family:system-ui,sans-serif;margin:1.5rem;color:#1b1b1b;background:#fafafa}h1{font-size:1.25rem}
figure{margin:0;overflow:auto;background:#fff;border:1px solid #ddd;border-radius:6px}
details{background:#fff;border:1px solid #ddd;border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}
details:target{outline:3px solid #e5b800}summary{cursor:pointer;font-weight:600}table{border-collapse:collapse}
td{padding:.1rem .8rem .1rem 0;vertical-align:top;font-size:.85rem;overflow-wrap:anywhere}td:first-child{color:#555}
svg{display:block;margin:auto;max-width:100%;height:auto}
"""
SCRIPT = """
for (const box of document.querySelectorAll('.box')) {
  const lit = on => document.querySelectorAll('.arrow').forEach(arrow => {
    const ends = [arrow.dataset.from, arrow.dataset.to];
    if (ends.includes(box.id.slice(3))) arrow.classList.toggle('lit', on);
  });
  box.addEventListener('mouseenter', () => lit(true));
  box.addEventListener('mouseleave', () => lit(false));
}
const open = () => { const found = document.querySelector('details:target'); if (found) found.open = true; };
addEventListener('hashchange', open);
open();
"""


def svg(graph: Graph, start: Product, *, down: bool = False, linked: bool = False) -> str:
    """Draw a product's ancestry, or what was made from it. Pointing at a box shows its details.

    linked: boxes lead to the entry of the page around the picture.
    """
    products = graph.down(start) if down else graph.up(start)
    numbers = {product: number for number, product in enumerate(products)}
    links = graph.links(products)
    drawing = layout(len(products), [(numbers[link.source], numbers[link.made]) for link in links])
    arrows = [_arrow(pair, points) for pair, points in drawing.arrows.items()]
    boxes = [
        _box(number, product, drawing.boxes[number], start=product is start, linked=linked)
        for product, number in numbers.items()
    ]
    size = f'width="{drawing.width:g}" height="{drawing.height:g}" viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#999"/></marker></defs>'
    )
    title = escape(f"{'What was made from' if down else 'What made'} {line(start)}")
    inside = "\n".join([f"<title>{title}</title><style>{STYLE}</style>{marker}", *arrows, *boxes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" {size}>\n{inside}\n</svg>'


def html(graph: Graph, start: Product, *, down: bool = False) -> str:
    """Return a page with the picture and every product's digest, settings and numbers. It needs no network."""
    products = graph.down(start) if down else graph.up(start)
    title = escape(f"{'Made from' if down else 'Lineage of'} {start.title}")
    entries = "\n".join(_entry(number, product, graph) for number, product in enumerate(products))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{PAGE_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n<figure>{svg(graph, start, down=down, linked=True)}</figure>\n"
        f"<h2>{len(products)} products</h2>\n{entries}\n<script>{SCRIPT}</script></body></html>\n"
    )


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
    }
    params = (product.document or {}).get("params", {})
    return (
        {name: value for name, value in known.items() if value}
        | dict(_flat(params))
        | {name: f"{value:.6g}" for name, value in product.metrics.items()}
    )


def _box(number: int, product: Product, at: Point, *, start: bool, linked: bool) -> str:
    x, y = at
    rows = [product.title, ", ".join(product.called), f"{product.node} · {product.short}", _told(product)]
    if not product.names or product.node == DATA:
        rows = [product.title, product.short, _told(product)]
    texts = "".join(
        f'<text x="{x + 10:g}" y="{y + 19 + 17 * i:g}" class="{"small" if i else "title"}">{escape(_cut(row))}</text>'
        for i, row in enumerate(filter(None, rows))
    )
    tip = escape("\n".join(f"{name}: {value}" for name, value in details(product).items()))
    rectangle = (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" stroke="{COLOURS[_kind(product)]}"/>'
    )
    inside = f"<title>{tip}</title>{rectangle}{texts}"
    inside = f'<a href="#of-{number}">{inside}</a>' if linked else inside
    return f'<g class="box{" start" if start else ""}" id="box{number}">{inside}</g>'


def _arrow(pair: tuple[int, int], points: list[Point]) -> str:
    (x, y), *rest = points
    path = f"M{x:g} {y:g}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise([(x, y), *rest])):
        middle = (x0 + x1) / 2
        path += f"L{x1:g} {y1:g}" if i % 2 else f"C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"
    kind = "arrow far" if rest[1:] else "arrow"
    return f'<path class="{kind}" data-from="{pair[0]}" data-to="{pair[1]}" marker-end="url(#tip)" d="{path}"/>'


def _entry(number: int, product: Product, graph: Graph) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in details(product).items()
    )
    read = "".join(
        f"<tr><td>read as {escape(link.argument)}</td><td>{escape(line(link.source))}</td></tr>"
        for link in graph.sources(product)
    )
    return f'<details id="of-{number}"><summary>{escape(line(product))}</summary><table>{rows}{read}</table></details>'


def _kind(product: Product) -> str:
    if product.node == DATA:
        return "data"
    if not product.stage or product.node in EXTERNAL:
        return "outside"
    return "policy" if product.stage in METHODS else "evaluate" if product.stage == "evaluate" else "model"


def _told(product: Product) -> str:
    """Return what tells this product best from others: the arm's settings, or a number that was reached."""
    arm = (product.document or {}).get("params", {}).get("arm", {})
    if arm.get("reward"):
        weight = arm.get("nominal_weight")
        return f"reward {arm['reward']}" + (f", w = {weight:g}" if weight is not None else "")
    return telling(product.stage, product.metrics)


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    return [
        pair
        for name, value in settings.items()
        for pair in (
            _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else [(f"{above}{name}", str(value))]
        )
    ]


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
