"""The code behind a result: definitions of a package, by what they say and use and not by where they lie.

From a stage's `run`, every name is followed to the function, class or value that it stands for. What a module does when
it is imported, beside defining, counts as well. Nothing is imported for it. Names are followed as written; code that
finds its way by a name that it makes up (`globals()["f"]`) is not understood, and no stage does that.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from rrlhf.canonical import FUNCTIONS, SCOPES, Names, canonical, imported, names_bound, names_of_imports, walk
from rrlhf.memo import Memory
from rrlhf.sourcecode import packages, parsed

# Of this package: modules whose every effect on a result is already in the key (as settings), or that only show or
# store things.
WITHOUT_EFFECT = {
    "rrlhf.canonical",
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
# What may be called on import and does nothing but return a value; all other calls count wherever they are imported.
PURE = {"classmethod", "dict", "frozenset", "len", "property", "staticmethod", "tuple"} | {
    "contextlib.contextmanager",
    "dataclasses.dataclass",
    "functools.cache",
    "functools.lru_cache",
    "functools.partial",
    "pathlib.Path",
    "re.compile",
    "torch.no_grad",
    "types.MappingProxyType",
    "typing.TypeVar",
}
SKIPPED = {"TYPE_CHECKING", "__name__ == '__main__'"}  # conditions that no import meets
SHOWN = 8  # hex digits of a definition's digest

Place = tuple[str, str]  # a module and a name in it
Used = tuple[str, list[Place]]  # a name as written, less where it lies in the package, and what it may stand for


class Statement(NamedTuple):
    """A statement at the top of a module."""

    text: str  # what it does, whatever it is called in the package
    uses: list[str]  # what its names stand for, dotted, in the order in which they are written
    imports: set[str]  # what may be a module in import statements inside


class Module:
    """A source file, or a folder without one: what it defines, imports and does on import."""

    def __init__(self, path: Path, name: str, top: str) -> None:
        self.name = name
        self._top, self._package = top, name.rpartition(".")[0] if path.suffix and path.stem != "__init__" else name
        body = parsed(path).body if path.is_file() else []
        self._nodes = {statement: [*ast.walk(statement)] for statement in body}
        used = {node.id for nodes in self._nodes.values() for node in nodes if isinstance(node, ast.Name)}
        statements = [one for one in body if not _is_skipped(one)]
        self.imports = {each for one in walk(statements, FUNCTIONS) for each in imported(one, self._package)}
        self.bindings: Names = defaultdict(set)
        for one in walk(statements, SCOPES):
            for bound, target in names_of_imports(one, self._package):
                self.bindings[bound].add(target)
        self.defined: dict[str, list[ast.stmt]] = defaultdict(list)  # by name, all statements that bind it
        for statement in statements:
            for bound in names_bound(statement):
                self.defined[bound].append(statement)
                self.bindings[bound].add(f"{name}.{bound}")
        if effects := [one for one in statements if self._has_effect(one, used)]:
            self.defined[OTHER_LINES] = effects
        self._known: dict[ast.stmt, Statement] = {}

    def statements(self, name: str) -> list[Statement]:
        """Return what binds a name."""
        return [self._statement(each) for each in self.defined[name]]

    def _statement(self, statement: ast.stmt) -> Statement:
        if statement not in self._known:
            nodes = [node for node in self._nodes[statement] if isinstance(node, ast.Import | ast.ImportFrom)]
            modules = {each for node in nodes for each in imported(node, self._package)}
            names = {bound: {*targets} for bound, targets in self.bindings.items()} if nodes else self.bindings
            for node in nodes:
                for bound, target in names_of_imports(node, self._package):
                    names.setdefault(bound, set()).add(target)
            self._known[statement] = Statement(*canonical(self._nodes[statement], names, self._top), modules)
        return self._known[statement]

    def _has_effect(self, statement: ast.stmt, used: set[str]) -> bool:
        """Whether a statement does more on import than to bind names to values; `used`: all that the module writes."""
        match statement:
            case ast.Import() | ast.ImportFrom():
                bound = {name for name, _ in names_of_imports(statement, self._package)}
                return not bound & used and getattr(statement, "module", "") != "__future__"
            case ast.Expr(value=ast.Constant()):
                return False
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Assign() | ast.AnnAssign():
                return _changes_objects(statement) or not all(map(self._is_pure, _called(statement)))
        return True

    def _is_pure(self, function: ast.expr) -> bool:
        if isinstance(function, ast.Name) and all(map(_is_named_tuple, self.defined.get(function.id, [None]))):
            return True
        first, _, rest = ast.unparse(function).partition(".")
        targets = self.bindings.get(first, {first})
        return isinstance(getattr(function, "value", None), ast.Constant) or all(
            ".".join(filter(None, (target, rest))) in PURE for target in targets
        )


class Modules:
    """The modules of one package. A file is read once: one process imports a module once, too.

    memory: a file that remembers closures from one process to the next, while no file of the package changes.
    """

    def __init__(self, package: Path, memory: Path | None = None) -> None:
        self.package = package
        self._memory = Memory(memory) if memory else None
        self._read: dict[str, Module | None] = {}
        self._closures: dict[str, dict[str, str]] = {}

    def closure(self, *roots: str) -> dict[str, str]:
        """Return the digest of every definition that the roots use at any depth, by name, and one of the whole.

        roots: dotted names of definitions, or of modules, which stand for all that they define. Where definitions of
        several modules have one name, their digests stand side by side.
        """
        key = " ".join(roots)
        if key not in self._closures:
            self._closures = self._remembered()
            if key not in self._closures:
                self._closures[key] = self._closure(roots)
                self._remember()
        return {**self._closures[key]}

    def reached(self, *roots: str) -> dict[Place, list[Used]]:
        """Return every definition that the roots use at any depth, and what each of them uses itself."""
        found: dict[Place, list[Used]] = {}
        executed: set[str] = set()
        waiting = [place for root in roots for place in self._behind(root)[1]]
        while waiting:
            place = waiting.pop()
            if place in found:
                continue
            statements = self._statements(place)
            found[place] = [self._behind(use) for statement in statements for use in statement.uses]
            waiting += [target for _, targets in found[place] for target in targets]
            waiting += self._effects({place[0], *(each for one in statements for each in one.imports)}, executed)
        return found

    def exists(self, module: str) -> bool:
        """Whether the package has a module of this name."""
        return self._module(module) is not None

    def _closure(self, roots: Iterable[str]) -> dict[str, str]:
        reached = self.reached(*roots)
        own = {
            place: _sha256(*(one.text for one in self._statements(place)), *(name for name, _ in uses))
            for place, uses in reached.items()
        }
        # How definitions refer to each other: digests that take in those of what is used, one step further each time,
        # until no more definitions are told apart (colour refinement; equal ones do the same at any depth).
        deep, classes = own, 0
        while len({*deep.values()}) > classes:
            classes = len({*deep.values()})
            deep = {
                place: _sha256(own[place], *(" ".join(deep[target] for target in targets) for _, targets in uses))
                for place, uses in reached.items()
            }
        first = [deep[place] for root in roots for place in self._behind(root)[1]]
        by_name: dict[str, list[str]] = defaultdict(list)
        for (_, name), digest in own.items():
            by_name[name].append(digest[:SHOWN])
        found = {name: " ".join(sorted(digests)) for name, digests in sorted(by_name.items())}
        return found | {WHOLE: _sha256(*first, "", *sorted({*deep.values()}))[:32]}

    def _statements(self, place: Place) -> list[Statement]:
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

    def _effects(self, names: Iterable[str], executed: set[str]) -> Iterator[Place]:
        """Yield what happens when modules are imported and has not yet; notes the modules in `executed`."""
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            module = self._module(name)
            if module is None or name in executed or name in WITHOUT_EFFECT:
                continue
            executed.add(name)
            waiting += [*packages(name), *module.imports]
            if OTHER_LINES in module.defined:
                yield name, OTHER_LINES

    def _module(self, name: str) -> Module | None:
        if name not in self._read:
            top, *parts = name.split(".")
            base = self.package.joinpath(*parts)
            files = [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()]
            path = next(iter([*files, *([base] if base.is_dir() else [])]), None) if top == self.package.name else None
            self._read[name] = Module(path, name, top) if path else None
        return self._read[name]

    def _remembered(self) -> dict[str, dict[str, str]]:
        if self._memory is None or self._memory.known.get("of") != self._sources:
            return self._closures
        return {**self._memory.known["closures"], **self._closures}

    def _remember(self) -> None:
        if self._memory:
            self._memory.known = {"of": self._sources, "closures": self._closures}
            self._memory.grew = True
            self._memory.save()

    @cached_property
    def _sources(self) -> str:
        """A digest of all files of the package, and of this Python, whose syntax trees may be others."""
        files = sorted(self.package.rglob("*.py"))
        return _sha256(sys.version, *(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files))


def changed_definitions(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Say which definitions differ between two closures."""
    if (WHOLE in old) != (WHOLE in new):
        return "identified in another way by another rrlhf"
    told = {
        "changed": [name for name in new if name in old and name != WHOLE and old[name] != new[name]],
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
    }
    return "; ".join(f"{_listed(names)} {verb}" for verb, names in told.items() if names) or "put together otherwise"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _is_skipped(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in SKIPPED


def _is_named_tuple(statement: ast.stmt | None) -> bool:
    return isinstance(statement, ast.ClassDef) and [*map(ast.unparse, statement.bases)] == ["NamedTuple"]


def _changes_objects(statement: ast.stmt) -> bool:
    """Whether a statement sets an attribute or an item."""
    nodes = (node for node in walk([statement], FUNCTIONS) if isinstance(node, ast.Attribute | ast.Subscript))
    return any(not isinstance(node.ctx, ast.Load) for node in nodes)


def _called(statement: ast.stmt) -> Iterator[ast.expr]:
    """Yield what a statement calls when it is executed, decorators included."""
    for node in walk([statement], FUNCTIONS):
        if isinstance(node, ast.Call):
            yield node.func
        for decorator in getattr(node, "decorator_list", []):
            yield decorator.func if isinstance(decorator, ast.Call) else decorator


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
