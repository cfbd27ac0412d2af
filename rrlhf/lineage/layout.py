"""Where boxes and arrows of a drawing go: layers by the longest way (Sugiyama et al. 1981), left to right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 190, 78  # of a box, in pixels
ACROSS, BETWEEN = 70, 16  # from layer to layer, and between boxes of a layer
BEND = 14  # height that an arrow takes in a layer that it passes
MARGIN = 12
SWEEPS = 6

Point = tuple[float, float]
Slot = int | tuple[int, int, int]  # a box by its number, or where the arrow (from, to) passes a layer


class Drawing(NamedTuple):
    """Left upper corners of boxes, points that arrows pass, and the size of it all, in pixels."""

    boxes: dict[int, Point]
    arrows: dict[tuple[int, int], list[Point]]
    width: float
    height: float


def layout(count: int, links: Sequence[tuple[int, int]]) -> Drawing:
    """Place boxes 0 ... count - 1, which come in an order in which no link points backwards."""
    arrows = sorted(set(links))
    layer = _layers(count, arrows)
    passed = {(a, b): [(a, b, depth) for depth in range(layer[a] + 1, layer[b])] for a, b in arrows}
    ways: dict[tuple[int, int], list[Slot]] = {(a, b): [a, *slots, b] for (a, b), slots in passed.items()}
    columns: defaultdict[int, list[Slot]] = defaultdict(list)
    for box in range(count):
        columns[layer[box]].append(box)
    for slots in passed.values():
        for slot in slots:
            columns[slot[2]].append(slot)
    _order(columns, ways)
    return _placed(columns, ways)


def _layers(count: int, arrows: Sequence[tuple[int, int]]) -> list[int]:
    """Return the length of the longest way to each box; boxes without inputs stand right before their first reader."""
    layer = [0] * count
    for a, b in sorted(arrows, key=lambda arrow: arrow[1]):
        layer[b] = max(layer[b], layer[a] + 1)
    read = {b for _, b in arrows}
    readers: defaultdict[int, list[int]] = defaultdict(list)
    for a, b in arrows:
        readers[a].append(layer[b])
    return [layer[box] if box in read or box not in readers else max(min(readers[box]) - 1, 0) for box in range(count)]


def _order(columns: dict[int, list[Slot]], ways: Mapping[tuple[int, int], list[Slot]]) -> None:
    """Order every layer, in place, so that few arrows cross: each slot near the mean of its neighbours."""
    before: defaultdict[Slot, list[Slot]] = defaultdict(list)
    after: defaultdict[Slot, list[Slot]] = defaultdict(list)
    for way in ways.values():
        for one, other in pairwise(way):
            after[one].append(other)
            before[other].append(one)
    depths = sorted(columns)
    for sweep in range(SWEEPS):
        neighbours = after if sweep % 2 else before
        place = {slot: i / len(column) for column in columns.values() for i, slot in enumerate(column)}
        for depth in reversed(depths) if sweep % 2 else depths:
            column = columns[depth]
            wish = {
                slot: sum(place[each] for each in neighbours[slot]) / len(neighbours[slot])
                if neighbours[slot]
                else place[slot]
                for slot in column
            }
            column.sort(key=lambda slot: wish[slot])
            place |= {slot: i / len(column) for i, slot in enumerate(column)}


def _placed(columns: Mapping[int, Sequence[Slot]], ways: Mapping[tuple[int, int], list[Slot]]) -> Drawing:
    """Give every slot its place; layers are centred on each other."""
    heights = {depth: sum(_height(slot) + BETWEEN for slot in column) - BETWEEN for depth, column in columns.items()}
    tallest = max(heights.values())
    at: dict[Slot, Point] = {}
    for depth, column in columns.items():
        y = MARGIN + (tallest - heights[depth]) / 2
        for slot in column:
            at[slot] = (MARGIN + depth * (WIDTH + ACROSS), y)
            y += _height(slot) + BETWEEN
    arrows = {pair: _points(way, at) for pair, way in ways.items()}
    boxes = {slot: point for slot, point in at.items() if isinstance(slot, int)}
    width = 2 * MARGIN + (max(columns) + 1) * (WIDTH + ACROSS) - ACROSS
    return Drawing(boxes, arrows, width, tallest + 2 * MARGIN)


def _points(way: Sequence[Slot], at: Mapping[Slot, Point]) -> list[Point]:
    """Return the points of an arrow: out of a box on the right, through the slots of layers between, in on the left."""
    (start_x, start_y), (end_x, end_y) = at[way[0]], at[way[-1]]
    points = [(start_x + WIDTH, start_y + HEIGHT / 2)]
    for slot in way[1:-1]:
        x, y = at[slot]
        points += [(x, y + BEND / 2), (x + WIDTH, y + BEND / 2)]
    return [*points, (end_x, end_y + HEIGHT / 2)]


def _height(slot: Slot) -> float:
    return HEIGHT if isinstance(slot, int) else BEND
