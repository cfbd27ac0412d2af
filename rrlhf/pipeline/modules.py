"""The code behind a result: definitions of a package, by what they say and use and not by where they lie.

From a stage's `run`, every name is followed to the function, class or value that it stands for. What a module of one of
these does when it is imported, beside defining, counts as well. Nothing is imported for it. Names are followed as
written; code that finds its way by a name that it makes up (`globals()["f"]`), or imports a module for what that does
and uses nothing of it, is not understood, and no stage does that.
"""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from rrlhf.sourcecode import canonical, imports, names_bound, parsed

# Of this package: modules whose every effect on a result is already in the key (as settings), or that only show or
# store things.
WITHOUT_EFFECT = {
    "rrlhf.checks",
    "rrlhf.config",
    "rrlhf.environment",
    "rrlhf.files",
    "rrlhf.hardware",
    "rrlhf.located",
    "rrlhf.locks",
    "rrlhf.memo",
    "rrlhf.models.sources",
    "rrlhf.progress",
    "rrlhf.sourcecode",
    "rrlhf.stopping",
    "rrlhf.types",
}
WHOLE = "(whole)"  # in a closure: the digest of all definitions and of how they refer to each other
OTHER_LINES = "(other lines)"  # of a module: what it does on import beside defining
DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
SKIPPED = {"TYPE_CHECKING", "__name__ == '__main__'"}  # conditions that no import meets
SHOWN = 8  # hex digits of a definition's digest

Place = tuple[str, str]  # a module and a name in it
Used = tuple[str, list[Place]]  # a name as written, less where it lies in the package, and what it may stand for


class Module:
    """A source file, or a folder without one: what it defines and imports, in functions too, and does on import."""

    def __init__(self, path: Path, name: str, top: str) -> None:
        self.name, self._top = name, top
        package = name.rpartition(".")[0] if path.suffix and path.stem != "__init__" else name
        self.bindings: dict[str, set[str]] = defaultdict(set)
        self.defined: dict[str, list[ast.stmt]] = defaultdict(list)  # by name, all statements that bind it
        self._known: dict[ast.stmt, tuple[str, list[str]]] = {}
        for statement in parsed(path).body if path.is_file() else []:
            if isinstance(statement, ast.If) and ast.unparse(statement.test) in SKIPPED:
                continue
            for node in ast.walk(statement):
                for bound, target, _ in imports(node, package):
                    self.bindings[bound].add(target)
            names = names_bound(statement)
            for each in names:
                self.defined[each].append(statement)
                self.bindings[each].add(f"{name}.{each}")
            if _acts(statement, names):
                self.defined[OTHER_LINES].append(statement)

    def statements(self, name: str) -> list[tuple[str, list[str]]]:
        """Return what binds a name: texts of what is done, and what the names in each stand for, dotted."""
        for each in self.defined[name]:
            if each not in self._known:
                self._known[each] = canonical(each, self.bindings, self._top)
        return [self._known[each] for each in self.defined[name]]


class Modules:
    """The modules of one package. A file is read once: one process imports a module once, too."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._read: dict[str, Module | None] = {}
        self._closures: dict[tuple[str, ...], dict[str, str]] = {}

    def closure(self, *roots: str) -> dict[str, str]:
        """Return the digest of every definition that the roots use at any depth, by name, and one of the whole.

        roots: dotted names of definitions, or of modules, which stand for all that they define. Where definitions of
        several modules have one name, their digests stand side by side.
        """
        if roots not in self._closures:
            self._closures[roots] = self._closure(roots)
        return {**self._closures[roots]}

    def reached(self, *roots: str) -> dict[Place, list[Used]]:
        """Return every definition that the roots use at any depth, and what each of them uses itself.

        They come in an order that follows from what they say, and not from where they lie.
        """
        found: dict[Place, list[Used]] = {}
        waiting = [place for root in roots for place in self._behind(root)[1]]
        while waiting:
            place = waiting.pop()
            if place not in found:
                module = self._read[place[0]]
                found[place] = [self._behind(use) for _, uses in self._statements(place) for use in uses]
                waiting += [target for _, targets in found[place] for target in targets]
                waiting += [(module.name, OTHER_LINES)] if module and OTHER_LINES in module.defined else []
        return found

    def exists(self, module: str) -> bool:
        """Whether the package has a module of this name."""
        return self._module(module) is not None

    def _closure(self, roots: Iterable[str]) -> dict[str, str]:
        reached = self.reached(*roots)
        own = {
            place: _sha256(*(text for text, _ in self._statements(place)), *(name for name, _ in uses))
            for place, uses in reached.items()
        }
        # How definitions refer to each other: by their numbers in the order in which they are met.
        numbers = {place: str(number) for number, place in enumerate(reached)}
        whole = [
            " ".join([own[place], *(numbers[target] for _, targets in uses for target in targets)])
            for place, uses in reached.items()
        ]
        by_name: dict[str, list[str]] = defaultdict(list)
        for (_, name), digest in own.items():
            by_name[name].append(digest[:SHOWN])
        found = {name: " ".join(sorted(digests)) for name, digests in sorted(by_name.items())}
        return found | {WHOLE: _sha256(*whole)[:32]}

    def _statements(self, place: Place) -> list[tuple[str, list[str]]]:
        module = self._module(place[0])
        return module.statements(place[1]) if module else []

    def _behind(self, dotted: str) -> Used:
        """Return what a dotted name is called apart from where it lies, and the definitions that it may stand for."""
        top, *parts = dotted.split(".")
        module = self._module(top) if top == self.package.name else None
        if module is None:
            return dotted, []  # of another package
        while parts and parts[0] not in module.defined and (below := self._module(f"{module.name}.{parts[0]}")):
            module, parts = below, parts[1:]
        if module.name in WITHOUT_EFFECT:
            return ".".join(parts), []
        name = parts[0] if parts else ""
        elsewhere = sorted(module.bindings.get(name, set()) - {f"{module.name}.{name}"})
        if name not in module.defined and len(elsewhere) == 1:
            return self._behind(".".join([*elsewhere, *parts[1:]]))
        here = [name] if name in module.defined else [] if elsewhere else sorted(module.defined)
        imported = [place for each in elsewhere for place in self._behind(each)[1]]
        return ".".join(parts), [*((module.name, each) for each in here), *imported]

    def _module(self, name: str) -> Module | None:
        if name not in self._read:
            top, *parts = name.split(".")
            base = self.package.joinpath(*parts)
            files = [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()]
            path = next(iter([*files, *([base] if base.is_dir() else [])]), None) if top == self.package.name else None
            self._read[name] = Module(path, name, top) if path else None
        return self._read[name]


def changed_definitions(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Say which definitions differ between two closures."""
    if (WHOLE in old) != (WHOLE in new):
        return "identified in another way by another rrlhf"
    names = [name for name in {**new, **old} if name != WHOLE and old.get(name) != new.get(name)]
    more = f" and {len(names) - 3} more" if names[3:] else ""
    return f"{', '.join(names[:3])}{more} changed" if names else "put together otherwise"


def _acts(statement: ast.stmt, bound: set[str]) -> bool:
    """Whether a statement at the top of a module does more than to define what it binds."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return not bound  # an attribute or an item is set
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not (is_text or isinstance(statement, DEFINING))


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
