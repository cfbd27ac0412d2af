"""The graph of everything that was made: what came from what, upwards and downwards. Pure: no files, no server."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, takewhile
from typing import NamedTuple

from rrlhf.located import UsageError
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import Document
from rrlhf.pipeline.stages import profile_of

SHOWN = 8  # hex digits of a digest that a person reads


@dataclass(frozen=True, eq=False)
class Product:
    """What a stage made, or what came from outside: a node of the graph. Its identity is (digest, key)."""

    digest: str  # of its content: sha256, or "md5:<hex>.dir" for a data set; of what came from outside, its name
    node: str  # "ppo-robust", "data"; of what came from outside, the argument that read it
    stage: str = ""  # "ppo", "prepare"; empty when nothing here tells who made it
    key: str = ""  # sha256 of its key document
    inputs: Mapping[str, str] = field(default_factory=dict)  # argument -> digest
    names: tuple[str, ...] = ()  # "rrlhf-policy/2" in the registry, "tiny" for a data set; the newest first
    aliases: tuple[str, ...] = ()  # "rrlhf-policy@candidate"
    document: Document | None = None  # its key document, where it is known
    metrics: Mapping[str, float] = field(default_factory=dict)
    commit: str = ""
    created: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
    input_keys: Mapping[str, str] = field(default_factory=dict)  # argument -> key of the making that was read
    profile: str = ""  # for which it was made, where that is known

    @property
    def short(self) -> str:
        """The digest as a person reads it."""
        return short(self.digest)

    @property
    def title(self) -> str:
        """What a person calls it: "rrlhf-policy v2", "data tiny", "evaluate"."""
        if self.node == DATA:
            return f"data {self.names[0]}" if self.names else DATA
        if not self.names:
            return self.node
        name, _, number = self.names[0].partition("/")
        return f"{name} v{number}"

    @property
    def profiles(self) -> set[str]:
        """The profiles that it is a product of: whose names it has, and for which it was made."""
        models = {profile_of(name.partition("/")[0], self.stage) for name in self.names if "/" in name}
        data = {re.sub("-[0-9a-f]{8}$", "", name) for name in self.names if self.node == DATA}  # of a variant too
        return {profile for profile in {*models, *data, self.profile} if profile}

    @property
    def called(self) -> tuple[str, ...]:
        """Its aliases without the name of the registered model: "candidate"."""
        return tuple(alias.partition("@")[2] for alias in self.aliases)


Sorted = list[tuple[str, Product]]


class Link(NamedTuple):
    """`made` read `source` as this argument."""

    source: Product
    argument: str
    made: Product


class Graph:
    """Products, and who read what. Made once, asked often: every answer costs as much as it is long."""

    def __init__(self, products: Iterable[Product]) -> None:
        """Take products, the newest first."""
        self.products = list(products)
        self._makers: defaultdict[str, list[Product]] = defaultdict(list)
        self._making: dict[tuple[str, str], Product] = {}
        self._readers: defaultdict[Product, list[Link]] = defaultdict(list)
        for product in self.products:
            self._makers[product.digest].append(product)
            self._making.setdefault((product.digest, product.key), product)
        self._sources: dict[Product, list[Link]] = {product: self._links(product) for product in self.products}
        for links in self._sources.values():
            for link in links:
                self._readers[link.source].append(link)

    def _links(self, product: Product) -> list[Link]:
        """Link a product to its inputs, the data set first; those that nobody knows get a product of their own."""
        inputs = sorted(product.inputs.items(), key=lambda item: (item[0] != DATA, item[0]))
        return [
            Link(self._maker(digest, argument, product.input_keys.get(argument)), argument, product)
            for argument, digest in inputs
        ]

    def _maker(self, digest: str, argument: str, key: str | None) -> Product:
        """Return the making that was read; of data, and where no key was noted, the newest with this content.

        Two makings may have one content: data sets that differ in their preferences alone give one SFT model twice.
        """
        if key is None and self._makers[digest]:
            return self._makers[digest][0]
        identity = digest, key or ""
        if identity not in self._making:
            self._making[identity] = Product(digest, argument, key=key or "")
            self._makers[digest].append(self._making[identity])
        return self._making[identity]

    def makers(self, digest: str) -> list[Product]:
        """Return everything that has this content, the newest first."""
        return self._makers.get(digest, [])

    def sources(self, product: Product) -> list[Link]:
        """Return the links to what a product was made from."""
        return self._sources.get(product, [])

    def readers(self, product: Product) -> list[Link]:
        """Return the links to what was made from a product."""
        return self._readers.get(product, [])

    def up(self, product: Product) -> list[Product]:
        """Return a product with everything it was made from, inputs before what they made."""
        return _ordered(product, lambda each: [link.source for link in self.sources(each)])

    def down(self, product: Product) -> list[Product]:
        """Return a product with everything made from it, inputs before what they made."""
        return _ordered(product, lambda each: [link.made for link in self.readers(each)])[::-1]

    def built_on(self, name: str) -> list[Product]:
        """Return everything made from what has this key or, as a data set, this digest, inputs before what they made.

        The one answer to "what is built on this": for a lineage, an audit, and the error of a changed file.
        """
        starts = [made for makings in self._makers.values() for made in makings if name in (made.key, made.digest)]
        return list(dict.fromkeys(product for start in starts for product in self.down(start)[1:]))

    def links(self, among: Iterable[Product]) -> list[Link]:
        """Return the links between these products."""
        chosen = list(among)
        inside = set(chosen)
        return [link for product in chosen for link in self.sources(product) if link.source in inside]

    def find(self, reference: str, profile: str = "default") -> Product:
        """Find "rrlhf-policy@candidate", "rrlhf-policy/3", a data set's name, a node, or the start of a digest or key.

        "NAME@latest" is the newest version of a name, a node ("data", "ppo-robust") the newest of the profile; a start
        has 6 hex digits or more. Raises UsageError with the closest names when there is none, or more than one.
        """
        wanted = reference.removeprefix("models:/")
        named = self._named
        if wanted in named:
            return named[wanted]
        if wanted in self._nodes:
            return self._of_profile(wanted, profile)
        if wanted in self._makers:
            return self._makers[wanted][0]
        if re.fullmatch("[0-9a-f]{6,}", start := wanted.removeprefix("md5:").removesuffix(".dir")):
            found = _beginning(self._digests, start) or _beginning(self._keys, start)
            if len(found) == 1:
                return next(iter(found.values()))
            if found:
                digests = ", ".join(digest[: len(start) + 6] for digest in found)
                raise UsageError(f"{reference!r} begins several digests: {digests}")
        close = difflib.get_close_matches(wanted, {*named, *self._nodes}, n=3) or sorted(named)[:10]
        raise UsageError(
            f"no model {reference!r}; {'close: ' + ', '.join(close) if close else 'none is registered yet'}"
        )

    @cached_property
    def _digests(self) -> Sorted:
        return sorted(((digest.removeprefix("md5:"), made[0]) for digest, made in self._makers.items()), key=_first)

    @cached_property
    def _keys(self) -> Sorted:
        return sorted(((product.key, product) for product in self.products), key=_first)

    @cached_property
    def _named(self) -> dict[str, Product]:
        """Return every product by all its names; of products that share one, the newest."""
        versions = (
            (model, int(number), product)
            for product in self.products
            for model, _, number in (name.partition("/") for name in product.names)
            if number.isdigit()
        )
        named: dict[str, Product] = {
            f"{model}@latest": product for model, _, product in sorted(versions, key=lambda version: version[:2])
        }
        for product in reversed(self.products):
            named |= dict.fromkeys((*product.names, *product.aliases), product)
        return named

    @cached_property
    def _nodes(self) -> dict[str, list[Product]]:
        """Return the products of every node, the newest first."""
        nodes: dict[str, list[Product]] = {}
        for product in self.products:
            nodes.setdefault(product.node, []).append(product)
        return nodes

    def _of_profile(self, node: str, profile: str) -> Product:
        found = next((product for product in self._nodes[node] if profile in product.profiles), None)
        if found is None:
            others = sorted({each for product in self._nodes[node] for each in product.profiles})
            way = (
                f"name another with --profile: {', '.join(others)}" if others else "name one by the start of its digest"
            )
            raise ValueError(f"profile {profile} has no {node} yet; {way}")
        return found


def _first(item: tuple[str, Product]) -> str:
    return item[0]


def _beginning(named: Sorted, start: str) -> dict[str, Product]:
    """Return the products whose name begins with `start`, by their names."""
    first = bisect_left(named, start, key=_first)
    return dict(takewhile(lambda item: item[0].startswith(start), islice(named, first, None)))


def short(digest: str, digits: int = SHOWN) -> str:
    """Return what a person reads of a digest; names of what came from outside stay whole."""
    if re.fullmatch("[0-9a-f]{64}", digest):
        return digest[:digits]
    if digest.startswith("md5:"):
        return f"md5:{digest[4 : 4 + digits]}"
    return digest


def _ordered(start: Product, below: Callable[[Product], list[Product]]) -> list[Product]:
    """Return all that can be reached, each behind everything below it (depth first, without recursion)."""
    done: dict[Product, None] = {}
    seen = {start}
    waiting = [(start, iter(below(start)))]
    while waiting:
        product, rest = waiting[-1]
        following = next((each for each in rest if each not in seen), None)
        if following is None:
            done[product] = None
            waiting.pop()
        else:
            seen.add(following)
            waiting.append((following, iter(below(following))))
    return list(done)
