"""The graph of everything that was made: what came from what, upwards and downwards. Pure: no files, no server."""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
    formerly: str = ""  # of a data set of an earlier version: by which digest older results name it

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


class Link(NamedTuple):
    """`made` read `source` as this argument."""

    source: Product
    argument: str
    made: Product


class Graph:
    """Products, and who read what."""

    def __init__(self, products: Iterable[Product]) -> None:
        """Take products, the newest first."""
        self.products = list(products)
        self._of_content: defaultdict[str, list[Product]] = defaultdict(list)
        self.sources: defaultdict[Product, list[Link]] = defaultdict(list)  # links to what a product was made from
        self.readers: defaultdict[Product, list[Link]] = defaultdict(list)  # and to what was made from it
        for product in self.products:
            for digest in filter(None, (product.digest, product.formerly)):
                self._of_content[digest].append(product)
        for product in self.products:
            inputs = sorted(product.inputs.items(), key=lambda item: (item[0] != DATA, item[0]))
            self.sources[product] = [Link(self._read(product, name, digest), name, product) for name, digest in inputs]
            for link in self.sources[product]:
                self.readers[link.source].append(link)

    def _read(self, product: Product, argument: str, digest: str) -> Product:
        """Return the making that was read; of data, and where no key was noted, the newest with this content.

        Two makings may have one content: data sets that differ in their preferences alone give one SFT model twice.
        What nobody knows gets a product of its own.
        """
        key = product.input_keys.get(argument)
        found = next((each for each in self._of_content[digest] if key in {None, each.key}), None)
        if found is None:
            found = Product(digest, argument, key=key or "")
            self._of_content[digest].append(found)
        return found

    def up(self, *products: Product) -> list[Product]:
        """Return products with everything they were made from, inputs before what they made."""
        return _ordered(products, lambda each: [link.source for link in self.sources[each]])

    def down(self, *products: Product) -> list[Product]:
        """Return products with everything made from them, inputs before what they made."""
        return _ordered(products, lambda each: [link.made for link in self.readers[each]])[::-1]

    def built_on(self, name: str) -> list[Product]:
        """Return everything made from what has this key or, as a data set, this digest, inputs before what they made.

        The one answer to "what is built on this": for a lineage, an audit, and the error of a changed file.
        """
        known = [product for same in self._of_content.values() for product in same]
        starts = [product for product in known if name in {product.key, product.digest}]
        return [product for product in self.down(*starts) if product not in starts]

    def find(self, reference: str, profile: str = "default") -> Product:
        """Find "rrlhf-policy@candidate", "rrlhf-policy/3", a data set's name, a node, or the start of a digest or key.

        "NAME@latest" is the newest version of a name, a node ("data", "ppo-robust") the newest of the profile; a start
        has 6 hex digits or more. Raises UsageError with the closest names when there is none, or more than one.
        """
        wanted = reference.removeprefix("models:/")
        named, nodes = self._named(), {product.node for product in self.products}
        if wanted in named:
            return named[wanted]
        if wanted in nodes:
            return self._of_profile(wanted, profile)
        if wanted in self._of_content:
            return self._of_content[wanted][0]
        start, found = wanted.removeprefix("md5:").removesuffix(".dir"), list[Product]()
        if re.fullmatch("[0-9a-f]{6,}", start):
            newest = dict.fromkeys(same[0] for same in self._of_content.values())  # of each content
            found = [each for each in newest if each.digest.removeprefix("md5:").startswith(start)]
            found = found or [product for product in self.products if product.key.startswith(start)]
        if len(found) == 1:
            return found[0]
        if found:
            digests = ", ".join(short(product.digest, len(start) + 6) for product in found)
            raise UsageError(f"{reference!r} begins several digests: {digests}")
        close = difflib.get_close_matches(wanted, {*named, *nodes}, n=3) or sorted(named)[:10]
        raise UsageError(
            f"no model {reference!r}; {'close: ' + ', '.join(close) if close else 'none is registered yet'}"
        )

    def _named(self) -> dict[str, Product]:
        """Return every product by all its names; of products that share one, the newest."""
        named: dict[str, Product] = {}
        for product in reversed(self.products):
            named |= dict.fromkeys((*product.names, *product.aliases), product)
        versions = [
            (model, int(number)) for model, _, number in (name.partition("/") for name in named) if number.isdigit()
        ]
        return named | {f"{model}@latest": named[f"{model}/{number}"] for model, number in sorted(versions)}

    def _of_profile(self, node: str, profile: str) -> Product:
        made = [product for product in self.products if product.node == node]
        found = next((each for each in made if any(profile in user.profiles for user in self.down(each))), None)
        if found is None:  # profiles share results: one is also theirs whose models were made from it
            others = ", ".join(sorted({each for product in made for each in product.profiles}))
            way = f"name another with --profile: {others}" if others else "name one by the start of its digest"
            raise UsageError(f"profile {profile} has no {node} yet; {way}")
        return found


def short(digest: str, digits: int = SHOWN) -> str:
    """Return what a person reads of a digest; names of what came from outside stay whole."""
    if re.fullmatch("[0-9a-f]{64}", digest):
        return digest[:digits]
    if digest.startswith("md5:"):
        return f"md5:{digest[4 : 4 + digits]}"
    return digest


def _ordered(starts: Iterable[Product], below: Callable[[Product], list[Product]]) -> list[Product]:
    """Return all that can be reached, each behind everything below it (depth first, without recursion)."""
    done: dict[Product, None] = {}
    seen: set[Product] = set()
    waiting = [(product, False) for product in starts]
    while waiting:
        product, is_left = waiting.pop()
        if is_left:
            done[product] = None
        elif product not in seen:
            seen.add(product)
            waiting.append((product, True))
            waiting += [(each, False) for each in reversed(below(product)) if each not in seen]
    return list(done)
